"""What a configuration says about a decoder: sizes, rotary tables, windows, and what the graph cannot express.

transformers 4.56 to 5.x write configurations in two styles; both are read, and what is written is readable in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.models.hints import Architecture

ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "llama3")
"""Kinds of rotary embedding whose tables do not change while a sequence grows within the context."""


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


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of the rotary embedding, shape (context, head_size / 2) each, float32."""

    cosine: Tensor
    sine: Tensor


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4.56 and 5.x read alike.

    Version 5 keeps the rotary embedding in ``rope_parameters``, by type of layer where types differ; version 4 in
    ``rope_theta`` and ``rope_scaling``, with ``rope_local_base_freq`` for sliding windows. Written is both, saying the
    same.
    """
    result = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = dict(config.get("rope_scaling") or {}) or dict(config.get("rope_parameters") or {})
    by_layer = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    if not by_layer and config.get("rope_local_base_freq") is not None:
        by_layer = {_FULL: rope, _SLIDING: {"rope_theta": config["rope_local_base_freq"]}}
    if by_layer:
        both = {key: _rope(value, config.get("rope_theta")) for key, value in by_layer.items()}
        result["rope_parameters"] = both
        if set(both) == {_FULL, _SLIDING}:
            result["rope_theta"], result["rope_scaling"] = _theta_and_scaling(both[_FULL])
            result["rope_local_base_freq"] = both[_SLIDING].get("rope_theta")
        return result
    result["rope_parameters"] = _rope(rope, config.get("rope_theta"))
    theta, result["rope_scaling"] = _theta_and_scaling(result["rope_parameters"])
    if theta is not None:
        result["rope_theta"] = theta
    return result


_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


def _rope(given: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    """One rotary embedding as version 5 spells it."""
    rope = dict(given)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    own = rope.pop("rope_theta", None) or theta
    return {"rope_type": kind, **rope, **({} if own is None else {"rope_theta": own})}


def _theta_and_scaling(rope: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The same as version 4 spells it."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return rope.get("rope_theta"), None if rope["rope_type"] == "default" else scaling


def check_supported(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Refuse what the graph cannot express, from the configuration alone.

    Raises:
        UnsupportedModelError: a rotary embedding that changes with the sequence length or turns only a part
            of each head, or sizes that do not fit each other.
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
    if shape.heads % shape.key_value_heads:
        raise UnsupportedModelError(
            f"{shape.heads} query heads cannot share {shape.key_value_heads} key and value heads evenly."
        )
    if shape.head_size % 8:
        raise UnsupportedModelError(
            f"A {name} with heads of {shape.head_size} is not supported in ONNX: "
            "GroupQueryAttention takes multiples of 8."
        )


def decoder_shape(architecture: Architecture, config: Mapping[str, Any]) -> DecoderShape:
    """Sizes of the decoder, with the defaults of transformers where config.json is silent."""
    settings = transformers_config(config)
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
        windows=_windows(settings, layers),
    )


def rotary_tables(config: Mapping[str, Any], rows: int) -> RotaryTables:
    """The tables that transformers' own rotary embedding would compute, in the same float32 steps."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(transformers_config(config))
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), rotary.inv_freq.float())
    scaling = float(rotary.attention_scaling)
    return RotaryTables(cosine=angles.cos() * scaling, sine=angles.sin() * scaling)


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The configuration as an object of the installed transformers, defaults filled in.

    Raises:
        InputError: transformers refuses it.
    """
    from transformers import AutoConfig

    values = {
        k: v for k, v in portable_config(config).items() if k not in ("quantization_config", "auto_map")
    }
    model_type = values.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # validation errors differ from version to version
        raise InputError(f"transformers refuses the configuration of this {model_type}: {error}") from error


def _windows(settings: Any, layers: int) -> tuple[int | None, ...]:
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
