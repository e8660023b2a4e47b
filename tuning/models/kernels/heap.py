"""Memory of tensors on a CPU: kept by the process instead of asked for and given back at each use.

glibc maps every large block afresh, so that each operator faults in its output page by page: half
the time of a small model's step. Kept memory is reused; the peak stays what it is.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of glibc's mallopt
NEVER = 2**31 - 1  # bytes at the top of the heap that are given back


def keep() -> bool:
    """Let malloc keep what is freed, for the life of this process; whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl, macOS
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, NEVER))
