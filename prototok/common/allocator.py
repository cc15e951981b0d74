"""Keep freed memory in the process: glibc's allocator, tuned for training-like loops on the CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # <malloc.h>
_KEEP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Raise glibc's mmap and trim thresholds for this process; return True if that worked.

    By default every tensor above 128 KiB – 32 MiB is mapped afresh and given back when freed, so
    each step of a fit pays page faults for all of its activations; that can cost more than the
    arithmetic. Nothing happens on systems without glibc. There is no way back within a process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    took = [
        mallopt(_M_MMAP_MAX, 0),
        mallopt(_M_TRIM_THRESHOLD, _KEEP),
        mallopt(_M_TOP_PAD, 1 << 26),
    ]
    return all(took)
