"""Decoder architectures as data: names, roles, shared inputs, and what other formats call them.

An architecture is one entry of `ARCHITECTURES`: what has a native graph. What llama.cpp knows of a type is one entry of
`compot_deploy.exporters.gguf.kinds`. Nothing else in the package knows a model type by name.
Sizes (layers, heads, widths) are not here: they are read from the model's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from compot_deploy.errors import UnsupportedModelError


@dataclass(frozen=True)
class SharedInput:
    """Linears of one block that read the same activation, so one Gram serves them all.

    Attributes:
        name: what the activation is, ``attention_input`` for example.
        linears: their paths inside the block, in the order in which they are stored.
    """

    name: str
    linears: tuple[str, ...]


_DECODER_INPUTS: Final = (
    SharedInput("attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    SharedInput("attention_output", ("self_attn.o_proj",)),
    SharedInput("mlp_input", ("mlp.gate_proj", "mlp.up_proj")),
    SharedInput("mlp_hidden", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class Architecture:
    """Everything that differs between supported decoders.

    Attributes:
        model_type: ``model_type`` in config.json.
        inputs: the linears of a block, grouped by the activation that they read.
        block: path of block number ``{layer}``.
        embedding: path of the token embedding.
        head: path of the output head; absent from the checkpoint when tied.
        final_norm: path of the last norm.
        query_key_norm: RMS norms on queries and keys, per head.
        genai_type: ``model.type`` in genai_config.json.
    """

    model_type: str
    inputs: tuple[SharedInput, ...] = _DECODER_INPUTS
    block: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    query_key_norm: bool = False
    genai_type: str = "llama"

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all linears inside a block, in storage order."""
        return tuple(path for shared in self.inputs for path in shared.linears)

    def block_path(self, layer: int) -> str:
        """Module path of block number `layer`."""
        return self.block.format(layer=layer)

    def linear_names(self, layers: int) -> tuple[str, ...]:
        """Full paths of every linear of every block, in block order."""
        return tuple(f"{self.block_path(layer)}.{path}" for layer in range(layers) for path in self.linears)

    def head_size(self, config: Mapping[str, Any]) -> int:
        """Width of one attention head; configurations may set it apart from hidden / heads."""
        explicit = config.get("head_dim")
        return int(explicit) if explicit else int(config["hidden_size"]) // int(config["num_attention_heads"])


_LLAMA: Final = Architecture("llama")

ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "llama": _LLAMA,
        # Mistral is Llama with an optional sliding window.
        "mistral": replace(_LLAMA, model_type="mistral", genai_type="mistral"),
        # Qwen2 is Llama with biases on q, k and v.
        "qwen2": Architecture("qwen2", genai_type="qwen2"),
        # Qwen3 is Llama with norms on queries and keys and a head size of its own.
        "qwen3": Architecture("qwen3", query_key_norm=True, genai_type="qwen3"),
    }
)


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a configuration.

    Raises:
        UnsupportedModelError: the model type, or a feature that the configuration switches on, is not
            handled. Raised from the configuration alone, before any weight is read.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"The model type {model_type!r} is not supported. "
            f"Supported are: {', '.join(sorted(ARCHITECTURES))}."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"A {model_type} with hidden_act={activation!r} is not supported: only 'silu' is."
        )
    return ARCHITECTURES[model_type]
