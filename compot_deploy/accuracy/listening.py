"""Listening to a model while it reads the evaluation text: what it says is passed on as it is, and to a listener too.

So the answers of the original are kept, and those of a file are held against kept ones, without reading a text twice.
A listener hears every position of the text once, in any order, under its number in the text; what a model reads after
the text (for the numerical noise, for prompts) it does not hear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.answers import Distributions, compare_with, shorten
from compot_deploy.accuracy.metrics import Collected, Comparison, Positions, mean, summarize
from compot_deploy.accuracy.runner import Runner, texts_of
from compot_deploy.errors import InputError
from compot_deploy.models.tasks import Batch, Task, pooled

_SEED = 0


@runtime_checkable
class Listener(Protocol):
    """Hears what a model says."""

    def hear(self, start: int, output: Tensor, targets: Int64[Tensor, " positions"]) -> None:
        """Outputs of positions, or vectors of texts, from number `start` on; `targets` are the tokens that follow."""
        ...


class Shortening:
    """Keeps the answers of a model.

    Args:
        task: what the model is for.
        positions: of the text; texts, of a model that gives one output for each.
    """

    def __init__(self, task: Task, positions: int) -> None:
        self._task, self._count = task, positions
        self._generator = torch.Generator().manual_seed(_SEED)
        self._room: dict[str, Tensor] = {}

    def hear(self, start: int, output: Tensor, targets: Int64[Tensor, " positions"]) -> None:
        """See `Listener`."""
        if self._task.kind == "embedding":
            self._put(start, {"vectors": output.float()})
        else:
            self._put(start, vars(shorten(output, targets, self._generator)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What was kept, by the attributes of `Distributions`, or ``vectors``."""
        return self._room

    def _put(self, start: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self._room:
                self._room[name] = torch.zeros(self._count, *value.shape[1:], dtype=value.dtype)
            self._room[name][start : start + len(value)] = value


class Comparing:
    """Holds a model against answers that were kept.

    Args:
        task: what the model is for.
        answers: the kept ones: distributions, or vectors of texts.
    """

    def __init__(self, task: Task, answers: Distributions | Tensor) -> None:
        self._task, self._answers = task, answers
        self._found: Collected | None = None
        self._cosines: list[Tensor] = []
        self._nonfinite = 0

    def hear(self, start: int, output: Tensor, targets: Int64[Tensor, " positions"]) -> None:
        """See `Listener`."""
        if isinstance(self._answers, Tensor):
            kept = self._answers[start : start + len(output)].double()
            self._nonfinite += int((~torch.isfinite(output)).sum())
            self._cosines.append(torch.nn.functional.cosine_similarity(kept, output.double(), dim=-1))
            return
        if self._found is None:
            self._found = Collected(len(self._answers.choice))
        part = self._answers.part(start, start + len(output))
        if int(part.ids.max()) >= output.shape[-1]:
            raise InputError(
                f"The reference file knows the token {int(part.ids.max())}, and this model has {output.shape[-1]}: "
                "they are not the same model."
            )
        self._found.add(
            compare_with(part, output, part.choice if self._task.kind != "generation" else targets)
        )

    def comparison(self) -> Comparison:
        """The figures of everything that was heard."""
        if not isinstance(self._answers, Tensor):
            assert self._found is not None
            return summarize(self._found.positions(), goes_on=self._task.generates)
        cosines = torch.cat(self._cosines)
        nothing = torch.full((0,), 0.0, dtype=torch.float64)
        empty = Positions(
            nothing, nothing, nothing, nothing.bool(), nothing, nothing, nothing, 0, 0, self._nonfinite
        )
        figures = vars(summarize(empty, goes_on=False)) | {
            "positions": len(cosines),
            "divergence": None,
            "top1_agreement": None,
            "cosine": mean(cosines),
            "lowest_cosine": float(cosines.min()),
        }
        return Comparison(**figures)


class Heard:
    """A decoder that is listened to: a `Runner`.

    Args:
        runner: the decoder.
        windows: of the text, in the order in which they are read.
        listener: who listens.
    """

    def __init__(self, runner: Runner, windows: Sequence[Int64[Tensor, " _"]], listener: Listener) -> None:
        self._runner, self._listener = runner, listener
        lengths = [len(window) - 1 for window in windows if len(window) > 1]
        self._starts = [sum(lengths[:number]) for number in range(len(lengths))]
        self._next = 0
        self.name, self.vocabulary, self.context = runner.name, runner.vocabulary, runner.context

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """See `Runner.logits`."""
        starts = self._starts[self._next : self._next + len(tokens)]
        self._next += len(tokens)
        position = 0
        for piece in self._runner.logits(tokens, chunk):
            kept = min(piece.shape[1], tokens.shape[1] - 1 - position)
            for row, start in enumerate(starts if kept > 0 else ()):
                targets = tokens[row, position + 1 : position + 1 + kept]
                self._listener.hear(start + position, piece[row, :kept], targets)
            yield piece
            position += piece.shape[1]

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """See `Runner.generate`."""
        return self._runner.generate(prompt, new_tokens)

    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
        """See `SideBySide.generate_all`."""
        return list(texts_of(self._runner, prompts, new_tokens))


class HeardTexts:
    """A model of whole texts that is listened to: a `compot_deploy.accuracy.texts.TextRunner`.

    Args:
        runner: the model.
        task: what it is for.
        count: positions or texts that are listened to.
        listener: who listens.
    """

    def __init__(self, runner: Any, task: Task, count: int, listener: Listener) -> None:
        self._runner, self._task, self._count, self._listener = runner, task, count, listener
        self._heard = 0
        self.name = runner.name

    def outputs(self, batch: Batch) -> Tensor:
        """See `TextRunner.outputs`."""
        output: Tensor = self._runner.outputs(batch)
        rows = rows_of(self._task, output, batch)
        if self._heard + len(rows) <= self._count:
            self._listener.hear(self._heard, rows, rows.argmax(-1))
            self._heard += len(rows)
        return output


def rows_of(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """What is compared of an output: a row for every text, or for every real token."""
    if task.kind == "embedding":
        return pooled(output, batch.real)
    return output if task.pools else output[batch.real]


def positions_of(task: Task, windows: Sequence[Int64[Tensor, " _"]]) -> int:
    """How many positions, or texts, there are to listen to."""
    if task.generates:
        return sum(max(0, len(window) - 1) for window in windows)
    return len(windows) if task.pools else sum(len(window) for window in windows)


def heard(
    task: Task, opening: Callable[[], Any], windows: Sequence[Int64[Tensor, " _"]], listener: Listener
) -> Callable[[], Any]:
    """Open a model that is listened to."""
    if task.generates:
        return lambda: Heard(opening(), windows, listener)
    return lambda: HeardTexts(opening(), task, positions_of(task, windows), listener)
