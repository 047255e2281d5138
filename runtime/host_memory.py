"""Freed host memory is kept for the next allocation, as CUDA's caching allocator does for the GPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to return big freed blocks to the kernel; False where there is no glibc.

    Otherwise every large tensor is mapped, page-faulted and unmapped again, which can cost more than the arithmetic
    on it. Measurements on a CPU and its calibration both call this first, so that they time the same machine.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
