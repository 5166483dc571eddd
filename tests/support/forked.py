"""The command line in a forked process: everything is imported, and what the process does to itself stays there."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from compot_deploy.cli import main


def start(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Fork a run of the command line.

    Args:
        arguments: of the command.
        prepare: called in the new process first.

    Returns:
        Its process id, which is also that of its group, and a descriptor to read what it prints from.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    code = 70
    try:
        os.setsid()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", closefd=False) for number in (1, 2)
        )  # not a test's own
        prepare()
        code = main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def finish(process: int, reading: int) -> tuple[int, str]:
    """Read until it ends; its exit code, negative for a signal, and what it printed."""
    with os.fdopen(reading, "r", errors="replace") as file:
        printed = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), printed
