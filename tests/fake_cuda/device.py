"""A CUDA device without a GPU, for the CPU build of torch: build it, load it, become it.

`library()` compiles device.cpp once for each torch into the cache. `install()` makes this process
one that has a card: `torch.cuda` answers for it, and tensors on "cuda" have real values, computed
by the CPU's kernels. It cannot be undone, so tests run it in a process of its own (worker.py).

Attention runs as the kernel that a GPU of the card's compute capability would choose, as one
operator, so that a fall to the kernel of all pairs ("math") is seen. What is not shown: speed,
kernels' rounding, streams, several devices.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuning-fake-cuda"
GIB = 1 << 30


class Unavailable(Exception):
    """There is no fake device here; says what to install."""


@dataclass(frozen=True)
class Card:
    """What the device claims to be."""

    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    memory_bytes: int = 16 * GIB


def library() -> Path:
    """The shared library for this torch and this source. Raises Unavailable."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    path = CACHE / f"torch-{version}-{key}.so"
    if path.exists():
        return path
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("the fake CUDA device needs a C++ compiler: apt-get install g++")
    if not version.endswith("+cpu"):
        raise Unavailable(f"torch {version} is no CPU build: use the GPU suite (make test-gpu)")
    root = _torch()
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    include = root / "include"
    command = [
        compiler, "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{include}",
        f"-I{include / 'torch/csrc/api/include'}", str(SOURCE), "-o", str(scratch),
        f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the fake CUDA device does not compile: {done.stderr[-2000:]}")
    scratch.replace(path)  # whole or not at all: two may build it at once
    return path


def _torch() -> Path:
    """The package's folder. It is not imported: the device must be there before."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


class Device:
    """The installed device; its card can be exchanged, and its memory limited."""

    def __init__(self, native: ctypes.CDLL) -> None:
        for name in ("fake_cuda_used", "fake_cuda_peak"):
            getattr(native, name).restype = ctypes.c_size_t
        native.fake_cuda_limit.argtypes = [ctypes.c_size_t]
        self._native, self.card = native, Card()

    def become(self, card: Card) -> None:
        """Be another card from now on."""
        self.card = card
        self.limit(1.0)

    def limit(self, share: float) -> None:
        """Let no more than this share of the card's memory be allocated."""
        self._native.fake_cuda_limit(int(self.card.memory_bytes * share))

    def used(self, *_: Any) -> int:
        """Bytes allocated now."""
        return int(self._native.fake_cuda_used())

    def peak(self, *_: Any) -> int:
        """Most bytes allocated at once."""
        return int(self._native.fake_cuda_peak())

    def reset_peak(self, *_: Any) -> None:
        """Forget the peak."""
        self._native.fake_cuda_reset_peak()


def install(card: Card | None = None) -> Device:
    """Give this process the device; torch must not be imported yet, for it would look for one."""
    assert "torch" not in sys.modules
    path = library()
    for name in ("libc10.so", "libtorch_cpu.so"):  # this environment's; others share the device
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    native = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    import bitsandbytes  # noqa: F401  # first: with a card it would load its CUDA library
    import torch

    device = Device(native)
    device.become(card or Card())
    _answer(torch.cuda, device)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    from fake_cuda import kernels

    kernels.install(device)
    return device


class _Entered:
    """`with torch.cuda.device(0):` and `with torch.cuda.stream(stream):`."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Entered:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Stream(_Entered):
    """A stream, on which everything has happened already; or an event of one."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: True


def _answer(cuda: Any, device: Device) -> None:
    """Let `torch.cuda` answer for `device`."""
    import torch

    nothing = {name: lambda *_, **__: None for name in _WITHOUT_ANSWER}
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: device.card.capability,
        "get_device_name": lambda *_: device.card.name,
        "get_device_properties": lambda *_: _properties(device.card),
        "is_bf16_supported": lambda *_, **__: device.card.capability >= (8, 0),
        "mem_get_info": lambda *_: (
            device.card.memory_bytes - device.used(),
            device.card.memory_bytes,
        ),
        "memory_allocated": device.used,
        "memory_reserved": device.used,
        "max_memory_allocated": device.peak,
        "max_memory_reserved": device.peak,
        "reset_peak_memory_stats": device.reset_peak,
        "set_per_process_memory_fraction": lambda share, *_: device.limit(share),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "device": _Entered,
        "stream": _Entered,
        "Stream": _Stream,
        "Event": _Stream,
    }
    for name, answer in (nothing | answers).items():
        setattr(cuda, name, answer)


_WITHOUT_ANSWER = (
    "_lazy_init", "init", "set_device", "synchronize", "empty_cache", "manual_seed",
    "manual_seed_all", "set_rng_state", "set_rng_state_all",
)  # fmt: skip


def _properties(card: Card) -> Any:
    major, minor = card.capability
    return types.SimpleNamespace(
        name=card.name, major=major, minor=minor, total_memory=card.memory_bytes,
        multi_processor_count=132, warp_size=32, is_integrated=False,
    )  # fmt: skip
