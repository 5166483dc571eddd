"""Which windows are learned from and which decide; and which of them every step reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from compot_deploy.models.ending import ends_with_head
from compot_deploy.models.sites import WHOLE
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import TOKENS_PER_BATCH, Batch, Window
from compot_deploy.models.tokens import TokenWindows

FEWEST: Final = 16
"""Windows that healing needs: half as many again would decide on chance."""

_HELD_OUT: Final = 16
"""One window of so many is held out, of models that read whole texts one of half as many; never less than four."""

_FEWEST_HELD_OUT: Final = 4

TOKENS_PER_STEP: Final = 1024
"""Tokens that the gradient of one step is of, at least."""

_LOGITS: Final = 2**24
"""Outputs of a batch, at most, where one window has less and a model does not end with its head: 64 MB in float32, of
which a step holds some five."""


@dataclass(frozen=True)
class Texts:
    """Windows as a model reads them, those that are learned from first.

    Attributes:
        batches: all of them.
        windows: numbers of the windows of each batch, in the calibration text.
        learned: how many of the batches are learned from; the others are held out.
        before_head: whether models are compared by what their heads read, since they end with them.
    """

    batches: Sequence[Batch]
    windows: Sequence[tuple[int, ...]]
    learned: int
    before_head: bool

    @property
    def held_out(self) -> range:
        """Numbers of the batches that decide."""
        return range(self.learned, len(self.batches))

    @property
    def tokens(self) -> int:
        """Tokens that are learned from."""
        return sum(tokens_of(batch) for batch in self.batches[: self.learned])


def objection(source: ModelSource, windows: TokenWindows | None = None) -> str | None:
    """Why a model cannot be healed, or, given text, why that does not suffice; None where nothing is in the way."""
    if source.task.has_towers:
        return f"a {source.task.noun} is not healed, only models of one tower are"
    if source.layout.blocks == (WHOLE,):
        return "the model has no repeated blocks that gradients could be followed through"
    if any(site.index is not None for site in source.layout.sites):
        return "experts that lie in one parameter are not healed"
    if windows is not None and len(windows.windows) < FEWEST:
        return (
            f"healing needs {FEWEST} windows of calibration text, to learn from and to decide, and there are "
            f"{len(windows.windows)}"
        )
    return None


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch that are text."""
    return int(batch.real.sum())


def split_texts(source: ModelSource, windows: Sequence[Window]) -> Texts:
    """Hold out every sixteenth window or so, wherever in the text they come from."""
    every = _HELD_OUT // 2 if source.task.pools else _HELD_OUT
    count = max(_FEWEST_HELD_OUT, len(windows) // every)
    chosen = {len(windows) * (2 * number + 1) // (2 * count) for number in range(count)}
    numbers, before_head = range(len(windows)), ends_with_head(source)
    most = TOKENS_PER_BATCH
    if source.task.kind in ("generation", "masked") and not before_head:
        most = min(most, max(1, _LOGITS // source.vocabulary))
    learned = _batches(source, windows, [number for number in numbers if number not in chosen], most)
    held_out = _batches(source, windows, [number for number in numbers if number in chosen], most)
    both = [*learned, *held_out]
    return Texts([batch for batch, _ in both], [own for _, own in both], len(learned), before_head)


def _batches(
    source: ModelSource, windows: Sequence[Window], numbers: Sequence[int], most: int
) -> list[tuple[Batch, tuple[int, ...]]]:
    """Batches of at most so many tokens, where one window has less, and their windows."""
    task = source.task
    found: list[tuple[Batch, tuple[int, ...]]] = []
    rows: list[int] = []

    def close() -> None:
        for batch in task.batches([windows[number] for number in rows]):
            own = tuple(rows[: len(batch.real)])
            del rows[: len(batch.real)]
            found.append((batch, own))

    # Windows of like lengths together: padding takes as long as text.
    for number in sorted(numbers, key=lambda number: len(windows[number])):
        longest = max(len(windows[one]) for one in (*rows, number))
        if rows and longest * (len(rows) + 1) > most:
            close()
        rows.append(number)
    close()
    return found


def schedule(texts: Texts, seed: int) -> Iterator[list[int]]:
    """Numbers of the batches of every step, for as many steps as are asked for: all of them once, then all again."""
    tokens = [tokens_of(batch) for batch in texts.batches[: texts.learned]]
    generator = torch.Generator().manual_seed(seed)
    step: list[int] = []
    while True:
        for number in torch.randperm(len(tokens), generator=generator).tolist():
            step.append(number)
            if sum(tokens[one] for one in step) >= TOKENS_PER_STEP:
                yield step
                step = []
