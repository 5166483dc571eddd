"""Memory of the process: what is freed is used again at once, and given back where a stage ends.

A page that the system hands out costs several microseconds the first time it is touched, so tensors of a few megabytes
that come and go are kept in the heap: without that a third of a forward pass is spent in the system. In return the
heaps of glibc, one for each of many threads, keep what was freed between blocks that are still there. So the command
line has one heap, and where something large has ended (a model, a stage) all free pages of it are given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import Any, Final

COMPARED_AT_ONCE: Final = 2**17
"""Logits that are compared at a time: a megabyte in float64, which stays in the cache of a processor."""

_ARENA_MAX: Final = -8
_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD: Final = -1

_LARGE: Final = 2**25
"""Bytes from which on a block is not of the heap; glibc takes no more."""

_KEPT: Final = 2**28
"""Free bytes at the end of the heap that are kept for the next request."""


def use_one_heap() -> None:
    """Tell the C library of this process, as the command line does; nothing where it is another one than glibc."""
    library = _glibc()
    if library is not None:
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def give_back_freed_memory() -> None:
    """Give all free pages back to the system, those in the middle of a heap too; nothing without glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def free_memory(system: Path = Path("/")) -> int | None:
    """Bytes that this process may still take before the system ends it; None where the system does not say.

    That is what Linux calls available, swap included, and no more than a container or ``ulimit`` allows.

    Args:
        system: folder that holds ``proc`` and ``sys``.
    """
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found = [1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ``max``, where nothing is limited
            found.append(int((system / "sys/fs/cgroup" / name).read_text()))
    import resource  # of Unix, and here is Linux

    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        limit = resource.getrlimit(kind)[0]
        found += [] if limit == resource.RLIM_INFINITY else [limit]
    return min(found)


@cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
