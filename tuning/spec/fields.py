"""Rules for single values: names, image references, URLs, volumes, unfilled placeholders."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path as FilePath
from typing import Any

from tuning.spec import reference, urls
from tuning.spec.findings import Findings, Path, did_you_mean, shorten, shown
from tuning.spec.workspace import SUBDOMAIN, Preset

# As in published quick starts: ACR_REPO_HERE, <your-registry>, ${REGISTRY}.
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*_HERE|<[A-Za-z][^<>]*>|\$\{?[A-Z][A-Z0-9_]*\}?")
_HUB_PART = "[A-Za-z0-9][A-Za-z0-9._-]*"


def check_name(
    name: str, pattern: str, longest: int, path: Path, findings: Findings, what: str
) -> None:
    """`name` as the name of a Kubernetes object of kind `what`."""
    if len(name) > longest or not re.fullmatch(pattern, name, re.A):
        # The author may have written the secret in place of the Secret's name.
        subject = "this" if what == "Secret" else shown(name)
        change = f'use lower-case letters, digits and "-", {longest} at most'
        findings.add("SPEC-107", path, f"{subject} is not a valid name of a {what}", change)


def check_secret(name: str, path: Path, findings: Findings) -> None:
    """The name of a Secret."""
    if not _placeholder(name, path, findings, "the name of your Secret"):
        check_name(name, SUBDOMAIN, 253, path, findings, "Secret")


def check_preset(preset: Preset, path: Path, findings: Findings, *, here: bool = False) -> None:
    """A base model's name and options. Whether the preset exists is checked later.

    `here`: on this machine, where a folder (as a whole path) or oci://IMAGE is one as well.
    """
    name = (*path, "name")
    if _placeholder(preset.name, name, findings, "the name of a preset, or org/model,"):
        return
    if here and preset.name.startswith("oci:"):
        check_image(preset.name[4:].removeprefix("//"), name, findings, "base")
    elif here and preset.name.startswith("/"):
        if not is_folder(preset.name):
            change = "name a folder with config.json, *.safetensors and a tokenizer, or org/model"
            findings.add("SPEC-124", name, f"{shown(preset.name)} is no folder here", change)
    elif len(preset.name) > 200 or not re.fullmatch(rf"{_HUB_PART}(/{_HUB_PART})?", preset.name):
        what = f"Unsupported tuning preset name {shown(preset.name)}"
        change = "use a name that `python -m tuning presets` lists, or org/model of the hub"
        change += ", or the path of a folder" if here else ""
        findings.add("SPEC-104", name, what, change)
    options = preset.preset_options
    if options and options.model_access_secret is not None:
        at = (*path, "presetOptions", "modelAccessSecret")
        check_secret(options.model_access_secret, at, findings)


def check_image(text: str, path: Path, findings: Findings, role: str) -> None:
    """An image reference, with KAITO's messages. `role` is input, output, adapter or base-image."""
    if _placeholder(text, path, findings, "your own registry and image, in lower case,"):
        return
    if role == "output" and is_local_output(text):
        what = f"Unable to parse output image reference: {shown(text)} is not in a registry"
        change = "write registry.example.com/name:tag; a folder or the hub is an output only where "
        findings.add("SPEC-106", path, what, change + "you run `tuning run` yourself")
        return
    try:
        parsed = reference.parse(text)
    except ValueError as error:
        what = f"Unable to parse {role} image reference: {error}"
        findings.add("SPEC-106", path, what, "write registry.example.com/name:tag")
        return
    if role == "output" and parsed.digest:
        what = "Unable to parse output image reference: a digest is known only after the push"
        findings.add("SPEC-106", path, what, "remove what follows the @")


def is_local_output(text: str) -> bool:
    """Whether an output is a folder of this machine or a repository of the hub, not an image."""
    return text.startswith(("oci:", "dir:", "hf://", "/", ".", "~"))


def check_output(output: str, path: Path, findings: Findings) -> None:
    """An output on this machine: oci:DIR, dir:DIR, hf://ORG/NAME or an image reference."""
    if output.startswith("hf://"):
        if urls.model(output) is None:
            what = f"{shown(output)} is no repository of a model"
            change = "write hf://ORG/NAME, or hf://ORG/NAME@BRANCH"
            findings.add("SPEC-109", path, what, change)
    elif not output.startswith(("oci:", "dir:")):
        rest = output.partition("://")[2]
        kind, colon, after = output.partition(":")
        alone = "/" not in output.partition("@")[0]  # an image of Docker Hub, where none can push
        unsaid = ":" not in output and "@" not in output and "." not in output.partition("/")[0]
        bare = alone or unsaid
        other = bool(rest) or (bool(colon) and "/" not in output)  # sftp://HOST/DIR, sftp:DIR
        if output.startswith(("/", ".", "~")) or bare or other:
            what = f"{shown(output)} is not an image reference"
            folder = "" if rest else shorten(after if other else output)
            folder = folder or "FOLDER"
            change = f"write dir:{folder} for a plain folder, oci:{folder} for an image layout"
            if other:
                what = f"{shown(output)} names no registry, and {shown(kind)} is no kind of place"
                change += ", hf://ORG/NAME for the hub, registry.example.com/name:tag for an image"
            elif bare and output:
                what = f"{shown(output)} has no registry and no tag, and names no kind of folder"
                change += f", docker.io/{folder}:TAG for Docker Hub"
            findings.add("SPEC-109", path, what, change)
        else:
            check_image(output, path, findings, "output")
    elif not output[4:] or not output.isprintable():
        findings.add("SPEC-109", path, "names no folder", f"write {output[:4]}FOLDER")


def is_here(name: str) -> bool:
    """Whether `name` is a file or a folder of this machine."""
    try:
        return FilePath(name).exists()
    except (OSError, ValueError):  # too long for a name
        return False


def is_model(name: str) -> bool:
    """Whether `name` is a folder of this machine with a model in it."""
    weights = is_folder(name) and any(FilePath(name).glob("*.safetensors"))
    return weights and is_here(f"{name}/config.json")


def is_folder(name: str) -> bool:
    """Whether `name` is a folder of this machine."""
    return is_here(name) and FilePath(name).is_dir()


_OTHER_NAMES = {
    "gcs": "gs://BUCKET/OBJECT",
    "s3a": "s3://BUCKET/KEY",
    "s3n": "s3://BUCKET/KEY",
    **dict.fromkeys(("abfs", "abfss", "adl", "wasb", "wasbs"), "az://CONTAINER/BLOB"),
}


def check_data_folder(name: str, path: Path, findings: Findings) -> None:
    """A file or folder of this machine as data: no model's folder."""
    if is_model(name):
        what = f"{shown(name)} is the folder of a model, not of data"
        findings.add("SPEC-124", path, what, "name a file or a folder with rows to train on")


def check_url(
    url: str,
    path: Path,
    findings: Findings,
    allow_hosts: Collection[str],
    *,
    here: bool = False,
) -> None:
    """One data URL. Messages never show it: its query may hold a key.

    `here`: on this machine, where the whole path of a file or a folder is one as well.
    """
    if here and url.startswith("/") and is_here(url):
        check_data_folder(url, path, findings)
        return
    if _placeholder(url.partition("?")[0], path, findings, "the address of your data file"):
        return
    refusal = urls.refusal(url, allow_hosts=allow_hosts)
    if written := urls.page(url):
        what = "data source URL names a page of the hub, not data"
        findings.add("SPEC-115", path, what, f"write {written}")
        return
    if refusal is None:
        if url[:5].lower() == "http:":
            findings.note(path, "http, not https: the data can be read and changed on its way")
        return
    changes = {
        urls.NOT_ONE_FILE: "write one URL for each file, such as s3://bucket/folder/rows.jsonl",
        urls.NOT_IN_STORE: "write SCHEME://BUCKET/KEY without a query; a bucket's name has small "
        "letters, digits, - . and _ only, special characters of the key are written as %XX",
        urls.NOT_HTTP: "use https://; files are given with --data FILE, volumes as volumeSource",
        urls.INVALID: "write an address such as https://example.com/data.jsonl, special "
        "characters as %XX, without user name and password",
    }
    scheme = url.partition(":")[0].lower()
    if refusal == urls.NOT_HTTP and scheme in _OTHER_NAMES:
        changes[refusal] = f"write it as {_OTHER_NAMES[scheme]}"
    if "://" not in url and here:
        what = f"{shown(url)} is neither a file or folder here nor a dataset of the hub"
        change = (
            "correct the path, or write ORG/NAME, or an address such as https://host/rows.jsonl"
        )
        findings.add("SPEC-124", path, what, change)
        return
    if refusal == urls.INVALID and "://" not in url:
        changes[refusal] += "; a cluster does not see the files of your machine: upload them"
    if scheme == "hf":
        changes[urls.INVALID] = (
            "write hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION for a dataset, with "
            "config=NAME and split=NAME (or NAME+NAME) after a ?, or .../FILE for one of its files"
        )
    default = "use a public address; --allow-host HOST opens a private one on your own machine"
    findings.add("SPEC-115", path, refusal, changes.get(refusal, default))


_VOLUME_KEYS = {
    "persistentVolumeClaim": ("claimName", "readOnly"),
    "configMap": ("name", "items", "defaultMode", "optional"),
}


def check_volume(
    volume: dict[str, Any], path: Path, findings: Findings, *, written: bool = False
) -> None:
    """A Kubernetes VolumeSource: one kind, whose own fields are right where they are known."""
    host_path = volume.get("hostPath")
    if not volume:
        findings.add("SPEC-112", path, "names no volume", "add hostPath or persistentVolumeClaim")
    elif len(volume) > 1:
        findings.add("SPEC-116", path, "names more than one volume", "keep one of them")
    elif "hostPath" in volume and not (
        isinstance(host_path, dict)
        and isinstance(host_path.get("path"), str)
        and host_path["path"].startswith("/")
        and host_path["path"].isprintable()
    ):
        what = "needs the path of a folder, beginning with /"
        at = (*path, "hostPath", "path")
        findings.add("SPEC-113", at, what, "write hostPath: {path: /some/folder}")
    else:
        for kind, keys in _VOLUME_KEYS.items():
            if kind in volume:
                _check_source(volume[kind], keys, (*path, kind), findings, written=written)


def _check_source(
    source: Any, keys: tuple[str, ...], path: Path, findings: Findings, *, written: bool
) -> None:
    """A claim or a ConfigMap: a cluster would find out when the node is there."""
    name = source.get(keys[0]) if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(name, str):
        change = f"write {path[-1]}: {{{keys[0]}: NAME}}"
        findings.add("SPEC-113", path, f"needs {keys[0]}", change)
        return
    check_name(name, SUBDOMAIN, 253, (*path, keys[0]), findings, str(path[-1]))
    for key in source:
        if key not in keys:
            findings.add("SPEC-111", (*path, str(key)), "unknown key", did_you_mean(str(key), keys))
    if written and source.get("readOnly"):
        what = "is true, but the adapter is written there"
        findings.add("SPEC-108", (*path, "readOnly"), what, "remove it")


def _placeholder(text: str, path: Path, findings: Findings, wanted: str) -> bool:
    names = list(dict.fromkeys(_PLACEHOLDER.findall(text)))
    if names:
        several = " and ".join(names)
        what = f"still holds the placeholder{'s'[: len(names) > 1]} {several}"
        findings.add("SPEC-114", path, what, f"put {wanted} in place of {several}")
    return bool(names)
