"""Out of memory, by whichever library says it, and how to free what the failed step holds."""

from __future__ import annotations

import contextlib
import gc
import re
import traceback

import torch

# What allocators and libraries say when memory is out: torch on both devices, the CUDA runtime and
# driver, Triton, cuBLAS, cuDNN, cuSOLVER, cuSPARSE, NCCL.
_SAID = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cudaErrorMemoryAllocation"
    r"|_STATUS_ALLOC_FAILED|Failed to CUDA (?:m|c)alloc",
    re.IGNORECASE,
)
# A handle of cuBLAS or cuDNN cannot be made then, nor with another cuDNN or after a failed kernel.
_PERHAPS = re.compile(
    r"unhandled cuda error|unhandled system error"
    r"|(?:CUBLAS|CUDNN)_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR)"
)
FULL = 0.03  # of a GPU's memory that is free: what says no reason is taken for want of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, means that memory is out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(cause)
        if isinstance(cause, RuntimeError) and _SAID.search(text):
            return True
        if isinstance(cause, RuntimeError) and _PERHAPS.search(text) and _full():
            return True
        cause = cause.__cause__
    return False


def _full() -> bool:
    """Whether this process's GPU has next to nothing free."""
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return free < FULL * total
    return False


def release(error: BaseException, model: torch.nn.Module) -> None:
    """Free the tensors of the step that ended in `error`: saving its predecessor needs some room.

    Activations hang on the frames of the traceback, gradients on the parameters.
    """
    traceback.clear_frames(error.__traceback__)
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
