"""How long work tells the outside how far it is; the command line draws it, tests ignore it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with the number of units done, the total, and what the units are part of."""

    def __call__(self, done: int, total: int, label: str) -> None:
        """Report that `done` of `total` units of `label` are finished; called with 0 when work starts."""
        ...


def silent(done: int, total: int, label: str) -> None:
    """A progress that tells nobody."""


class Ticker:
    """Counts the steps of a job whose number is known, for a progress callback.

    Args:
        total: how many steps there are.
        progress: told after every one of them.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, label: str) -> None:
        """One more step of `label` is done."""
        self._done += 1
        self._progress(self._done, self._total, label)
