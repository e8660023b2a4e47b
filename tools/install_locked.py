"""Install what is locked, every archive by its hash: `install_locked.py [EXTRA,GROUP,...]`.

Into the environment that runs this: the dependencies of pyproject.toml, those of the extras and
dependency groups named, and what they need, each in the version of constraints.txt and with one of
the hashes there. pip itself goes first: versions before the locked one know no hashes in a file of
constraints. Nothing but Python is needed, and any index or mirror that pip is configured for will
do, since a hash is the same wherever a file comes from. torch: see install_torch.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"


def requirements(names: Sequence[str]) -> list[str]:
    """What pyproject.toml asks for: always, and for these extras and dependency groups.

    Raises KeyError for a name that is neither.
    """
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = told["project"]["optional-dependencies"] | told["dependency-groups"]
    return [*told["project"]["dependencies"], *(each for name in names for each in parts[name])]


def locked(text: str) -> dict[str, str]:
    """The entries of a lock by lower-case name: version, marker and hashes, as pip reads them."""
    entries = re.findall(r"^([\w.-]+)(==[^\\\n]*(?:\\\n[^\\\n]*)*)", text, re.M)
    found: dict[str, str] = {}
    for name, rest in entries:  # a second entry is for another Python
        found[name.lower()] = f"{found.get(name.lower(), '')}{name}{rest}\n"
    return found


def pip(*arguments: str, asked: str, lock: Path | None = None) -> int:
    """`pip install` of the requirements `asked`, a line each; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text(asked, encoding="utf-8")
        told = ["--require-hashes", "-r", str(file), *(["-c", str(lock)] if lock else [])]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *told, *arguments]
        return subprocess.run(command, check=False).returncode


def own_pip() -> int:
    """Install the locked pip; 0 where it is there."""
    own = locked(LOCK.read_text(encoding="utf-8"))["pip"]
    return 0 if f"pip=={importlib.metadata.version('pip')} " in own else pip(asked=own)


def main(arguments: Sequence[str]) -> int:
    """pip's exit code, which is not 0 if any archive has another hash."""
    names = [name for argument in arguments for name in argument.split(",") if name]
    try:
        asked = "\n".join(requirements(names))
    except KeyError as error:
        print(f"pyproject.toml has no extra and no group {error}", file=sys.stderr)
        return 2
    return own_pip() or pip(asked=asked, lock=LOCK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
