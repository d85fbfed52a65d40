"""Memory that a step on a CPU frees stays with the process for the next one: glibc gives large blocks back to the
kernel, which zeroes every page again, a third of the time of a step at 224 px.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc reuse large blocks, for the rest of the process; whether that was done: it is glibc's, and whoever set
    ``MALLOC_`` variables or ``GLIBC_TUNABLES``, or preloads another allocator, has chosen.
    """
    if not sys.platform.startswith("linux") or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ
    ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    # -1: never give the heap's end back; 0 blocks by mmap: all come from the heap.
    return bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))
