"""What a disk may refuse, said in one sentence; and how a file gets onto it for good.

A file is written under a temporary name, flushed, renamed, and then its folder is flushed: after a loss of power there
is the old file or the new one, whole. Without the first flush the name may survive and the data not; without the second
the data may survive and the name not.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

from safetensors import SafetensorError

from compot_deploy.errors import CompotDeployError, InputError

REFUSALS: Final = MappingProxyType(
    {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file would grow beyond the largest size allowed here",
        errno.EACCES: "writing is not permitted",
        errno.EPERM: "writing is not permitted",
        errno.EROFS: "the file system is read-only",
        errno.ENAMETOOLONG: "the path is too long",
        errno.EIO: "the disk does not answer as it should",
    }
)
"""What the user can mend, by the number of the error."""

FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
"""Of these, what only writing can meet; a file that may not be read is refused with the same number as one to write."""

NOTHING_LEFT: Final = "Nothing was left behind; choose another folder, or make room, and run again."


def refusal(error: BaseException, numbers: Collection[int] = REFUSALS.keys()) -> str | None:
    """What a disk refused, in words; None for an error of another kind.

    Args:
        error: of Python, or of a library in Rust, which tells the system's number in its text alone.
        numbers: of the system's errors that are meant.
    """
    number = error.errno if isinstance(error, OSError) else _number_of(error)
    if number is None and isinstance(error, OSError) and "written" in str(error):
        number = errno.ENOSPC  # numpy's tofile gives a short write no number
    return REFUSALS.get(number) if number is not None and number in numbers else None


@contextmanager
def disk_errors(
    target: Path, advice: str = NOTHING_LEFT, numbers: Collection[int] = REFUSALS.keys()
) -> Iterator[None]:
    """Turn what a disk refuses into one sentence; leave every other error alone.

    Args:
        target: what was to be written.
        advice: what to do next.
        numbers: of the system's errors that are meant.

    Raises:
        InputError: says what could not be written, why, and how much room there is.
    """
    try:
        yield
    except CompotDeployError:
        raise
    except Exception as error:
        reason = refusal(error, numbers)
        if reason is None:
            raise
        named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else None
        place = Path(named) if named is not None else target
        outside = "" if _inside(place, target.parent) else f" at {place}"
        free = shutil.disk_usage(_existing(place)).free
        raise InputError(
            f"{target} could not be written: {reason}{outside} ({free:,} bytes are free there). {advice}"
        ) from error


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turn the error of safetensors about the operating system into Python's own."""
    try:
        yield
    except SafetensorError as error:
        number = _number_of(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush a finished file and give it its name; what stood there is replaced."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_entries(path.parent)


def flush_entries(folder: Path) -> None:
    """Hand the names in a folder to the disk."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number_of(error: BaseException) -> int | None:
    found = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    return None if found is None else int(found[1] or found[2])


def _existing(path: Path) -> Path:
    return next((one for one in (path, *path.absolute().parents) if one.exists()), Path("/"))


def _inside(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())
