"""What is the same in every decoder of `compot_deploy.models.hints`: sizes of linears, names of classes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

CAUSAL_CLASSES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
)
"""The class of transformers that a configuration without ``architectures`` belongs to, by model type."""


def linear_shapes(config: Mapping[str, Any], head_size: int) -> dict[str, tuple[int, int]]:
    """(in, out) of the linears of a block, by the last part of their paths.

    Args:
        config: of the model, in the words of transformers.
        head_size: width of one attention head; see `Architecture.head_size`.
    """
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    queries, keys = heads * head_size, int(config.get("num_key_value_heads") or heads) * head_size
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
