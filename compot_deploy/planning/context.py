"""What is planned, and with what: one value that every stage of planning reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.core.storage import Storage
from compot_deploy.core.work_files import (
    digest_of,
    is_sound,
    read_tensors,
    read_value,
    write_tensors,
    write_value,
)
from compot_deploy.models.answers import Answers
from compot_deploy.models.side_by_side import SideBySide
from compot_deploy.models.sites import Gram, InputGroup, importance
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.candidates import Search
from compot_deploy.progress import Progress, silent
from compot_deploy.quant.scales import check_scales

_HEAD: Final = "head"


@dataclass(frozen=True)
class Conditions:
    """How schemes are tried: all that is decided and no number of a model.

    Attributes:
        storage: what a byte is.
        search: which schemes are tried.
        quantizer: of plain grids.
    """

    storage: Storage
    search: Search
    quantizer: str


@dataclass(frozen=True)
class InputNumbers:
    """The numbers of one input; they stand alone, so that they can be sent.

    Attributes:
        gram: of the input.
        weights: matrices that read it, by name.
    """

    gram: Float[Tensor, "inputs inputs"]
    weights: Mapping[str, Float[Tensor, "inputs outputs"]]


@dataclass(frozen=True)
class PlanningContext:
    """A model, its calibration text, and how it is compressed.

    Attributes:
        source: the original.
        windows: calibration text.
        work: folder for what is finished.
        storage: what a byte is.
        search: which schemes are tried.
        quantizer: of plain grids.
        device: where to compute.
        dtype: of the forward pass.
        sequential: make matrices for what the compressed ones before them give, and for what the original gave.
        progress: told how far the work is.
        workers: who computes what can be divided.
        answers: what the original says is kept there on the way, for healing; None where nobody asks.
    """

    source: ModelSource
    windows: TokenWindows
    work: Path
    storage: Storage
    search: Search
    quantizer: str = "gptq"
    device: str = "cpu"
    dtype: str = "float32"
    sequential: bool = False
    progress: Progress = silent
    workers: Workers = ALONE
    answers: Answers | None = None

    @property
    def conditions(self) -> Conditions:
        """How schemes are tried."""
        return Conditions(self.storage, self.search, self.quantizer)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks, in running order."""
        return self.source.layout.blocks

    @property
    def groups(self) -> tuple[InputGroup, ...]:
        """Every input that matrices read, in running order."""
        return self.source.layout.groups

    @property
    def names(self) -> tuple[str, ...]:
        """All matrices, in running order."""
        return self.source.layout.names

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """The calibration text as the model reads it."""
        return self.source.task.batches(self.windows.inputs)

    def sizes(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(in, out) of matrices."""
        return {name: self.source.shape(name) for name in names}

    def weights(self, names: Sequence[str]) -> dict[str, Float[Tensor, "inputs outputs"]]:
        """Values of matrices, in float32, in memory of their own.

        What is read from a file lies where the file has it, and a sum is not the same to the last bit wherever its
        numbers begin.

        Raises:
            InputError: values that are not finite, or that no scale of the plan's precision can stand for.
        """
        found = {name: self.source.weight(name).to(self.device, torch.float32, copy=True) for name in names}
        if self.search.plain.grid is not None:
            for name, weight in found.items():
                check_scales(name, weight, self.search.plain.grid)
        return found

    def numbers(self, group: InputGroup, names: Sequence[str] | None = None) -> InputNumbers:
        """Of an input of the original model, and of some matrices that read it; without `names` of all."""
        return self.numbers_with(self.grams(group.block)[group.name], group.names if names is None else names)

    def numbers_with(self, gram: Float[Tensor, "inputs inputs"], names: Sequence[str]) -> InputNumbers:
        """Of an input whose Gram is given, which is copied as `weights` are."""
        return InputNumbers(gram.to(self.device, copy=True), self.weights(names))

    def stream(self, *, original: bool = False) -> BlockStream:
        """The model as it reads the calibration text, in front of its first block.

        Args:
            original: no block is going to be replaced, even where matrices are made one block after the other.
        """
        return BlockStream(
            self.source,
            self.batches,
            device=self.device,
            dtype=self.dtype,
            # What reaches the head behind compressed blocks is known only after they are kept.
            at_head=self._keep_head_gram if original or not self.sequential else None,
            heard=None if self.answers is None else self._keep_answer,
            workers=self.workers,
        )

    def side_by_side(self) -> SideBySide:
        """The original and a model that is being compressed, in front of their first blocks."""
        return SideBySide(
            self.source, self.batches, device=self.device, dtype=self.dtype, workers=self.workers
        )

    @property
    def has_answers(self) -> bool:
        """Whether everything that was asked for is in the work folder."""
        return self.answers is None or self.answers.complete(len(self.windows.inputs))

    def _keep_answer(self, number: int, values: Tensor) -> None:
        assert self.answers is not None
        first = sum(len(batch.real) for batch in self.batches[:number])
        self.answers.keep(first, self.batches[number], values)

    # -- Grams in the work folder --------------------------------------------------------------------

    def has_grams(self, block: str) -> bool:
        """Whether the Grams of a block are in the work folder."""
        return is_sound(self._gram_file(block))

    def grams(self, block: str) -> Mapping[str, Tensor]:
        """Grams of the inputs of a block in the original model, by name of the group."""
        return read_tensors(self._gram_file(block))

    def gram_digest(self, block: str) -> str:
        """Tells Grams from others, without reading them as numbers."""
        return digest_of(self._gram_file(block))

    def whitening(self, group: InputGroup) -> Whitening:
        """Of one input of the original model."""
        return whiten(self.grams(group.block)[group.name].to(self.device))

    def keep_grams(self, block: str, grams: Mapping[str, Gram]) -> None:
        """Put the Grams of a block into the work folder."""
        self.keep_importance(block, {name: gram.matrix for name, gram in grams.items()})
        self.keep_unreached(block, grams)
        write_tensors(self._gram_file(block), {name: gram.matrix for name, gram in grams.items()}, {})

    def keep_unreached(self, block: str, grams: Mapping[str, Gram]) -> None:
        """Put names of the inputs of a block that no token reached into the work folder."""
        write_value(self._unreached_file(block), [name for name, gram in grams.items() if gram.tokens == 0])

    def unreached(self) -> list[str]:
        """Inputs of experts that no token of the calibration text reached, as far as their Grams are kept."""
        files = {block: self._unreached_file(block) for block in self.blocks}
        return [
            f"{block}.{name}" for block, path in files.items() if is_sound(path) for name in read_value(path)
        ]

    def has_importance(self, block: str) -> bool:
        """Whether it is known how much the inputs of a block matter."""
        return is_sound(self._importance_file(block))

    def keep_importance(self, block: str, grams: Mapping[str, Tensor]) -> None:
        """Put how much the inputs of a block matter into the work folder."""
        write_tensors(
            self._importance_file(block), {name: importance(gram) for name, gram in grams.items()}, {}
        )

    def importances(self) -> dict[str, Float[Tensor, " inputs"]]:
        """How much each input of every matrix matters, for formats that round."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            stored = read_tensors(self._importance_file(block))
            for group in self.source.layout.of(block):
                found |= dict.fromkeys(group.names, stored[group.name])
        return found

    def block_file(self, kind: str, block: str) -> Path:
        """A file of the work folder that belongs to one block."""
        return self.work / f"{kind}-{self.blocks.index(block):04d}.safetensors"

    @property
    def has_head_gram(self) -> bool:
        """Whether the Gram of what the output head reads is in the work folder; True for a model without a head."""
        return self.source.layout.head is None or is_sound(self._head_file)

    def head_gram(self) -> Tensor | None:
        """Gram of what the output head reads; None for a model without a head, and where it was not collected."""
        return read_tensors(self._head_file).get(_HEAD) if is_sound(self._head_file) else None

    def _keep_head_gram(self, gram: Gram | None) -> None:
        tensors = {} if gram is None else {_HEAD: gram.matrix}
        write_tensors(self._head_file, tensors, {})

    @property
    def _head_file(self) -> Path:
        return self.work / "head-gram.safetensors"

    def _gram_file(self, block: str) -> Path:
        return self.block_file("grams", block)

    def _unreached_file(self, block: str) -> Path:
        return self.block_file("unreached", block).with_suffix(".json")

    def _importance_file(self, block: str) -> Path:
        return self.block_file("importance", block)


def collect_grams(context: PlanningContext) -> None:
    """One file of Grams per block, from one pass of the original model."""
    label = "Calibrate"
    blocks = context.blocks
    missing = [number for number, block in enumerate(blocks) if not context.has_grams(block)]
    if not (context.has_head_gram and context.has_answers):
        missing = sorted({*missing, len(blocks) - 1})
    if missing:
        with context.stream(original=True) as stream:
            for number in range(missing[0], missing[-1] + 1):
                context.progress(number, len(blocks), label)
                stream.skip_to(number)
                grams = stream.advance(capture=number in missing)
                if number in missing:
                    context.keep_grams(blocks[number], grams)
    context.progress(len(blocks), len(blocks), label)
