"""Models in torch whose evaluation text is read by workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.reading import batches_of, chunk_of
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.cluster import Workers


def read(runner: TorchRunner, asked: tuple[Tensor, int]) -> list[Tensor]:
    """Logits of one batch, as `TorchRunner.logits` gives them."""
    tokens, chunk = asked
    return list(runner.logits(tokens, chunk))


class ReadElsewhere:
    """A decoder in torch. Workers read the evaluation text, batch by batch; whatever else is asked is computed here.

    Args:
        runner: the decoder; it is sent to the workers when the text is asked for.
        workers: who reads.
        windows: of the text.
        size: windows of a batch, at most.
    """

    def __init__(
        self, runner: TorchRunner, workers: Workers, windows: Sequence[Int64[Tensor, " _"]], size: int
    ) -> None:
        self._runner, self._workers = runner, workers
        self.name, self.vocabulary, self.context = runner.name, runner.vocabulary, runner.context
        batches = batches_of(windows, size, runner.vocabulary)
        self._expected = deque((tokens, chunk_of(tokens, runner)) for tokens in batches)
        self._answers: Iterator[list[Tensor]] | None = None

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """See `compot_deploy.accuracy.runner.Runner.logits`."""
        if (
            not self._expected
            or chunk != self._expected[0][1]
            or not torch.equal(tokens, self._expected[0][0])
        ):
            return self._runner.logits(tokens, chunk)
        if self._answers is None:
            self._answers = self._workers.map(read, self._runner, tuple(self._expected))
        self._expected.popleft()
        return iter(next(self._answers))

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """See `compot_deploy.accuracy.runner.Runner.generate`."""
        return self._runner.generate(prompt, new_tokens)

    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
        """See `compot_deploy.accuracy.runner.SideBySide.generate_all`."""
        return self._runner.generate_all(prompts, new_tokens)
