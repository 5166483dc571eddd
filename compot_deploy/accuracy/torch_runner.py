"""Models in torch: the original, some of its matrices replaced, or a compressed model multiplied out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.runner import greedy, greedy_all, stream
from compot_deploy.models.cache import cache_argument, cache_of
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import ModelSource
from compot_deploy.models.whole import model_of, whole_model


class TorchRunner:
    """A transformers decoder.

    Args:
        model: a causal language model; switched to evaluation.
        name: for reports.
    """

    def __init__(self, model: Any, name: str = "torch") -> None:
        self._model = model.eval()
        self.name = name
        self.vocabulary = int(model.config.vocab_size)
        context = getattr(model.config, "max_position_embeddings", None)
        self.context: int | None = None if context is None else int(context)

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """See `Runner.logits`."""
        return stream(self._advance, tokens, chunk)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """See `Runner.generate`."""
        return greedy(self._advance, prompt, new_tokens)

    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
        """See `SideBySide.generate_all`."""
        return greedy_all(self._advance, prompts, new_tokens)

    def _advance(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        # Not a decorator on `stream`: a grad mode set inside a generator leaks to whoever consumes it.
        with torch.inference_mode():
            arguments = {cache_argument(self._model): cache, "use_cache": True}
            output = self._model(input_ids=tokens.to(self._model.device), **arguments)
        return output.logits, cache_of(output)


def torch_runner(
    source: ModelSource,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TorchRunner:
    """A decoder as it was found.

    Args:
        source: the model.
        name: for reports.
        device: where it runs.
        dtype: computed in; float32 holds bfloat16 and float16 weights exactly.
    """
    model = whole_model(source, device=device, dtype=dtype)
    return TorchRunner(model, name or f"torch {torch.__version__}, original weights")


def compressed_runner(model: CompressedModel, *, name: str | None = None) -> TorchRunner:
    """A compressed decoder in torch: every matrix dequantized and multiplied out, everything else as it is.

    Raises:
        InputError: a weight is missing, unknown, or has another shape than the configuration says.
    """
    return TorchRunner(model_of(model), name or f"torch {torch.__version__}, dequantized weights")
