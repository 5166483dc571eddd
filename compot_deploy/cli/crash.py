"""What nobody foresaw: one line for the terminal, everything else in a file that can be sent to us."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from compot_deploy import __version__
from compot_deploy.errors import first_line


def crash_sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """One line that says what happened, where the traceback is, and how to report it."""
    what = f"{type(error).__name__}: {' '.join(first_line(error).split())[:200]}"
    try:
        log = _write_log(error, arguments)
    except OSError as unwritten:
        return (
            f"stopped by an error that nobody foresaw ({what}), and its log cannot be written ({unwritten.strerror}). "
            "Set TMPDIR to a folder that can be written and run the same command again."
        )
    report = f"gh issue create --title {shlex.quote(what[:80])} --body-file {shlex.quote(str(log))}"
    return (
        f"stopped by an error that nobody foresaw ({what}). It is a fault of compot-deploy, and no verdict. The "
        f"traceback is in {log}, which names files of this machine; read it, and report it with: {report}"
    )


def _write_log(error: BaseException, arguments: Sequence[str]) -> Path:
    """A file of its own in the folder for temporary files, for its owner's eyes only."""
    from compot_deploy.exporters.artifact import library_versions  # loads torch

    descriptor, name = tempfile.mkstemp(prefix="compot-deploy-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"compot-deploy {__version__}, Python {sys.version.split()[0]}, {platform.platform()}\n")
        file.write(
            ", ".join(f"{library} {version}" for library, version in library_versions().items()) + "\n"
        )
        file.write(f"compot-deploy {shlex.join(arguments)}\n\n```\n")
        file.write("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        file.write("```\n")
    return Path(name)
