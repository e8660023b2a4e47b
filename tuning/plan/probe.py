"""Ask NVIDIA's driver about the GPUs of this machine; prints the answer as a line of JSON.

A script of its own, with nothing but the standard library: a driver may hang or crash, and CUDA
keeps what it was started with. It asks libcuda, as torch does, so that it sees what torch will see:
the GPUs that CUDA_VISIBLE_DEVICES shows, in CUDA's order, and of a MIG slice its own memory. NVML
knows the driver's version, and the free memory without a context; where it does not answer (no
permission in a MIG container) CUDA itself is asked.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import uuid
from ctypes import byref, c_char_p, c_int, c_size_t, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

# Errors of CUDA; the first stands for a libcuda that is not there.
MISSING, OUT_OF_MEMORY, NO_DEVICE = -1, 2, 100
# CUdevice_attribute of cuda.h
MAJOR, MINOR, INTEGRATED, VIRTUAL_MEMORY, COMPUTE_MODE = 75, 76, 18, 102, 20
# What a process has to read and write; each is there once its part of the driver is loaded.
NODES = ("nvidiactl", "nvidia-uvm", "nvidia[0-9]*")
# On WSL and on Jetson boards the driver says that segments of memory can grow, and mapping fails.
NO_SEGMENTS = ("/dev/dxg", "/etc/nv_tegra_release")
# Where drivers are mounted that the loader does not find by itself: GKE, WSL.
PLACES = ("/usr/local/nvidia/lib64", "/usr/lib/wsl/lib")


class CudaError(Exception):
    """A call of libcuda failed, with this code."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, text
        super().__init__(f"{code}: {text}")


class Cuda:
    """libcuda. Raises OSError if it cannot be loaded, CudaError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> None:
        """Call the function `name`."""
        if code := getattr(self._library, name)(*arguments):
            text = c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise CudaError(code, (text.value or b"unknown error").decode(errors="replace"))

    def number(self, name: str, *arguments: Any) -> int:
        """The integer that the function `name` returns by its first argument."""
        value = c_int()
        self.call(name, byref(value), *arguments)
        return value.value

    def attribute(self, number: int, device: int) -> int:
        """An attribute of a device; 0 where an older driver does not know it."""
        try:
            return self.number("cuDeviceGetAttribute", number, device)
        except CudaError:
            return 0

    def identity(self, device: int) -> str:
        """The UUID of a GPU, or of a MIG slice if the driver knows CUDA 11.4."""
        raw = (ctypes.c_ubyte * 16)()
        newer = hasattr(self._library, "cuDeviceGetUuid_v2")
        self.call("cuDeviceGetUuid_v2" if newer else "cuDeviceGetUuid", raw, device)
        return str(uuid.UUID(bytes=bytes(raw)))

    def free(self, device: int) -> int:
        """Free bytes inside a context. Raises CudaError where there can be none."""
        context, free, total = c_void_p(), c_size_t(), c_size_t()
        try:
            self.call("cuDevicePrimaryCtxRetain", byref(context), device)
            self.call("cuCtxSetCurrent", context)
            self.call("cuMemGetInfo_v2", byref(free), byref(total))
        except CudaError as error:
            if error.code == OUT_OF_MEMORY:
                return 0
            raise
        return free.value


class Nvml:
    """NVML, as far as it answers."""

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL("libnvidia-ml.so.1")
            if self._library.nvmlInit_v2():
                self._library = None
        except OSError:
            self._library = None

    def version(self) -> str:
        """The driver's version, or ""."""
        text = ctypes.create_string_buffer(96)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(text, 96):
            return ""
        return text.value.decode(errors="replace")

    def free(self, identity: str) -> int | None:
        """Free bytes of the GPU or MIG slice of this UUID; None if NVML does not say."""
        handle, sizes = c_void_p(), (c_ulonglong * 3)()  # total, free, used
        for kind in ("MIG", "GPU") if self._library is not None else ():
            name = f"{kind}-{identity}".encode()
            if self._library.nvmlDeviceGetHandleByUUID(name, byref(handle)):
                continue
            if not self._library.nvmlDeviceGetMemoryInfo(handle, byref(sizes)):
                return int(sizes[1])
        return None


def ask() -> dict[str, Any]:
    """The GPUs that CUDA sees, or the error that it answers."""
    answer: dict[str, Any] = {"devices": [], "driver": "", "cuda": None, "error": None}
    answer["nodes"] = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    answer["denied"] = denied()
    nvml = Nvml()
    answer["driver"] = nvml.version()
    try:
        cuda = Cuda()
        cuda.call("cuInit", 0)
        version = cuda.number("cuDriverGetVersion")
        answer["cuda"] = [version // 1000, version % 1000 // 10]
        numbers = range(cuda.number("cuDeviceGetCount"))
        devices = [cuda.number("cuDeviceGet", number) for number in numbers]
        answer["devices"] = [_describe(cuda, nvml, device) for device in devices]
    except OSError as error:
        elsewhere = [place for place in PLACES if Path(place, "libcuda.so.1").exists()]
        answer["error"] = [MISSING, str(error)]
        answer["elsewhere"] = elsewhere[0] if elsewhere else None
    except CudaError as error:
        answer["error"] = [error.code, error.text]
    return answer


def denied(folder: str = "/dev") -> list[str]:
    """The driver's devices that this user may not open."""
    paths = (path for name in NODES for path in sorted(Path(folder).glob(name)))
    return [str(path) for path in paths if not os.access(path, os.R_OK | os.W_OK)]


def segments_grow(cuda: Cuda, device: int, exceptions: tuple[str, ...] = NO_SEGMENTS) -> bool:
    """Whether segments of GPU memory can grow (CUDA's virtual memory management)."""
    known = any(Path(path).exists() for path in exceptions)
    return bool(cuda.attribute(VIRTUAL_MEMORY, device)) and not known


def _describe(cuda: Cuda, nvml: Nvml, device: int) -> dict[str, Any]:
    name, total = ctypes.create_string_buffer(256), c_size_t()
    cuda.call("cuDeviceGetName", name, 256, device)
    cuda.call("cuDeviceTotalMem_v2", byref(total), device)
    integrated = bool(cuda.attribute(INTEGRATED, device))
    free = None if integrated else nvml.free(cuda.identity(device))
    if not integrated and (free is None or cuda.attribute(COMPUTE_MODE, device)):
        try:  # a card may be for one process, or for none
            inside = cuda.free(device)
        except CudaError as error:
            shown = name.value.decode(errors="replace")
            raise CudaError(error.code, f"{error.text}: {shown}") from None
        free = inside if free is None else free
    return {
        "name": name.value.decode(errors="replace"),
        "capability": [
            cuda.number("cuDeviceGetAttribute", part, device) for part in (MAJOR, MINOR)
        ],
        "total": total.value,
        "free": free,  # None: not known, or the memory is the machine's
        "integrated": integrated,
        "virtual_memory": segments_grow(cuda, device),
    }


if __name__ == "__main__":
    json.dump(ask(), sys.stdout)
