"""The sizes of a decoder, every default filled in: the same for every exporter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from compot_deploy.models.configuration import settings_of
from compot_deploy.models.hints import Architecture


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and constants of a decoder, every default filled in.

    Attributes:
        layers: number of blocks.
        hidden: width of the residual stream.
        heads: query heads.
        key_value_heads: key and value heads.
        head_size: width of one head.
        intermediate: width inside the MLP.
        vocabulary: number of token ids.
        norm_epsilon: of every norm.
        context: longest sequence, prompt and answer together; rows of the rotary tables.
        windows: of each block, how many of the last keys a query sees, itself included; None sees all.
    """

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    norm_epsilon: float
    context: int
    windows: tuple[int | None, ...]

    @property
    def fused_rotary(self) -> bool:
        """Whether GroupQueryAttention can rotate by itself: it takes heads of multiples of 16."""
        return self.head_size % 16 == 0


def decoder_shape(architecture: Architecture, config: Mapping[str, Any]) -> DecoderShape:
    """Sizes of the decoder, with the defaults of transformers where config.json is silent."""
    return _decoder_shape(architecture, json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=8)
def _decoder_shape(architecture: Architecture, config: str) -> DecoderShape:
    settings = settings_of(json.loads(config), f"The configuration of this {architecture.model_type}")
    layers = int(settings.num_hidden_layers)
    return DecoderShape(
        layers=layers,
        hidden=int(settings.hidden_size),
        heads=int(settings.num_attention_heads),
        key_value_heads=int(getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads),
        head_size=architecture.head_size(
            {
                "head_dim": getattr(settings, "head_dim", None),
                "hidden_size": settings.hidden_size,
                "num_attention_heads": settings.num_attention_heads,
            }
        ),
        intermediate=int(settings.intermediate_size),
        vocabulary=int(settings.vocab_size),
        norm_epsilon=float(settings.rms_norm_eps),
        context=int(settings.max_position_embeddings),
        windows=windows_of(settings, layers),
    )


def windows_of(settings: Any, layers: int) -> tuple[int | None, ...]:
    """The window of each block, as transformers' model classes read it."""
    # A key that the class does not know (sliding_window in a llama) is kept by the configuration and ignored
    # by the model, so ask a configuration with nothing but defaults what it knows.
    known = type(settings)()
    window = getattr(settings, "sliding_window", None) if hasattr(known, "sliding_window") else None
    if window is None:
        return (None,) * layers
    if not hasattr(known, "layer_types"):
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in settings.layer_types)
