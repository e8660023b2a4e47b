"""The build of torch that is installed, read without importing it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^(__version__|cuda)\b.*?= *(?:'([^']+)'|None)", re.M)


@dataclass(frozen=True)
class TorchBuild:
    """A version of torch with its build."""

    version: str  # "2.13.0+cu130"
    cuda: tuple[int, int] | None  # None: the build for processors

    @property
    def name(self) -> str:
        """As torch's package index calls it: "cu130", "cpu"."""
        return f"cu{self.cuda[0]}{self.cuda[1]}" if self.cuda else "cpu"


def how_to_install(build: str) -> str:
    """What to do for another build, on a machine and in a cluster."""
    return (
        f"install torch's {build} build (make install TORCH_INDEX={build}; in a cluster the "
        f"operator's option images.{build})"
    )


def installed() -> TorchBuild | None:
    """The build in this environment; None without torch.

    From torch/version.py: PyPI's wheels and vendors' do not say "+cu130" in their version.
    """
    try:
        found = importlib.util.find_spec("torch")
        text = Path(str(found and found.origin)).with_name("version.py").read_text("utf-8")
    except (OSError, ValueError):
        return None
    values = {match[1]: match[2] for match in _LINE.finditer(text)}
    if not values.get("__version__"):
        return None
    cuda = values.get("cuda")
    major, minor = (int(part) for part in cuda.split(".")[:2]) if cuda else (0, 0)
    return TorchBuild(values["__version__"], (major, minor) if cuda else None)
