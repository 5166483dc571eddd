"""A model of two towers in small: the features of its configuration, few blocks, narrow matrices, random weights.

What an exporter does with a feature shows in small within seconds, before any work on the real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

_BLOCKS: Final = 2
_HEADS: Final = 2
_WIDTH: Final = 128
_VOCABULARY: Final = 512
_POSITIONS: Final = 256
_FRAMES: Final = 50

_LARGEST: Final[Mapping[str, int]] = {
    "encoder_layers": _BLOCKS,
    "decoder_layers": _BLOCKS,
    "num_layers": _BLOCKS,
    "num_decoder_layers": _BLOCKS,
    "encoder_num_hidden_layers": _BLOCKS,
    "decoder_num_hidden_layers": _BLOCKS,
    "num_hidden_layers": _BLOCKS,
    "encoder_ffn_dim": _WIDTH,
    "decoder_ffn_dim": _WIDTH,
    "d_ff": _WIDTH,
    "intermediate_size": _WIDTH,
    "vocab_size": _VOCABULARY,
    "decoder_vocab_size": _VOCABULARY,
    "max_position_embeddings": _POSITIONS,
    "max_target_positions": _POSITIONS,
    "max_source_positions": _FRAMES,
}
"""By names that configurations have for their sizes."""

_HEAD_COUNTS: Final = (
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_heads",
    "encoder_num_attention_heads",
    "decoder_num_attention_heads",
    "encoder_num_key_value_heads",
    "decoder_num_key_value_heads",
)
_WIDTHS: Final = ("d_model", "hidden_size")


def small_towers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same features with few blocks, two heads of the real size and small widths; what is small stays as it is."""
    found = dict(config)
    for name, largest in _LARGEST.items():
        if isinstance(found.get(name), int):
            found[name] = min(found[name], largest)
    heads = [name for name in _HEAD_COUNTS if isinstance(found.get(name), int)]
    before = max((found[name] for name in heads), default=_HEADS)
    for name in heads:
        found[name] = min(found[name], _HEADS)
    for name in _WIDTHS:
        if isinstance(found.get(name), int) and before > _HEADS:
            found[name] = found[name] // before * _HEADS
    for name, token in config.items():
        if name.endswith("_token_id") and isinstance(token, int):
            found[name] = min(token, int(found["vocab_size"]) - 1)
    return found


def with_random_weights(model: nn.Module) -> None:
    """Weights at which attention and activations are far from linear; norms and biases that differ from their start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("logits_bias"):
                buffer.add_(torch.randn_like(buffer))
