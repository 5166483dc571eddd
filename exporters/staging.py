"""A folder that appears whole or not at all.

Files are written into a hidden sibling of the target and moved there by one rename. Whatever stops the run (an
error, Ctrl-C, a full disk), the target is as it was before.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from compot_deploy.core.disk import disk_errors, flush_entries
from compot_deploy.core.lock import folder_lock, is_written
from compot_deploy.errors import InputError
from compot_deploy.exporters.manifest import MANIFEST

_LONGEST_NAME: Final = 200
"""Bytes of a name; file systems take 255, and what is not complete is called ``.NAME.staging-`` and more."""


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
    staging = aside_of(target, "staging")
    try:
        with disk_errors(target):
            staging.mkdir(parents=True)
            with folder_lock(staging):
                yield staging
                _flush(staging)
                _publish(staging, target, force)
    except BaseException:
        _remove(staging)
        with suppress(OSError):  # somebody else may have put something there
            for parent in made:
                parent.rmdir()
        raise


def aside_of(target: Path, kind: str) -> Path:
    """A hidden name beside a target that nobody else has: of a folder or file on its way there, or out of it."""
    return target.parent / f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}"


def clear_leftovers(target: Path) -> None:
    """Remove what runs that were killed left beside a target; whoever calls it holds the target's lock.

    A folder that such a run had moved aside, and put nothing in its place, is put back. Names of ours alone are
    touched, links are not, and nothing that a living process writes.
    """
    target = Path(os.path.realpath(target))
    if not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(staging|replaced)-[0-9a-f]{{8}}")
    for path in sorted(target.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found is None or path.is_symlink() or is_written(path):
            continue
        with suppress(OSError):  # of another user, perhaps: it is in nobody's way
            if path.is_file():
                path.unlink()
            elif found[1] == "replaced" and not os.path.lexists(target):
                path.rename(target)
            else:
                _remove(path)


def _flush(folder: Path) -> None:
    """Hand every file and directory entry below `folder` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            flush_entries(path)
    flush_entries(folder)


def _publish(staging: Path, target: Path, force: bool) -> None:
    """Put `staging` in the place of `target`; the old folder is removed only after that."""
    check_target(target, force)  # someone may have made it meanwhile
    aside: Path | None = None
    if target.exists():
        aside = aside_of(target, "replaced")
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    flush_entries(target.parent)
    if aside is not None:
        rubbish = aside_of(target, "staging")  # half of it is never put back, see `clear_leftovers`
        aside.rename(rubbish)
        _remove(rubbish)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
