"""Single files that somebody named: a regular one appears whole, a device or a pipe is written to and still stands."""

from __future__ import annotations

import os
from pathlib import Path

from compot_deploy.errors import InputError


def check_output(path: Path, what: str) -> None:
    """Refuse a place that cannot be written, before any work is done for it.

    Args:
        path: where.
        what: it is, for messages.

    Raises:
        InputError: a folder, or a path below something that is none.
    """
    try:
        if path.is_dir():
            raise InputError(f"{what} cannot be written to {path}: it is a folder. Name a file.")
        if not path.parent.is_dir():
            raise InputError(
                f"{what} cannot be written to {path}: {path.parent} is no folder. Make it first."
            )
    except (OSError, ValueError) as error:
        raise InputError(f"{what} cannot be written to {path}: {error}.") from None


def write_output(path: Path, content: bytes, what: str) -> None:
    """Write a file under a temporary name and rename it; write into what is no regular file.

    Raises:
        InputError: it cannot be written; for a pipe that nobody reads, too.
    """
    check_output(path, what)
    try:
        if path.exists() and not path.is_file():
            # Without waiting: a pipe that nobody reads is refused by the system.
            descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            with os.fdopen(descriptor, "wb") as file:
                if hasattr(os, "set_blocking"):
                    os.set_blocking(descriptor, True)
                file.write(content)
            return
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{what} cannot be written to {path}: {error.strerror}.") from None
