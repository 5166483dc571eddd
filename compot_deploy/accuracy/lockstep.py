"""Several models read the same text together, a few positions at a time, and are compared pair by pair.

Logits exist for a few positions at a time; what is kept is 49 bytes per position and pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import Comparison, Positions, compare, concatenate, predict, summarize
from compot_deploy.accuracy.runner import Runner
from compot_deploy.progress import Ticker

LOGITS_AT_ONCE: Final = 2**24
"""Logits of one runner held at a time, 64 MiB in float32: bounds the chunk, whatever the vocabulary."""

ROWS_AT_ONCE: Final = 2**21
"""Logits that are compared at a time: each takes about 100 bytes in float64 while four models are compared."""

NOISE_WINDOWS: Final = 4
NOISE_TOKENS: Final = 32
"""The numerical noise is measured on the first tokens of the first windows: read one at a time, they cost as much as
generating so many tokens."""


def batches_of(windows: Sequence[Int64[Tensor, " _"]], size: int) -> list[Int64[Tensor, "_ _"]]:
    """Neighbouring windows of one length together; windows that predict nothing are left out."""
    batches: list[Tensor] = []
    group: list[Tensor] = []
    for window in windows:
        if len(window) < 2:
            continue
        if group and (len(group) == size or len(group[0]) != len(window)):
            batches.append(torch.stack(group))
            group = []
        group.append(window)
    return [*batches, torch.stack(group)] if group else batches


def read_in_lockstep(
    roles: Mapping[str, Runner],
    pairs: Sequence[tuple[str, str]],
    batches: Sequence[Int64[Tensor, "_ _"]],
    tick: Ticker,
) -> dict[tuple[str, str], Comparison]:
    """Run all models over the text together and compare them pair by pair."""
    runners = {id(runner): runner for runner in roles.values()}
    parts: dict[tuple[str, str], list[Positions]] = {pair: [] for pair in pairs}
    for tokens in batches:
        chunk = _chunk(tokens, next(iter(runners.values())))
        streams = [runner.logits(tokens, chunk) for runner in runners.values()]
        for logits, targets in _scored(streams, tokens):
            predictions = dict(zip(runners, (predict(rows, targets) for rows in logits), strict=True))
            for first, second in pairs:
                one, other = predictions[id(roles[first])], predictions[id(roles[second])]
                parts[first, second].append(compare(one, other))
        tick(f"reading {len(batches)} batches of text with {len(runners)} models")
    return {pair: summarize(concatenate(part)) for pair, part in parts.items()}


def numerical_noise(runner: Runner, batches: Sequence[Int64[Tensor, "_ _"]], tick: Ticker) -> Loss:
    """The same model twice: many tokens of several windows at once, and one token of one window at a time."""
    parts: list[Positions] = []
    for batch in batches:
        tokens = batch[:, : max(2, min(NOISE_TOKENS, _chunk(batch, runner)))]
        at_once = runner.logits(tokens, tokens.shape[1])
        singly = torch.cat([torch.cat(list(runner.logits(window[None], 1)), dim=1) for window in tokens])
        for (first, second), targets in _scored([at_once, [singly]], tokens):
            parts.append(compare(predict(first, targets), predict(second, targets)))
        tick("measuring the numerical noise")
    return Loss(runner.name, f"{runner.name}, token by token", summarize(concatenate(parts)), greedy=())


def _chunk(tokens: Int64[Tensor, "batch length"], runner: Runner) -> int:
    batch, length = tokens.shape
    return max(1, min(length, LOGITS_AT_ONCE // (batch * runner.vocabulary)))


def _scored(
    streams: Sequence[Iterable[Float[Tensor, "_ _ _"]]], tokens: Int64[Tensor, "batch length"]
) -> Iterator[tuple[list[Float[Tensor, "_ _"]], Int64[Tensor, " _"]]]:
    """Logits of all streams at the same few positions, and the tokens that came next there."""
    length = tokens.shape[1]
    start = 0
    for pieces in zip(*streams, strict=True):
        positions, vocabulary = pieces[0].shape[1:]
        # What the last position of a window predicts is not known.
        kept = min(positions, length - 1 - start)
        targets = tokens[:, start + 1 : start + 1 + kept].reshape(-1)
        flat = [piece[:, :kept].reshape(-1, vocabulary) for piece in pieces]
        rows = max(1, ROWS_AT_ONCE // vocabulary)
        for first in range(0, len(targets), rows):
            yield [part[first : first + rows] for part in flat], targets[first : first + rows]
        start += positions
