"""One model after the other reads the same text, and is compared with those that read it before.

Only one model is in memory at a time. The logits of a model that later ones are compared with are kept on disk, in
float32 as they were given: the loss of a correct export is 1e-12 nats, which no shorter number holds. In memory they
exist for a few positions at a time; what is kept there is 49 bytes per position and pair.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import (
    Collected,
    Comparison,
    Figures,
    Positions,
    compare,
    concatenate,
    predict,
    summarize,
)
from compot_deploy.accuracy.runner import Runner
from compot_deploy.core.memory import COMPARED_AT_ONCE
from compot_deploy.core.spilled import Spilled
from compot_deploy.errors import InputError
from compot_deploy.progress import Ticker

LOGITS_AT_ONCE: Final = 2**24
"""Logits of one runner held at a time, 64 MiB in float32: bounds the chunk, whatever the vocabulary."""

NOISE_WINDOWS: Final = 2
NOISE_TOKENS: Final = 24
"""The numerical noise is measured on the first tokens of the first windows: read one at a time, they cost as much as
generating so many tokens."""


def batches_of(
    windows: Sequence[Int64[Tensor, " _"]], size: int, vocabulary: int = 1
) -> list[Int64[Tensor, "_ _"]]:
    """Neighbouring windows of one length together; windows that predict nothing are left out.

    Args:
        windows: of tokens.
        size: windows of a batch, at most, but no more than their logits have room.
        vocabulary: logits of a position.
    """
    batches: list[Tensor] = []
    group: list[Tensor] = []
    for window in windows:
        if len(window) < 2:
            continue
        room = min(size, LOGITS_AT_ONCE // (len(window) * vocabulary))
        if group and (len(group) >= room or len(group[0]) != len(window)):
            batches.append(torch.stack(group))
            group = []
        group.append(window)
    return [*batches, torch.stack(group)] if group else batches


class Readings:
    """The same text read by several models in turn, and the comparisons between them; use it in a ``with`` statement.

    Args:
        batches: of `batches_of`.
        pairs: roles that are compared; the first of each reads before the second.
        scratch: folder for the logits that are kept meanwhile; None takes the system's.
    """

    def __init__(
        self,
        batches: Sequence[Int64[Tensor, "_ _"]],
        pairs: Sequence[tuple[str, str]],
        scratch: Path | None = None,
    ) -> None:
        self._batches, self._pairs, self._scratch = batches, pairs, scratch
        self._positions = sum(batch.numel() for batch in batches)
        self._found = {pair: Collected(self._positions) for pair in pairs}
        self._kept: dict[str, Spilled] = {}
        self._figures: dict[str, _KeptFigures] = {}

    def __enter__(self) -> Readings:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the logits that were kept."""
        for file in self._kept.values():
            file.close()

    def read(self, roles: Sequence[str], runner: Runner, tick: Ticker, count: int | None = None) -> None:
        """Let a model read the text, in one or more roles, and compare it with those that have read it.

        Args:
            roles: of the model; nobody is compared with one that reads a part of the text.
            runner: the model.
            tick: told after each batch.
            count: batches that it reads; None is all of them.

        Raises:
            InputError: there is no room for the logits that later models are compared with.
        """
        for role in roles:
            if any(first == role and second not in roles for first, second in self._pairs):
                self._kept[role] = Spilled(self._scratch)
                self._figures[role] = _KeptFigures(self._positions)
        pairs = [pair for pair in self._pairs if pair[1] in roles]
        for kept in self._kept.values():
            kept.rewind()
        start = 0
        for tokens in self._batches[:count]:
            chunk = chunk_of(tokens, runner)
            for logits, targets in _scored(runner.logits(tokens, chunk), tokens):
                here = predict(logits, targets)
                earlier = {
                    first: here
                    if first in roles
                    else predict(
                        self._kept[first].read(tuple(logits.shape)),
                        targets,
                        self._figures[first].at(start, len(targets)),
                    )
                    for first in dict.fromkeys(pair[0] for pair in pairs)
                }
                for pair in pairs:
                    self._found[pair].add(compare(earlier[pair[0]], here))
                for role in roles:
                    if role in self._kept:
                        self._keep(role, logits)
                        self._figures[role].keep(start, here.figures)
                start += len(targets)
            tick(f"reading {len(self._batches)} batches of text")

    def comparison(self, pair: tuple[str, str]) -> Comparison:
        """The figures of a pair, once both have read."""
        return summarize(self._found[pair].positions())

    def _keep(self, role: str, logits: Float[Tensor, "rows vocabulary"]) -> None:
        try:
            self._kept[role].write(logits)
        except OSError as error:
            place = self._scratch or tempfile.gettempdir()
            needed = len(self._kept) * self._positions * logits.shape[1] * 4
            raise InputError(
                f"The logits of {self._positions:,} positions cannot be kept in {place} ({error.strerror}): they take "
                f"{needed / 1e6:,.0f} MB while models are compared. Make room, choose another place by TMPDIR, or "
                "evaluate on less text (--evaluation-tokens)."
            ) from None


class _KeptFigures:
    """Of every position that a model has read; see `Collected` for why it is one piece."""

    def __init__(self, positions: int) -> None:
        self._normalizer, self._surprise, self._power = torch.empty(3, positions, dtype=torch.float64)
        self._choice = torch.empty(positions, dtype=torch.int64)
        self._nonfinite = torch.zeros(positions, dtype=torch.int64)
        self._finite = torch.empty(positions, dtype=torch.bool)

    def keep(self, start: int, figures: Figures) -> None:
        """Of the positions from one on."""
        here = slice(start, start + len(figures.choice))
        self._normalizer[here], self._surprise[here] = figures.normalizer, figures.surprise
        self._choice[here], self._finite[here] = figures.choice, figures.finite
        self._power[here] = figures.power
        self._nonfinite[start] = figures.nonfinite

    def at(self, start: int, count: int) -> Figures:
        """Of so many positions from one on, as they were kept."""
        here = slice(start, start + count)
        return Figures(
            self._normalizer[here],
            self._surprise[here],
            self._choice[here],
            self._power[here],
            self._finite[here],
            int(self._nonfinite[start]),
        )


def numerical_noise(runner: Runner, batches: Sequence[Int64[Tensor, "_ _"]], tick: Ticker) -> Loss:
    """The same model twice: many tokens of several windows at once, and one token of one window at a time."""
    parts: list[Positions] = []
    for batch in batches:
        tokens = batch[:, : max(2, min(NOISE_TOKENS, chunk_of(batch, runner)))]
        at_once = _scored(runner.logits(tokens, tokens.shape[1]), tokens)
        alone = torch.cat([torch.cat(list(runner.logits(window[None], 1)), dim=1) for window in tokens])
        for (first, targets), (second, _) in zip(at_once, _scored([alone], tokens), strict=True):
            parts.append(compare(predict(first, targets), predict(second, targets)))
        tick("measuring the numerical noise")
    return Loss(runner.name, f"{runner.name}, token by token", summarize(concatenate(parts)), greedy=())


def chunk_of(tokens: Int64[Tensor, "batch length"], runner: Runner) -> int:
    """How many positions of each window are read at once, so that their logits have room."""
    batch, length = tokens.shape
    return max(1, min(length, LOGITS_AT_ONCE // (batch * runner.vocabulary)))


def _scored(
    pieces: Iterable[Float[Tensor, "_ _ _"]], tokens: Int64[Tensor, "batch length"]
) -> Iterator[tuple[Float[Tensor, "_ _"], Int64[Tensor, " _"]]]:
    """Logits of a few positions at a time, and the tokens that came next there."""
    length = tokens.shape[1]
    start = 0
    for piece in pieces:
        positions, vocabulary = piece.shape[1:]
        # What the last position of a window predicts is not known.
        kept = min(positions, length - 1 - start)
        targets = tokens[:, start + 1 : start + 1 + kept].reshape(-1)
        flat = piece[:, :kept].reshape(-1, vocabulary)
        rows = max(1, COMPARED_AT_ONCE // vocabulary)
        for first in range(0, len(targets), rows):
            yield flat[first : first + rows], targets[first : first + rows]
        start += positions
