"""What PyTorch raises when a GPU, its driver or its libraries fail, as errors of ours.

Such an error is no fault of the code that met it: the build of torch does not fit the machine, or
the card does not work, now or at all. Out of memory is another matter, and comes before
(`training.memory_errors`).
"""

from __future__ import annotations

import re

from tuning.errors import SpecError, TransientError, TuningError

# Words of torch's `_lazy_init` and of the checks behind it (c10/cuda, aten/src/ATen/cuda).
_START = re.compile(
    r"not compiled with CUDA enabled|Found no NVIDIA driver|NVIDIA driver on your system is too old"
    r"|compiled without CUDA support",
    re.IGNORECASE,
)
_KERNELS = re.compile(
    r"no kernel image is available|device kernel image is invalid"
    r"|PTX was compiled with an unsupported toolchain",
    re.IGNORECASE,
)
# Words of cudaGetErrorString, cuBLAS, cuDNN and NCCL. Not those of calls that are wrong themselves
# (invalid argument, device-side assert): these are bugs.
_FAILED = re.compile(
    r"No CUDA GPUs are available|CUDA unknown error|CUDA driver initialization failed"
    r"|error from cudaGetDeviceCount"
    r"|uncorrectable|unspecified launch failure|busy or unavailable|illegal memory access"
    r"|misaligned address|illegal instruction|hardware stack error|launch timed out"
    r"|GPU is lost|fallen off the bus|CUDA error: unknown error|system not yet initialized"
    r"|_STATUS_(?:NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)|NCCL error",
    re.IGNORECASE,
)
_RAISED = (RuntimeError, AssertionError)  # the second of a torch without CUDA


def known(error: BaseException) -> TuningError | None:
    """The error for what a GPU or its driver refused, else None: an error of another kind.

    Also for an error that was raised from such a one.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _RAISED) and (meaning := _meaning(str(cause))):
            return meaning
        cause = cause.__cause__
    return None


def _meaning(text: str) -> TuningError | None:
    line = next(filter(None, map(str.strip, text.splitlines())), "")[:200]
    if _START.search(text):
        return SpecError.at(
            "RUN-142",
            "GPU",
            f"torch {_version()} cannot start CUDA on this machine ({line})",
            "look at the driver with nvidia-smi; `python -m tuning plan` names the build of torch "
            "that runs on it",
        )
    if _KERNELS.search(text):
        what = f"torch {_version()} or a library of it has no kernels for this GPU ({line})"
        change = "install the build that docs/presets.md lists for it, or use another GPU"
        return SpecError.at("RUN-143", "GPU", what, change)
    if not _FAILED.search(text):
        return None
    what = f"the GPU, its driver or one of its libraries failed ({line})"
    change = (
        "look at nvidia-smi -q and dmesg (Xid) of that machine, then run the same command again, "
        "on another GPU if this one is damaged; it goes on from the last checkpoint. If it fails "
        "at the same step again, report it with the log"
    )
    return TransientError.at("RUN-144", "GPU", what, change)


def _version() -> str:
    import importlib.metadata  # slow, and needed only here

    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
