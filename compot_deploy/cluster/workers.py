"""Who computes the results of many inputs: this process, one after the other, or others beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, TypeVar, runtime_checkable

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Workers(Protocol):
    """Computes results of inputs that know nothing of each other."""

    @property
    def alone(self) -> bool:
        """Whether all of it is computed in this process, one input after the other."""
        ...

    def map(
        self, function: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Result]:
        """Results in the order of the inputs.

        Args:
            function: of a module, so that others find it by its name; its results depend on its arguments alone.
            shared: its first argument, the same for all; it is sent once.
            items: its second argument, one after the other; an input is not made before somebody is about to need it.

        Raises:
            Exception: whatever the function raises.
        """
        ...


class Alone:
    """This process, one input after the other: one input and one result in memory."""

    @property
    def alone(self) -> bool:
        """Yes."""
        return True

    def map(
        self, function: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Result]:
        """See `Workers.map`."""
        for item in items:
            result = [function(shared, item)]
            del item  # the next one is made when this one is gone
            yield result.pop()


ALONE: Final = Alone()
"""What there is without a cluster."""
