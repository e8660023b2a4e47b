"""Install the pinned torch, in the build asked for: `install_torch.py VERSION cpu|cu126|cu130`.

torch goes first and alone, so that no other package can pull another build: on Linux a plain
`pip install torch` brings gigabytes of CUDA, wanted or not. Configured package sources are asked
before pytorch.org's own index; macOS has one build only.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys

INDEX = "https://download.pytorch.org/whl/"
PYPI = "https://pypi.org/simple"  # what torch itself depends on
BUILDS = ("cpu", "cu126", "cu130")


def installed() -> str | None:
    """The version of torch in this environment, build included, or None."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> bool:
    """Whether `pip install ARGUMENTS` succeeded."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    quiet = subprocess.DEVNULL if "--dry-run" in arguments else None
    return subprocess.run(command, check=False, stdout=quiet, stderr=quiet).returncode == 0


def main() -> int:
    """Install, or say in one line why not."""
    version, build = sys.argv[1:3]
    if build not in BUILDS:
        print(f"TORCH_INDEX={build}: choose one of {', '.join(BUILDS)}", file=sys.stderr)
        return 2
    wanted = version if platform.system() == "Darwin" else f"{version}+{build}"
    if installed() == wanted:
        return 0
    print(f"Installing torch {wanted} ...", flush=True)
    requirement = f"torch=={wanted}"
    known = pip("-qqq", "--no-deps", "--dry-run", requirement)
    sources = [] if known else ["--index-url", INDEX + build, "--extra-index-url", PYPI]
    if pip(requirement, *sources):
        return 0
    print(
        f"torch {wanted} could not be installed. Change: check the network, or choose another "
        f"build with make install TORCH_INDEX={'|'.join(BUILDS)}.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
