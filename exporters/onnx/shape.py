"""What the graph cannot express of a configuration, and the rotary tables that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.configuration import settings_of
from compot_deploy.models.decoder_shape import decoder_shape
from compot_deploy.models.hints import Architecture
from compot_deploy.models.rotary import portable_config

ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "llama3")
"""Kinds of rotary embedding whose tables do not change while a sequence grows within the context."""


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of the rotary embedding, shape (context, head_size / 2) each, float32."""

    cosine: Tensor
    sine: Tensor


def check_supported(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Refuse what the graph cannot express, from the configuration alone.

    Raises:
        UnsupportedModelError: a rotary embedding that changes with the sequence length or turns only a part
            of each head, or heads of a size that its attention does not take.
    """
    name = architecture.model_type
    rope = portable_config(config)["rope_parameters"]
    if "rope_type" not in rope:
        raise UnsupportedModelError(
            f"A {name} whose rotary embedding differs between layer types is not supported in ONNX."
        )
    if rope["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"A {name} with rotary embedding of type {rope['rope_type']!r} is not supported in ONNX: "
            f"its angles change with the length of the text. Supported are: {', '.join(ROPE_TYPES)}."
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(
            f"A {name} with partial_rotary_factor={partial} is not supported in ONNX: only 1.0 is."
        )
    shape = decoder_shape(architecture, config)
    if shape.head_size % 8:
        raise UnsupportedModelError(
            f"A {name} with heads of {shape.head_size} is not supported in ONNX: "
            "GroupQueryAttention takes multiples of 8."
        )


def rotary_tables(config: Mapping[str, Any], rows: int) -> RotaryTables:
    """The tables that transformers' own rotary embedding would compute, in the same float32 steps."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(settings_of(config, "The configuration"))
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), rotary.inv_freq.float())
    scaling = float(rotary.attention_scaling)
    return RotaryTables(cosine=angles.cos() * scaling, sine=angles.sin() * scaling)
