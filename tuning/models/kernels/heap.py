"""The heap of the process: memory of CPU tensors is reused, old objects are not collected.

glibc maps every large block afresh, so that each operator faults in its output page by page: half
the time of a small model's step. Kept memory is reused; the peak stays the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of glibc's mallopt
NEVER = 2**31 - 1  # bytes at the top of the heap that are given back


def keep() -> bool:
    """Let malloc keep what is freed, for the life of this process; whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl, macOS
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, NEVER))


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Exclude existing objects from garbage collection inside.

    Libraries and model are a million objects: a collection takes a quarter of a second.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
