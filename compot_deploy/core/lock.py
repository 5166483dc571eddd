"""One writer at a time: a lock beside what is written. The system releases it when the process ends, however it ends.

The lock is on an open file (``flock``), not on its being there: a file that a killed run left behind locks nothing.
Where a file system has no locks (some network shares) a run goes on without.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from compot_deploy.errors import InputError

_NO_LOCKS: Final = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))
_BUSY: Final = frozenset((errno.EAGAIN, errno.EACCES, errno.EDEADLK))
_FAR: Final = 1 << 30
"""Windows locks bytes, and nobody else may read these: one behind the end leaves the text readable."""


def lock_path(target: Path) -> Path:
    """Where the lock of an output lies: beside it."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def locked(targets: Iterable[Path]) -> Iterator[None]:
    """Be the only run that writes these outputs, or any folder that they lie in.

    Args:
        targets: files or folders, which need not exist; missing parents are made, and removed again where they stay
            empty.

    Raises:
        InputError: another run writes one of them, or a folder around it.
    """
    paths = sorted({Path(os.path.realpath(target)) for target in targets})
    with ExitStack() as held:
        for path in paths:
            for around in path.parents:
                if around not in paths and around.name and _is_locked(lock_path(around)):
                    raise _refusal(around)
            made = [parent for parent in path.parents if not parent.exists()]
            held.callback(_remove_empty, made)
            lock_path(path).parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_held(path))
        yield


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Mark a folder as one that a living process writes, see `is_written`; the mark moves with the folder."""
    descriptor = _open_folder(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_written(path: Path) -> bool:
    """Whether a living process holds a file or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False  # Windows opens no folders: whoever asks holds the lock of the target anyway
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _held(target: Path) -> Iterator[None]:
    path = lock_path(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(descriptor):
                raise _refusal(target)
            # Whoever held it before has removed it: what is locked is no longer what lies there.
            if _same(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if os.name == "nt":
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
        else:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _is_locked(path: Path) -> bool:
    return path.is_file() and is_written(path)


def _refusal(target: Path) -> InputError:
    try:
        who = lock_path(target).read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        who = ""
    return InputError(
        f"Another run writes {target} ({who or 'a process that did not say which'}): wait until it has ended, or "
        "choose another --out."
    )


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _open_folder(folder: Path) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    _lock(descriptor)
    return descriptor


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        """Lock an open file until it is closed; False where somebody else has."""
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        """Lock an open file until it is closed; False where somebody else has."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True
