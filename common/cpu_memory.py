"""Memory of CPU training: freed blocks are kept instead of being given back to the kernel after every tensor."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc to serve large tensors from its heap and not to shrink it; returns whether that was possible.

    By default a block above some megabytes is mapped anew each time, and the kernel clears every page of it again: for
    elementwise operations that costs more than the arithmetic. Numbers are not touched.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
