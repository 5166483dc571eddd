"""The original beside the tuned model: what it says to every window is asked once, and given where it is needed.

What is kept is what its output head reads, see `compot_deploy.models.answers`. What stands behind the head is computed
when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.healing.distance import Distance, Head, distance, distance_before_heads
from compot_deploy.healing.texts import Texts
from compot_deploy.models.answers import Answers
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.progress import Progress

_LABEL = "Ask the original"


@dataclass(frozen=True)
class Teacher:
    """The original's answers.

    Attributes:
        source: the original.
        answers: to every window of the calibration text.
        texts: how healing reads these windows.
        device: where to compute.
    """

    source: ModelSource
    answers: Answers
    texts: Texts
    device: str

    def ask(self, windows: TokenWindows, progress: Progress) -> None:
        """Run the original over the calibration text, block by block; not where calibration has kept its answers.

        It reads the same batches as calibration does, so the answers are the same to the last bit.
        """
        if self.answers.complete(len(windows.inputs)):
            return
        path, blocks = self.source.layout.head, self.source.layout.blocks
        batches = self.source.task.batches(windows.inputs)
        with BlockStream(self.source, batches, device=self.device, finish=True) as stream:
            for number in range(len(blocks) - 1):
                progress(number, len(blocks), _LABEL)
                stream.advance(capture=False)
            first = 0

            def keep(output: Tensor, batch: Batch, left: Any, head: tuple[Tensor, Tensor] | None) -> None:
                nonlocal first
                self.answers.keep(first, batch, output if head is None else head[0])
                first += len(batch.real)

            if path is not None:
                # One number in the place of a whole vocabulary: nothing behind the head is asked for here.
                stream.model.get_submodule(path).forward = lambda values: values[..., :1]
            stream.finish_with(keep)
            if path is not None:
                del stream.model.get_submodule(path).forward
        progress(len(blocks), len(blocks), _LABEL)
        give_back_freed_memory()

    def head(self) -> Any:
        """The original's head, in float32; None for a model without one."""
        path = self.source.layout.head
        if path is None:
            return None
        model = self.source.skeleton(device=torch.device(self.device), dtype=torch.float32, head=True)
        return model.get_submodule(path)

    def answer(self, number: int) -> Tensor:
        """What it said to a batch."""
        return self.answers.read(self.texts.windows[number]).to(self.device)


class Both:
    """Compares a model with the original while it runs.

    Where the model ends with its head, the head is left out of the run: what it would read is compared, see
    `compot_deploy.healing.distance.distance_before_heads`. Elsewhere it gives the original's logits beside its own, and
    whatever comes behind it does the same to both.

    Args:
        teacher: whose answers are given.
        model: the skeleton that runs.
    """

    def __init__(self, teacher: Teacher, model: Any) -> None:
        self._teacher, self._model = teacher, model
        self._original = teacher.head()

    @contextmanager
    def reading(self, numbers: Sequence[int]) -> Iterator[None]:
        """While the model reads these batches, in this order."""
        path = self._teacher.source.layout.head
        if path is None:
            yield
            return
        module, queue, original = self._model.get_submodule(path), iter(numbers), self._original
        linear = nn.functional.linear

        def beside(values: Tensor) -> Tensor:
            with torch.no_grad():
                right = linear(self._teacher.answer(next(queue)), original.weight, original.bias)
            return torch.cat([linear(values, module.weight, module.bias), right])

        module.forward = _as_it_is if self._teacher.texts.before_head else beside
        try:
            yield
        finally:
            del module.forward

    def distance(self, output: Tensor, number: int) -> Distance:
        """Between the original's outputs and those that a model gave while it was `reading`, for a batch.

        Its gradient is at all that the model gave.
        """
        texts, task = self._teacher.texts, self._teacher.source.task
        batch = texts.batches[number].to(output.device)
        if self._original is None:
            return distance(task, self._teacher.answer(number), output, batch)
        if texts.before_head:
            own = self._model.get_submodule(self._teacher.source.layout.head)
            heads = Head(self._original.weight, self._original.bias), Head(own.weight, own.bias)
            return distance_before_heads(heads, self._teacher.answer(number), output, batch)
        own, original = output.split(len(output) // 2)
        found = distance(task, original, own, batch)
        return replace(found, gradient=torch.cat([found.gradient, torch.zeros_like(found.gradient)]))


def _as_it_is(values: Tensor) -> Tensor:
    return values
