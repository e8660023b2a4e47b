"""A stand-in for NVIDIA's driver: real shared libraries that answer what a machine answered."""

import atexit
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_driver.c")
NOT_SUPPORTED, NO_PERMISSION = -3, -4  # of NVML, in place of free memory


@dataclass(frozen=True)
class Card:
    """A GPU, or a MIG slice, as CUDA and NVML see it; sizes in MiB."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int | None = None  # None: all of it
    inside: int = 0  # free in a CUDA context; negative: the error of making one
    integrated: bool = False
    virtual_memory: bool = True
    uuid: str = ""
    mode: int = 0  # 2: for no process, 3: for one


@dataclass(frozen=True)
class Machine:
    """The answers of a machine's driver."""

    driver: str
    cuda: int
    cards: tuple[Card, ...]
    error: int = 0  # that cuInit returns
    nvml: int = 0  # that nvmlInit returns

    def text(self) -> str:
        """What `fake_driver.c` reads."""
        lines = [f"driver|{self.driver or None}|{self.cuda}|{self.error}|{self.nvml}"]
        for number, card in enumerate(self.cards):
            uuid = card.uuid or f"GPU-91a535d7-4157-249a-65e5-{number:012x}"
            free = card.total if card.free is None else card.free
            values = (*card.capability, card.total, free, card.inside)
            flags = (int(card.integrated), int(card.virtual_memory), card.mode)
            lines.append("|".join(map(str, ("gpu", card.name, uuid, *values, *flags))))
        return "\n".join(lines) + "\n"


@functools.cache
def libraries() -> Path:
    """The folder of libcuda.so.1 and libnvidia-ml.so.1, built once."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the stand-in for NVIDIA's driver cannot be built")
    folder = Path(tempfile.mkdtemp(prefix="fake-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(built), str(SOURCE)]
    subprocess.run(command, check=True)
    (folder / "libnvidia-ml.so.1").symlink_to(built)
    return folder


def install(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children started from here find the driver of `machine`."""
    answers = folder / "driver.txt"
    answers.write_text(machine.text())
    monkeypatch.setenv("FAKE_DRIVER", str(answers))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries()))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
