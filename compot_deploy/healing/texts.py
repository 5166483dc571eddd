"""Which windows are learned from and which decide; and which of them every step reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

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
"""Outputs of a batch, at most, where one window has less: 64 MB in float32, of which a step holds some five."""


@dataclass(frozen=True)
class Texts:
    """Windows as a model reads them, those that are learned from first.

    Attributes:
        batches: all of them.
        learned: how many of the batches are learned from; the others are held out.
    """

    batches: Sequence[Batch]
    learned: int

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
    if source.task.listens:
        return f"a {source.task.noun} is not healed, only models that read text are"
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
    parts = [
        [window for number, window in enumerate(windows) if (number in chosen) == held]
        for held in (False, True)
    ]
    learned, held_out = (_batches(source, part) for part in parts)
    return Texts([*learned, *held_out], len(learned))


def _batches(source: ModelSource, windows: Sequence[Window]) -> list[Batch]:
    """Batches of few enough tokens that what a model says to one fits into memory several times."""
    task = source.task
    most = TOKENS_PER_BATCH
    if task.kind in ("generation", "masked"):
        most = min(most, max(1, _LOGITS // source.vocabulary))
    found: list[Batch] = []
    rows: list[Window] = []
    for window in windows:
        longest = max(len(window), *(len(row) for row in rows), 0)
        if rows and longest * (len(rows) + 1) > most:
            found += task.batches(rows)
            rows = []
        rows.append(window)
    return [*found, *task.batches(rows)]


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
