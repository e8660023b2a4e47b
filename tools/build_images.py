"""Build both images, push them, and write the kustomization that names them by digest.

    build_images.py registry.example.com/team --engine cu126 --engine cu130 --key cosign.key
    kubectl apply -k build/deploy

Run by `make images`. docker, podman and buildah are asked in this order, and the first that works
is used. The operator goes first: it takes a minute, and shows whether the registry takes a push.
All stand on one base: the digest that its tag has at the start, which each image names in a label.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `make images` needs no installed project

from tuning.errors import TuningError  # noqa: E402
from tuning.oci import registry  # noqa: E402
from tuning.oci.access import Access  # noqa: E402

DEPLOY = ROOT / "configs" / "deploy"
# Whether each can build here: of docker, its daemon has to answer.
BUILDERS = {"docker": ["version"], "podman": ["info"], "buildah": ["info"]}
_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(rf"[A-Za-z0-9.-]+(?::[0-9]+)?(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}")


def engines() -> list[str]:
    """The builds of torch for GPUs, oldest CUDA first."""
    return list(yaml.safe_load((ROOT / "configs" / "engines.yaml").read_text(encoding="utf-8")))


def base_image() -> str:
    """The base that the Dockerfile names."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return str(re.findall(r"^ARG BASE=(\S+)", text, re.M)[0])


def on_base(base: str, insecure: bool) -> list[str]:
    """Options of a build on `base` by its digest, and the labels of OCI's image-spec that say so.

    A name with a digest is taken as it is; localhost/NAME, a builder's own image, has none, nor has
    what no registry shows: the builder may have it.
    """
    name, at, digest = base.partition("@")
    if base.startswith("localhost/") and not at:
        print(f"BASE {base} is of no registry: the images will not name its digest")
        return [f"--build-arg=BASE={base}"]
    if not at:
        patience = registry.Patience(tries=3)  # a person waits
        remote = Access(insecure=insecure, patience=patience).remote(base, secret=None)
        try:
            digest, _ = remote.persist(lambda: registry.resolve(remote))
        except TuningError as error:
            print(f"BASE {base}: the images will not name its digest, {error}", flush=True)
            return [f"--build-arg=BASE={base}"]
    bare = re.sub(r":[^:/]+$", "", name)
    label = "--label=org.opencontainers.image.base"
    return [f"--build-arg=BASE={bare}@{digest}", f"{label}.name={name}", f"{label}.digest={digest}"]


def version() -> str:
    """What the images are called by: git's name for this tree, or the version where git is not."""
    command = ["git", "-C", str(ROOT), "describe", "--tags", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        return str(re.findall(r'^version = "(.*)"', text, re.M)[0])


@dataclass(frozen=True)
class Builder:
    """One of BUILDERS, and how it is called."""

    program: str
    options: tuple[str, ...] = ()  # of every command, such as --root=DIR
    build_options: tuple[str, ...] = ()
    insecure: bool = False

    def push(self, target: str, name: str, **arguments: str) -> str:
        """Build `target` of the Dockerfile as `name`, push it; gives its digest in the registry."""
        print(f"{self.program}: {target} as {name}", flush=True)
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        self._run("build", "--target", target, "-t", name, *given, *self.build_options, str(ROOT))
        if self.program == "docker":  # whether a registry has TLS is for its daemon to know
            told = self._run("push", name, read=True)
            return re.findall(r"digest: (sha256:[0-9a-f]{64})", told)[-1]
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / "digest"
            plain = ["--tls-verify=false"] if self.insecure else []
            self._run("push", "--quiet", f"--digestfile={note}", *plain, name, f"docker://{name}")
            return note.read_text(encoding="utf-8").strip()

    def works(self) -> bool:
        """Whether it is installed and can build here."""
        if not shutil.which(self.program):
            return False
        command = [self.program, *self.options, *BUILDERS[self.program]]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _run(self, verb: str, *arguments: str, read: bool = False) -> str:
        command = [self.program, *self.options, verb, *arguments]
        piped = subprocess.PIPE if read else None
        return subprocess.run(command, check=True, text=True, stdout=piped).stdout or ""


def sign(name: str, key: str, insecure: bool, options: Sequence[str]) -> None:
    """Sign an image, named by digest, with cosign: it reads the key's password from COSIGN_PASSWORD
    or asks, and asks before it tells a public log, unless `options` say --yes or otherwise."""
    plain = ["--allow-insecure-registry", "--allow-http-registry"] if insecure else []
    command = ["cosign", "sign", f"--key={key}", *plain, *options, name]
    subprocess.run(command, check=True)


class _Plain(yaml.SafeDumper):
    """Without anchors: a person reads it."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def write(
    folder: Path, deploy: Path, operator: str, built: dict[str, str], pull_secret: str | None
) -> None:
    """The kustomization in `folder` on top of `deploy`, and the same as values of the Helm chart.

    `operator` and `built`, the engines by their build of torch, are names with digests. The last
    engine is the one for unknown GPUs.
    """
    names: dict[str, Any] = {"image": list(built.values())[-1]}
    names["images"] = {build: name for build, name in built.items() if build in engines()}
    values: dict[str, Any] = {"image": operator, "options": names}
    own = deploy / "options.yaml"
    source = own if own.exists() else DEPLOY / "base" / "options.yaml"
    options = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
    below = yaml.safe_load((deploy / "kustomization.yaml").read_text(encoding="utf-8"))
    name, _, digest = operator.partition("@")
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(deploy, folder)],
        "images": [{"name": "tuning-operator", "newName": name, "digest": digest}],
        "configMapGenerator": [
            {
                "name": "tuning-operator",
                "namespace": below.get("namespace", "tuning-system"),
                "behavior": "merge",
                "files": ["options.yaml"],
            }
        ],
    }
    if pull_secret:
        names["imagePullSecrets"] = values["imagePullSecrets"] = [pull_secret]
        place, value = "/spec/template/spec/imagePullSecrets", [{"name": pull_secret}]
        patch = {"op": "add", "path": place, "value": value}
        kustomization["patches"] = [
            {
                "target": {"kind": "Deployment", "name": "tuning-operator"},
                "patch": json.dumps([patch]),
            }
        ]
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"kustomization": kustomization, "options": options | names, "values": values}
    for file, content in pages.items():
        text = yaml.dump(content, Dumper=_Plain, sort_keys=False)
        (folder / f"{file}.yaml").write_text(text, encoding="utf-8")


def _problems(told: argparse.Namespace) -> Iterator[str]:
    """All that can be known before minutes are spent on a build."""
    if not _REGISTRY.fullmatch(told.registry):
        yield (
            f"REGISTRY {told.registry!r} is no name of a registry and folder; use a form such as "
            "registry.example.com/team, in lower case and without https://"
        )
    if not _TAG.fullmatch(told.tag):
        yield f"TAG {told.tag!r} is no tag: letters, digits, dots, dashes and underscores"
    known = ["cpu", *engines()]
    for engine in told.engine:
        if engine not in known:
            yield f"ENGINES names {engine!r}, which is no build of torch; use {', '.join(known)}"
    if told.key and not shutil.which("cosign"):
        yield "KEY is given, and cosign is not installed: install it, or leave KEY out"
    if told.key and "://" not in told.key and not Path(told.key).is_file():
        yield f"KEY {told.key} is not there: `cosign generate-key-pair` makes cosign.key"
    if not (told.deploy / "kustomization.yaml").is_file():
        yield f"DEPLOY {told.deploy} has no kustomization.yaml; use a folder such as configs/deploy"


def _builder(told: argparse.Namespace) -> Builder | None:
    names = [told.builder] if told.builder else list(BUILDERS)
    options = tuple(told.builder_option), tuple(told.build_option)
    found = (Builder(name, *options, told.insecure) for name in names)
    return next((each for each in found if each.works()), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("registry", help="where images go: registry.example.com/team")
    add("--base", default=base_image(), help="what the images stand on: NAME:TAG or NAME@DIGEST")
    add("--tag", default=version(), help="their tag; an engine's ends with its build of torch")
    add("--engine", action="append", help="build of torch; repeat for several")
    add("--key", help="sign with this key of cosign: a file, or the address of a KMS")
    add("--sign-option", action="append", default=[], help="of cosign sign: --yes")
    add("--insecure", action="store_true", help="the registry speaks http, or its TLS is unknown")
    add("--pull-secret", metavar="NAME", help="Secret with which the cluster pulls the images")
    add("--deploy", type=Path, default=DEPLOY, help="what is installed: configs/deploy, ...")
    add("--out", type=Path, default=ROOT / "build" / "deploy", help="folder of the kustomization")
    add("--builder", choices=BUILDERS, help="instead of the first that works")
    add("--builder-option", action="append", default=[], help="of each command: --root=DIR")
    add("--build-option", action="append", default=[], help="of each build: --network=host")
    return parser


def main(arguments: Sequence[str] | None = None) -> str | int:
    """The exit code, or what is wrong."""
    told = _parser().parse_args(arguments)
    told.engine = list(dict.fromkeys(told.engine or engines()))
    told.registry = told.registry.rstrip("/")
    if problems := list(_problems(told)):
        return "\n".join(problems)
    builder = _builder(told)
    if not builder:
        asked = told.builder or ", ".join(BUILDERS)
        return f"No builder works here ({asked}): start docker, or install podman or buildah"
    # a registry without TLS is the one that was told of, no other
    ours = told.base.partition("/")[0] == told.registry.partition("/")[0]
    based = on_base(told.base, told.insecure and ours)
    builder = replace(builder, build_options=(*based, *builder.build_options))
    operator = f"{told.registry}/tuning-operator"
    images = [("operator", operator, told.tag, dict[str, str]())]
    for engine in told.engine:
        arguments_of = {"TORCH_INDEX": engine}
        images.append(("engine", f"{told.registry}/tuning", f"{told.tag}-{engine}", arguments_of))
    try:
        pinned = []
        for target, name, tag, given in images:
            pinned.append(f"{name}@{builder.push(target, f'{name}:{tag}', **given)}")
            if told.key:
                sign(pinned[-1], told.key, told.insecure, told.sign_option)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd[:3]))
        return f"{command} ... failed with exit code {error.returncode}; nothing was written"
    built = dict(zip(told.engine, pinned[1:], strict=True))
    write(told.out, told.deploy, pinned[0], built, told.pull_secret)
    print("\n".join(pinned))
    print(f"Next: kubectl apply -k {os.path.relpath(told.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
