"""Memory that the process keeps once it is freed, so that no time depends on where its heap happens to end."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, by its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed until the process ends; returns whether it does (glibc only).

    Otherwise blocks of 32 MiB and more go back to the system when they are freed, unless they lay in a hole of the
    heap, and the system clears the pages of the next one. The weight gradient of an `nn.Linear(4096, 4096)` takes up to
    ten times as long then, by luck. Process-wide and for good: for programs that do nothing but measure.

    See mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
