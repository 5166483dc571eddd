"""What the original says to every batch, kept in the work folder in little room: what its output head reads.

Logits of a long text take more room than the model. So what stands behind the head is computed when it is needed:
while the tuned model runs, its head multiplies what the original's head read with the original's weights as well, and
whatever the model does behind its head, it does to both. A model without a head, or one of few classes, gives its
outputs themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.core.work_files import is_sound, read_tensors, write_tensors
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch
from compot_deploy.progress import Progress

_LABEL = "Ask the original"


@dataclass(frozen=True)
class Teacher:
    """The original's answers to some batches.

    Attributes:
        source: the original.
        work: folder that has them.
        device: where to compute.
    """

    source: ModelSource
    work: Path
    device: str

    def ask(self, batches: Sequence[Batch], progress: Progress) -> None:
        """Run the original over the batches, block by block, and keep what it says, where that is not there yet."""
        path = self.source.layout.head
        blocks = self.source.layout.blocks
        if all(is_sound(self._file(number)) for number in range(len(batches))):
            return
        with BlockStream(self.source, batches, device=self.device, finish=True) as stream:
            for number in range(len(blocks) - 1):
                progress(number, len(blocks), _LABEL)
                stream.advance(capture=False)
            numbers = iter(range(len(batches)))

            def keep(output: Tensor, batch: Batch, left: Any, head: tuple[Tensor, Tensor] | None) -> None:
                values = output if head is None else head[0]
                write_tensors(self._file(next(numbers)), {"values": values.detach().float().cpu()}, {})

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
        return read_tensors(self._file(number))["values"].to(self.device)

    def _file(self, number: int) -> Path:
        return self.work / f"original-{number:05d}.safetensors"


class Both:
    """Lets a model give the original's outputs beside its own.

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

        def forward(values: Tensor) -> Tensor:
            with torch.no_grad():
                right = linear(self._teacher.answer(next(queue)), original.weight, original.bias)
            return torch.cat([linear(values, module.weight, module.bias), right])

        module.forward = forward
        try:
            yield
        finally:
            del module.forward

    def split(self, output: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The original's outputs and the model's own for a batch."""
        if self._original is None:
            return self._teacher.answer(number), output
        own, right = output.split(len(output) // 2)
        return right, own

    def whole(self, gradient: Tensor) -> Tensor:
        """A gradient at the model's own outputs, at all that it gives."""
        return gradient if self._original is None else torch.cat([gradient, torch.zeros_like(gradient)])
