"""Model, source and destination, from the file or the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tuning.spec import fields, reference, urls
from tuning.spec.documents import Document
from tuning.spec.findings import Findings, shown
from tuning.spec.findings import Path as Place
from tuning.spec.values import Destination, Overrides, Source
from tuning.spec.workspace import ANNOTATION, DataDestination, DataSource

_INPUT_MOUNT, _OUTPUT_MOUNT = Path("/data"), Path("/output")  # of volumes, in the Job


def check(overrides: Overrides, findings: Findings) -> None:
    """All rules for the command line's overrides; problems name the flag."""
    for i, item in enumerate(overrides.data):
        if url := urls.of_data(item):
            fields.check_url(url, ("--data", i), findings, overrides.allow_hosts)
        elif not item or not item.isprintable():
            findings.add(
                "SPEC-109", ("--data", i), "is not a file name", "name a file, a folder or a URL"
            )
        else:
            fields.check_data_folder(item, ("--data", i), findings)
    if sum(fields.is_folder(item) for item in overrides.data if not urls.of_data(item)) > 1:
        change = "give one folder; files and URLs may stand beside it"
        findings.add("SPEC-109", ("--data",), "names several folders", change)
    if overrides.output is not None:
        fields.check_output(overrides.output, ("--output",), findings)
    for name in ("base_model", "instance"):
        if getattr(overrides, name) == "":
            flag = f"--{name.replace('_', '-')}"
            findings.add("SPEC-109", (flag,), "is empty", "give a value, or leave it out")


def localise(document: Document, beside: Path) -> None:
    """Write out what `document` names on this machine: files and folders, seen from `beside`, as
    whole paths, ORG/NAME of a dataset as its URL. What is neither stays, for the rules to refuse.
    """
    model, data, output = (document.at("tuning", each) for each in ("preset", "input", "output"))
    if isinstance(model, dict) and isinstance(name := model.get("name"), str):
        folder = _seen_from(beside, name)
        if name.startswith(("/", "./", "../", "~/")) or fields.is_here(f"{folder}/config.json"):
            model["name"] = str(folder.absolute())
    if isinstance(data, dict) and isinstance(listed := data.get("urls"), list):
        data["urls"] = [_localised(each, beside) for each in listed]
    image = output.get("image") if isinstance(output, dict) else None
    if isinstance(image, str) and image.startswith(("oci:", "dir:")) and image[4:]:
        output["image"] = f"{image[:4]}{_seen_from(beside, image[4:]).absolute()}"


def _localised(data: Any, beside: Path) -> Any:
    if not isinstance(data, str) or not data or "://" in data:
        return data
    path = _seen_from(beside, data)
    return str(path.absolute()) if fields.is_here(str(path)) else urls.of_data(data, beside) or data


def named_from(beside: Path, name: str) -> str:
    """`name` of the command line as a document in `beside` has to say it: what is a file or folder
    of this machine becomes a whole path, unless `beside` is the working directory.
    """
    if beside == Path() or "://" in name or not fields.is_here(name):
        return name
    return str(Path(name).absolute())


def _seen_from(folder: Path, text: str) -> Path:
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:  # ~ of nobody
        return folder / text


def own_base(name: str) -> tuple[str, str | None]:
    """What the base model `name` of a Workspace is called, and its folder or image if it is one."""
    if name.startswith("/"):
        return Path(name).name or "model", name
    if name.startswith("oci:"):
        parsed = reference.parse(name[4:].removeprefix("//"))
        return parsed.repository.rpartition("/")[2], name
    return name, None


def source_of(data: tuple[str, ...]) -> Source:
    """The source that --data, or urls on this machine, name."""
    named = tuple(filter(None, map(urls.of_data, data)))
    local = [Path(item) for item in data if not urls.of_data(item)]
    folder = next((path for path in local if fields.is_folder(str(path))), None)
    return Source(urls=named, folder=folder, files=tuple(p for p in local if p != folder))


def source(written: DataSource | None, notes: list[str]) -> Source:
    """The source that tuning.input names."""
    assert written is not None
    if written.urls:
        return source_of(tuple(written.urls))
    if written.image is not None:
        return Source(image=written.image, pull_secrets=tuple(written.image_pull_secrets or ()))
    assert written.volume_source is not None
    return Source(folder=_folder(written.volume_source, _INPUT_MOUNT, "input", notes))


def destination(
    written: DataDestination | None,
    output: str | None,
    notes: list[str],
    annotations: dict[str, str],
    status: object = None,
) -> Destination:
    """The destination that --output names, or else tuning.output.

    `status` is the Workspace's, where an operator wrote one: it lists earlier outputs.
    """
    overwrite = annotations.get(f"{ANNOTATION}on-tag-exists") == "overwrite"
    ours: dict[str, Any] = {
        "on_tag_exists": "overwrite" if overwrite else "refuse",
        "index": annotations.get(f"{ANNOTATION}image-index") == "true",
        "base_image": annotations.get(f"{ANNOTATION}base-image"),
        "earlier": _earlier(status),
    }
    if output is not None:
        return replace(named_destination(output), **ours)
    assert written is not None
    volume = written.volume_source
    if volume:
        ours["folder"] = _folder(volume, _OUTPUT_MOUNT, "output", notes)
    if written.image and fields.is_local_output(written.image):
        return replace(named_destination(written.image), **ours)
    return Destination(image=written.image, push_secret=written.image_push_secret, **ours)


def named_destination(output: str) -> Destination:
    """The destination that `oci:DIR`, `dir:DIR`, hf://ORG/NAME or an image reference names."""
    if (repository := urls.model(output)) is not None:
        return Destination(hub=repository)
    kind, _, folder = output.partition(":")
    match kind:
        case "oci":
            return Destination(layout=Path(folder))
        case "dir":
            return Destination(folder=Path(folder))
    return Destination(image=output)


def start_adapter(named: str, beside: Path | None, findings: Findings, path: Place) -> str:
    """The adapter that `start_adapter` names: an image, `oci:DIR`, or a folder's absolute path.

    Folders are looked for in `beside`, the folder of the YAML; None, on a cluster, where the Job
    sees no folder of its author: only an image is taken.
    """
    rest = named.removeprefix("oci:").removeprefix("//")
    if beside is not None and not named.startswith("oci://"):
        folder, tag = (beside / rest).absolute(), ""
        if named != rest and not fields.is_folder(f"{folder}"):  # oci:DIR:NAME, of several there
            parent, colon, name = str(folder).rpartition(":")
            folder, tag = Path(parent), colon + name
        if fields.is_folder(str(folder)):
            return f"oci:{folder}{tag}" if named != rest else str(folder)
    host = rest.partition("/")[0] if "/" in rest else ""
    local = rest[:1] in ("/", ".", "~") or not ("." in host or ":" in host or host == "localhost")
    if local and not named.startswith("oci://"):
        what = f"{shown(named)} is no folder here" if beside else "names a folder"
        change = "write an image with its registry, such as registry.example.com/adapter:1"
        if beside is None:
            change += " (a Job on a cluster does not see your folders)"
        findings.add("SPEC-122", path, what, change)
    else:
        fields.check_image(rest, path, findings, "adapter")
    return rest


def _earlier(status: object) -> tuple[str, ...]:
    outputs = status.get("outputs") if isinstance(status, dict) else None
    listed = outputs if isinstance(outputs, list) else []
    return tuple(each for each in listed if isinstance(each, str) and reference.is_digest(each))


def _folder(volume: dict[str, Any], mount: Path, role: str, notes: list[str]) -> Path:
    """The folder of a volume: its host path, or where the Job mounts it."""
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    flag = "--data FOLDER" if role == "input" else "--output dir:FOLDER"
    notes.append(
        f"tuning.{role}.volumeSource: {shown(next(iter(volume)))} is at {mount}, where the Job "
        f"mounts it; on your own machine give {flag}"
    )
    return mount
