"""Tensors that wait on disk: written one after the other, read again in that order, gone with the process."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor


class Spilled:
    """A nameless file of float32 numbers.

    Args:
        folder: where there is room; None takes the system's place for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, lives as long as this
        self.close = weakref.finalize(self, self._file.close)
        """Give the room back; also done when this is let go."""

    def write(self, values: Tensor) -> None:
        """Add a tensor, as float32.

        Raises:
            OSError: the disk is full.
        """
        self._file.write(values.detach().float().cpu().contiguous().numpy().data)

    def rewind(self) -> None:
        """Begin with the first tensor again: to be read, or to be written over."""
        self._file.seek(0)

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """The next tensor, whose shape the caller knows.

        Raises:
            RuntimeError: nothing of this size is left.
        """
        data = np.empty(shape, dtype=np.float32)
        if self._file.readinto(data.data.cast("B")) != data.nbytes:  # type: ignore[attr-defined]
            raise RuntimeError(f"No tensor of shape {shape} is left in the file.")
        return torch.from_numpy(data)
