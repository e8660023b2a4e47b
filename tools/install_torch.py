"""Install the pinned torch, in the build asked for: `install_torch.py VERSION auto|cpu|cu126|...`.

torch goes first and alone, so that no other package can pull another build: on Linux a plain
`pip install torch` brings gigabytes of CUDA, wanted or not. With it come CUDA's libraries, in the
versions that this build names; all else that it needs is in the lock (install_locked.py). The lock
has no hash of builds that are not on PyPI: pip compares torch with the hash that its index gives.
Configured package sources are asked before pytorch.org's own index. PyPI's wheel is one of the
builds without its name, and enough where only a mirror of PyPI can be reached; macOS has one build
only. `auto` is the newest build that runs on this machine's GPUs with their driver, cpu where there
is none; nothing is installed yet that could read YAML.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import install_locked
from install_locked import LOCK, locked

INDEX = "https://download.pytorch.org/whl/"
PYPI = "https://pypi.org/simple"  # what torch itself depends on
BUILDS = ("cpu", "cu126", "cu130")
ON_PYPI = "cu130"  # what torch/version.py of PyPI's 2.13.0 says, for Linux on x86-64
ROOT = Path(__file__).parents[1]
ENGINES = ROOT / "configs" / "engines.yaml"


def installed() -> str | None:
    """The version of torch in this environment, build included, or None."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def suited(answer: dict[str, Any]) -> str:
    """The build for the machine whose driver gave this answer of tuning/plan/probe.py."""
    engines = re.findall(
        r"^(cu\d+):\s+driver:.*?compiled: \[(.*?)\]", ENGINES.read_text(), re.M | re.S
    )
    kinds = [tuple(card["capability"]) for card in answer["devices"]]
    fitting = ["cpu"]
    for build, listed in engines:
        compiled = [(int(a), int(b)) for a, b in re.findall(r"(\d+)\.(\d+)", listed)]
        runs = all(any(a == x and b <= y for a, b in compiled) for x, y in kinds)
        if kinds and runs and int(build[2:4]) <= answer["cuda"][0]:
            fitting.append(build)
    if kinds and fitting == ["cpu"]:
        names = " + ".join(sorted({card["name"] for card in answer["devices"]}))
        print(f"No build of torch runs on {names} with the driver {answer['driver']}: cpu it is.")
    return fitting[-1]


def asked() -> dict[str, Any]:
    """What the driver answers; nothing where it hangs or crashes."""
    command = [sys.executable, "-I", "-S", str(ROOT / "tuning" / "plan" / "probe.py")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"devices": []}


def pip(*arguments: str) -> bool:
    """Whether `pip install ARGUMENTS` succeeded."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    quiet = subprocess.DEVNULL if "--dry-run" in arguments else None
    return subprocess.run(command, check=False, stdout=quiet, stderr=quiet).returncode == 0


def names(version: str, build: str) -> list[str]:
    """What a package index may call this build, best first."""
    if platform.system() == "Darwin":
        return [version]
    plain = build == ON_PYPI and (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return [f"{version}+{build}", *([version] if plain else [])]


def libraries(asked: list[str]) -> list[str]:
    """Of what a torch says it needs, what belongs to its build: all that the lock does not have."""
    known = locked(LOCK.read_text(encoding="utf-8"))
    named = {each: re.split(r"[^\w.-]", each, maxsplit=1)[0].lower() for each in asked}
    return [each for each in asked if named[each] not in known and "extra ==" not in each]


def main() -> int:
    """Install, or say in one line why not."""
    version, build = sys.argv[1:3]
    if build == "auto":
        build = suited(asked())
    if build not in BUILDS:
        print(f"TORCH_INDEX={build}: choose one of {', '.join(BUILDS)}", file=sys.stderr)
        return 2
    if install_locked.own_pip():  # old ones know no --dry-run
        return 1
    wanted, *others = names(version, build)
    there = installed() in (wanted, *others)
    sources: list[str] = []
    if not there:
        print(f"Installing torch {wanted} ...", flush=True)
        # `===` is the exact text: `==2.13.0` would be satisfied by 2.13.0+cpu
        search = ("-qqq", "--no-deps", "--dry-run")
        name = next((n for n in (wanted, *others) if pip(*search, f"torch==={n}")), None)
        sources = [] if name else ["--index-url", INDEX + build, "--extra-index-url", PYPI]
        there = pip(*sources, "--no-deps", f"torch==={name or wanted}")
    if there:  # its libraries may be missing still, where an installation was broken off
        own = libraries(importlib.metadata.requires("torch") or [])
        if not own or pip(*sources, *own):
            return 0
    print(
        f"torch {wanted} could not be installed. Change: check the network, or choose another "
        f"build with make install TORCH_INDEX={'|'.join(BUILDS)}.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
