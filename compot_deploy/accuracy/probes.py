"""What figures over an evaluation text do not see: positions far behind its windows, and outputs that ignore the input.

A table of rotations that is wrong from position 300 on, a weight that overflows in a long text, a model that says the
same to everything: windows of 256 tokens, or a limit that somebody widened, may let each of them pass. So models of an
evaluation read two more things while they are open:

    a long window   as many tokens of the text as the model reads, up to `LONGEST`: all logits finite, and at its last
                    positions the file computes what its own weights give in torch
    other tokens    the first window, and the same window with other tokens: the outputs must differ
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor

from compot_deploy.accuracy.gate import Criterion, Gate, criterion
from compot_deploy.accuracy.runner import Runner
from compot_deploy.models.tasks import Batch, Task

LONGEST: Final = 1024
"""Tokens of the long window, at most: reading it costs a model as much as a quarter of the default evaluation text."""

LAST: Final = 64
"""Positions at the end of the long window that are compared."""

SHORT: Final = 32
"""Tokens of the window that is read with other tokens as well."""

LEAST_DEPENDENCE: Final = 1e-6
"""Share of the outputs' energy that moves with the input, at least. Of models that work it is 0.1 and more."""

_CHUNK: Final = 128


class Probes:
    """Lets every model of an evaluation read what the figures do not see; see `visit`.

    Args:
        task: what the models are for.
        windows: of the evaluation text.
        context: longest sequence that the model was made for.
        vocabulary: number of token ids.
    """

    def __init__(
        self, task: Task, windows: Sequence[Int64[Tensor, " _"]], context: int, vocabulary: int
    ) -> None:
        self._task = task
        text = torch.cat([window.flatten() for window in windows])
        length = min(context, LONGEST)
        self._long = text.repeat(-(-length // len(text)))[:length]
        self._needed = length > max(len(window) for window in windows)
        self._short = text[: min(SHORT, context)]
        self._other = (self._short + 1) % vocabulary
        self._torch: Tensor | None = None
        self._nonfinite = 0
        self._error = math.nan
        self._dependence = math.nan

    def visit(self, roles: Sequence[str], runner: Any) -> None:
        """Read with a model that is open now.

        Args:
            roles: of the model: ``compressed``, ``exact``, ``exported`` and others.
            runner: `Runner`, or `compot_deploy.accuracy.texts.TextRunner`.
        """
        if self._needed and {"compressed", "exact", "exported"} & set(roles):
            last, bad = self._read_long(runner)
            if "compressed" in roles:
                self._torch = last
            if "exact" in roles and self._torch is not None:
                self._error = _relative_error(self._torch, last)
            if "exported" in roles or "exact" in roles:
                self._nonfinite += bad
        if "exported" in roles:
            one, two = (self._read(runner, tokens) for tokens in (self._short, self._other))
            self._dependence = _share_that_moves(one, two)

    def criteria(self, gate: Gate) -> Iterator[Criterion]:
        """What was found, held against what any model keeps."""
        if self._needed:
            what = f"outputs that are NaN or infinite in a text of {len(self._long):,} tokens"
            yield criterion("long_nonfinite", float(self._nonfinite), 0.0, "at most", what)
            what = f"NMSE that the file adds at the end of {len(self._long):,} tokens, computed exactly"
            yield criterion("long_export_nmse", self._error, gate.max_export_nmse, "at most", what)
        what = "share of the outputs' energy that moves when other tokens are read"
        yield criterion("input_dependence", self._dependence, LEAST_DEPENDENCE, "at least", what)

    def _read_long(self, runner: Any) -> tuple[Tensor, int]:
        """Outputs of the last positions, and how many of all are not finite."""
        bad, last = 0, torch.empty(0)
        for piece in self._pieces(runner, self._long):
            bad += int((~torch.isfinite(piece)).sum())
            last = torch.cat([last, piece])[-LAST:] if len(last) else piece[-LAST:]
        return last.clone(), bad

    def _read(self, runner: Any, tokens: Tensor) -> Tensor:
        return torch.cat(list(self._pieces(runner, tokens)))

    def _pieces(self, runner: Any, tokens: Tensor) -> Iterable[Tensor]:
        """Outputs of one window, (positions, width), a few positions at a time; of a whole text one row."""
        if isinstance(runner, Runner):
            yield from (piece[0].float() for piece in runner.logits(tokens[None], _CHUNK))
            return
        (batch,) = self._task.batches([tokens])
        yield _rows(runner.outputs(batch), batch)


def _rows(output: Tensor, batch: Batch) -> Tensor:
    return output[batch.real] if output.dim() == 3 else output


def _relative_error(reference: Tensor, candidate: Tensor) -> float:
    one, two = reference.double(), candidate.double()
    power = float((one - one.mean(-1, keepdim=True)).square().sum())
    error = float((two - one).square().sum())
    return error / power if power > 0 else 0.0 if error == 0 else math.inf


def _share_that_moves(one: Tensor, two: Tensor) -> float:
    """Of the energy of two readings, constants over the width left out, the part in which they differ; 0 of nothing."""
    first, second = (values.double() - values.double().mean(-1, keepdim=True) for values in (one, two))
    power = float(first.square().sum() + second.square().sum())
    return float((first - second).square().sum()) / power if power > 0 else 0.0
