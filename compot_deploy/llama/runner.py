"""llama.cpp as a runner of the accuracy checker: logits at every position, and greedy tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.exporters.gguf.library import PACKAGE, load_library
from compot_deploy.llama.model import LlamaModel, find_gguf


class LlamaRunner:
    """A GGUF file behind the protocol `compot_deploy.accuracy.runner.Runner`.

    Args:
        path: the file, or a folder with exactly one ``*.gguf``.
        exact: F32 cache, no flash attention, factors multiplied out and every matrix in float32: what remains is
            the error of the file. Otherwise llama.cpp's own settings, in which it and the plug-in round
            activations to 8 bits.
        threads: of llama.cpp; 0 takes half of the processors, at least one.

    Raises:
        ArtifactError, MissingDependencyError, UnsupportedLlamaError, LlamaError: see `LlamaModel`.
    """

    def __init__(self, path: str | Path, *, exact: bool = False, threads: int = 0) -> None:
        file = find_gguf(Path(path))
        threads = threads or max(1, (os.cpu_count() or 2) // 2)
        self._model = LlamaModel(file, threads=threads, exact=exact, execution="expand" if exact else "auto")
        how = "exact" if exact else "as deployed"
        self._name = f"llama.cpp ({PACKAGE} {load_library().version}), {self._model.execution}, {how}"

    @property
    def name(self) -> str:
        """What is run and how, for reports."""
        return self._name

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return self._model.vocabulary

    @property
    def context(self) -> int | None:
        """Longest sequence that can be read."""
        return self._model.context

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """Logits at every position, float32, in pieces of `chunk` positions, the last one shorter.

        One window fills the cache at a time, so the rows of a batch are read one after the other and held.
        """
        rows = [self._model.logits(row.tolist()) for row in tokens]
        for at in range(0, tokens.shape[1], chunk):
            yield torch.from_numpy(np.stack([row[at : at + chunk] for row in rows]))

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """Exactly `new_tokens` greedy tokens after the prompt; end-of-text tokens do not stop it."""
        return self._model.generate(list(prompt), max_tokens=new_tokens, stop=False).tokens

    def tokenize(self, text: str) -> list[int]:
        """A text as llama.cpp itself reads it, special tokens that are written out and that it adds included."""
        return self._model.tokenize(text, markers=True)

    def close(self) -> None:
        """Free the model."""
        self._model.close()
