"""Images without a public registry: a base of Debian's packages, and pip as it is set up here.

Needs root, buildah and mmdebstrap. Two cores take 3 minutes for the base, once, and 5 for the
operator and an engine for CPUs; 9 GB of disk while it works.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.bed import CACHE

ROOT = Path(__file__).parents[2]
ISOLATED = ["--isolation=chroot"]


def make_images(registry: str, folder: Path, *engines: str) -> None:
    """`make images` into a registry on loopback; leaves its kustomization in `folder`."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="storage.") as store:
        builder = storage(Path(store))
        make_base(builder)
        build = ["--network=host", *_pip(Path(store))]
        command = [sys.executable, str(ROOT / "tools/build_images.py"), registry, "--insecure"]
        command += ["--base=localhost/base"]
        command += ["--builder=buildah", f"--out={folder}"]
        command += [f"--engine={each}" for each in engines]
        command += [f"--builder-option={each}" for each in builder]
        command += [f"--build-option={each}" for each in (*ISOLATED, *build)]
        subprocess.run(command, check=True)


def storage(folder: Path) -> list[str]:
    """Options of each command of buildah: images are stored in `folder`."""
    return [f"--root={folder}/root", f"--runroot={folder}/run", "--storage-driver=vfs"]


def make_base(store: list[str]) -> None:
    """localhost/base: Debian 12 with Python, kept as an archive beside the test bed."""
    archive = CACHE / "base.tar"
    if not archive.exists():
        part = archive.with_suffix(".part")
        packages = "--include=python3-venv,python3-pip,ca-certificates"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", packages, "--format=tar"]
        subprocess.run([*command, "bookworm", str(part), _mirror()], check=True)
        part.rename(archive)
    command = ["buildah", *store, "bud", "--quiet", *ISOLATED, "-t", "localhost/base", "-f", "-"]
    text = f"FROM scratch\nADD {archive.name} /\n"
    subprocess.run([*command, str(CACHE)], input=text, text=True, check=True)


def _mirror() -> str:
    wanted = ["Identifier: Packages", "Codename: bookworm", "Label: Debian"]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout, "no Debian bookworm source in this machine's apt configuration"
    return done.stdout.splitlines()[0]


def _pip(folder: Path) -> list[str]:
    """Options that show a build pip's settings as one file, and what they name; nothing of it stays
    in the images."""
    told = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(told, capture_output=True, text=True, check=True)
    pairs = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", done.stdout, re.M))
    file = folder / "pip.conf"
    lines = [f"{key} = {value}\n" for key, value in pairs.items()]
    file.write_text("".join(["[global]\n", *lines]))
    seen = {Path("/etc/pip.conf"): file}
    for word in " ".join(pairs.values()).replace("file://", "").split():
        path = Path(word)
        if path.is_absolute() and path.exists():
            path = path.parent if path.name == "simple" else path  # an index, beside its files
            seen[path] = path
    return [f"--volume={outside}:{inside}:ro" for inside, outside in seen.items()]
