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
