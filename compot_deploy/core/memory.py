"""Memory that is given back when it is freed.

glibc keeps freed memory for the next request of its thread: a heap for each of many threads, and in each of them, once
large blocks have been freed, room for all that is smaller than 32 MB. Small results that outlive the large tensors
between them then leave gigabytes in pieces. One heap, and blocks of their own from a megabyte up, keep a process as
large as what it holds. What it costs are page faults: the end of the heap is kept for the next request, so that only
large blocks have them.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Final

COMPARED_AT_ONCE: Final = 2**17
"""Logits that are compared at a time: a megabyte in float64, which stays in the cache of a processor, and for which the
system is not asked for memory: that would take longer than the comparison."""

_ARENA_MAX: Final = -8
_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD: Final = -1
_LARGE: Final = 2**20
_KEPT: Final = 2**26


def give_back_freed_memory() -> None:
    """Tell the C library of this process; does nothing where it is another one than glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
