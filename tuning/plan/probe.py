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
import sys
import uuid
from ctypes import byref, c_char_p, c_int, c_size_t, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

# Errors of CUDA; the first stands for a libcuda that is not there.
MISSING, OUT_OF_MEMORY, NO_DEVICE = -1, 2, 100
# CUdevice_attribute of cuda.h
MAJOR, MINOR, INTEGRATED, VIRTUAL_MEMORY = 75, 76, 18, 102
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

    def flag(self, attribute: int, device: int) -> bool:
        """An attribute of a device; older drivers do not know each."""
        try:
            return bool(self.number("cuDeviceGetAttribute", attribute, device))
        except CudaError:
            return False

    def identity(self, device: int) -> str:
        """The UUID of a GPU, or of a MIG slice if the driver knows CUDA 11.4."""
        raw = (ctypes.c_ubyte * 16)()
        newer = hasattr(self._library, "cuDeviceGetUuid_v2")
        self.call("cuDeviceGetUuid_v2" if newer else "cuDeviceGetUuid", raw, device)
        return str(uuid.UUID(bytes=bytes(raw)))

    def free(self, device: int) -> int | None:
        """Free bytes inside a context; None where there can be none."""
        context, free, total = c_void_p(), c_size_t(), c_size_t()
        try:
            self.call("cuDevicePrimaryCtxRetain", byref(context), device)
            self.call("cuCtxSetCurrent", context)
            self.call("cuMemGetInfo_v2", byref(free), byref(total))
        except CudaError as error:
            return 0 if error.code == OUT_OF_MEMORY else None
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


def _describe(cuda: Cuda, nvml: Nvml, device: int) -> dict[str, Any]:
    name, total = ctypes.create_string_buffer(256), c_size_t()
    cuda.call("cuDeviceGetName", name, 256, device)
    cuda.call("cuDeviceTotalMem_v2", byref(total), device)
    integrated = cuda.flag(INTEGRATED, device)
    free = None if integrated else nvml.free(cuda.identity(device))
    if free is None and not integrated:
        free = cuda.free(device)
    # On WSL and on Jetson boards the driver says yes, and mapping fails.
    odd = Path("/dev/dxg").exists() or Path("/etc/nv_tegra_release").exists()
    return {
        "name": name.value.decode(errors="replace"),
        "capability": [
            cuda.number("cuDeviceGetAttribute", part, device) for part in (MAJOR, MINOR)
        ],
        "total": total.value,
        "free": free,  # None: not known, or the memory is the machine's
        "integrated": integrated,
        "virtual_memory": cuda.flag(VIRTUAL_MEMORY, device) and not odd,
    }


if __name__ == "__main__":
    json.dump(ask(), sys.stdout)
