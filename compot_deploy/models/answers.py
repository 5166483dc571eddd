"""What the original says to its calibration text, kept in the work folder in little room: a file for every window.

Logits of a long text take more room than the model, so what the output head reads is kept in their place; of a model
without a head its outputs themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compot_deploy.core.work_files import is_sound, read_tensors, write_tensors
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.tasks import Batch

_VALUES = "values"


@dataclass(frozen=True)
class Answers:
    """Answers to windows of text, by their number.

    Attributes:
        work: folder that has them.
    """

    work: Path

    def complete(self, count: int) -> bool:
        """Whether all of so many windows have one."""
        return all(is_sound(self._file(number)) for number in range(count))

    def keep(self, first: int, batch: Batch, values: Tensor) -> None:
        """Keep the answers to a batch, without what stands at padding.

        Args:
            first: number of its first window; the others follow.
            batch: that was read.
            values: (texts, tokens, width), or (texts, classes) where one belongs to a text.

        Raises:
            UnsupportedModelError: they do not belong to the texts.
        """
        texts, tokens = batch.real.shape
        fits = values.dim() == 2 or (values.dim() == 3 and values.shape[1] == tokens)
        if not fits or len(values) != texts:
            raise UnsupportedModelError(
                f"Answers of shape {tuple(values.shape)} to {texts} texts are not understood."
            )
        for row, (own, real) in enumerate(zip(values.detach().float().cpu(), batch.real.cpu(), strict=True)):
            rows = own if values.dim() == 2 else own[real]
            write_tensors(self._file(first + row), {_VALUES: rows.clone()}, {})

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Answers to some windows side by side, zero behind the shorter ones."""
        found = [read_tensors(self._file(number))[_VALUES] for number in numbers]
        return pad_sequence(found, batch_first=True)

    def _file(self, number: int) -> Path:
        return self.work / f"answer-{number:05d}.safetensors"
