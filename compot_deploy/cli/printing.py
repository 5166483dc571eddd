"""Streams that never fail: whoever reads has gone, or cannot show a character, and the verdict stays what it is."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from typing import Any


class Forgiving:
    """A text stream to print on; see `rich.console.Console`, which wants one.

    What the stream's encoding does not have is shown as a question mark. When it is closed, or its pipe is, or its
    disk is full, what is written to it is lost: there is nobody to tell.

    Args:
        stream: to write to; None, as Python has it for a descriptor that was closed before it began, takes nothing.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        """Of the stream; where it has none that is known, the least of them."""
        try:
            return codecs.lookup(self._stream.encoding).name
        except (AttributeError, TypeError, LookupError):
            return "ascii"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Of the stream, where it has one.

        Raises:
            OSError: it has none.
        """
        if self._stream is None:
            raise OSError("There is no stream.")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write what can be written."""
        if self._stream is not None:
            try:
                self._stream.write(self._shown(text))
            except (OSError, ValueError):
                self._lose()
        return len(text)

    def flush(self) -> None:
        """Hand over what was written."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._lose()

    def _shown(self, text: str) -> str:
        return text.encode(self.encoding, "replace").decode(self.encoding, "replace")

    def _lose(self) -> None:
        """Nothing more goes there, and Python, which flushes when it ends, has nothing to complain about."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def forgive_characters() -> None:
    """Let this process's own streams replace what they cannot show, for those that print by themselves: argparse."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(OSError, ValueError):
                reconfigure(errors="replace")


def settle() -> None:
    """Flush this process's own streams while a failure can still be taken."""
    for stream in (sys.stdout, sys.stderr):
        Forgiving(stream).flush()
