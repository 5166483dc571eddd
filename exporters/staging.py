"""A folder that appears whole or not at all.

Files are written into a hidden sibling of the target and moved there by one rename. Whatever stops the run (an
error, Ctrl-C, a full disk), the target is as it was before.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from compot_deploy.errors import InputError
from compot_deploy.exporters.manifest import MANIFEST

_LONGEST_NAME: Final = 200
"""Bytes of a name; file systems take 255, and what is not complete is called ``.NAME.staging-`` and more."""

_DISK_ERRORS: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would grow beyond the largest size allowed here",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the path is too long",
}


def check_target(target: Path, force: bool) -> None:
    """Refuse a target folder that may not be written, before any work is done for it.

    Raises:
        InputError: it exists and `force` is not given; or it exists, `force` is given, and it is neither an
            artifact of this package nor an empty folder; or it is not a folder, or its name is too long.
    """
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_NAME or "\0" in str(target):
        raise InputError(
            f"{os.fsdecode(name[:40])}…: a name of {len(name)} bytes is too long for an output, which stands under a "
            f"longer one until it is complete: give an --out of at most {_LONGEST_NAME}."
        )
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} exists and is not a folder: choose another name for the output.")
    if not force:
        raise InputError(f"{target} exists already: choose another folder, or use --force to replace it.")
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise InputError(
            f"{target} has no {MANIFEST}, so compot-deploy did not write it, and --force does not remove it: "
            "choose another folder, or remove this one yourself."
        )


@contextmanager
def staged_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well and vanishes when it does not.

    The staging folder is a hidden sibling of the target, so the last step is one rename on one file system;
    before it, every file is flushed to the disk. With `force`, an artifact that stands at the target is moved
    aside, and removed only after the new one has taken its place.

    Args:
        target: the folder to make. Missing parents are made, and removed again on failure.
        force: replace an artifact of ours; a folder of anyone else's is never removed.

    Yields:
        The empty staging folder.

    Raises:
        InputError: see `check_target`; or the disk is full or may not be written. Nothing is left behind.
    """
    target = Path(os.path.realpath(target))
    check_target(target, force)
    made = [parent for parent in target.parents if not parent.exists()]
    staging = target.parent / f".{target.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        with disk_errors(target):
            staging.mkdir(parents=True)
            yield staging
            _flush(staging)
            _publish(staging, target, force)
    except BaseException:
        _remove(staging)
        with suppress(OSError):  # somebody else may have put something there
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence; leave every other error alone."""
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0)
        # numpy's tofile reports a short write without an error number.
        if reason is None and error.errno is None and "written" in str(error):
            reason = _DISK_ERRORS[errno.ENOSPC]
        if reason is None:
            raise
        place = next((p for p in target.parents if p.exists()), target.parent)
        free = shutil.disk_usage(place).free
        raise InputError(
            f"{target} could not be written: {reason} ({free:,} bytes are free there). "
            "Nothing was left behind; choose another folder, or make room, and run again."
        ) from error


def _flush(folder: Path) -> None:
    """Hand every file and directory entry below `folder` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _flush_entries(path)
    _flush_entries(folder)


def _flush_entries(folder: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staging: Path, target: Path, force: bool) -> None:
    """Put `staging` in the place of `target`; the old folder is removed only after that."""
    check_target(target, force)  # someone may have made it meanwhile
    aside: Path | None = None
    if target.exists():
        aside = target.parent / f".{target.name}.replaced-{uuid.uuid4().hex[:8]}"
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    _flush_entries(target.parent)
    if aside is not None:
        _remove(aside)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
