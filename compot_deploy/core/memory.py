"""Memory that is given back when it is freed.

glibc keeps freed memory for the next request of its thread: a heap for each of many threads, and in each of them, once
large blocks have been freed, room for all that is smaller than 32 MB. Small results that outlive the large tensors
between them then leave gigabytes in pieces. One heap, and blocks of their own from a megabyte up, keep a process as
large as what it holds; what it costs are page faults, a few per cent of the time.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Final

_ARENA_MAX: Final = -8
_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 2**20


def give_back_freed_memory() -> None:
    """Tell the C library of this process; does nothing where it is another one than glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
