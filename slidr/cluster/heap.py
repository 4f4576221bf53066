"""The C library's heap of a process that does one thing over and over."""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_... of glibc's malloc.h


@functools.cache
def keep_heap() -> bool:
    """From now on this process keeps the memory it frees, for its next image; whether the C library does so.

    glibc gives large arrays back and asks for them again, and the kernel clears every page anew: a tenth of the time
    of a superpixel map (docs/performance.md), and what two processes hinder each other by. Peak memory stays as it is.
    Only for processes of our own; other C libraries than glibc are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    largest = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25)  # older ones take no more
    return bool(largest and mallopt(_TRIM_THRESHOLD, 1 << 30))
