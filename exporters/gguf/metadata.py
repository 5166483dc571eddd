"""What llama.cpp must know besides the weights: sizes, rotary embeddings and their scalings, provenance.

Several of these keys are silently wrong when absent (rope base, rope_freqs, attn_factor), so a feature that
has no key is refused instead of dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int64

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.decoder_shape import DecoderShape, decoder_shape
from compot_deploy.models.hints import Architecture
from compot_deploy.models.rotary import portable_config

Value = str | int | float | bool | list[str] | list[int] | list[float]
"""What a metadata key may hold; integers are written as uint32, floats as float32."""

_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings in one shape, whichever generation of transformers wrote the configuration.

    Raises:
        UnsupportedModelError: a scaling that llama.cpp has no key for.
    """
    found: dict[str, Any] = dict(portable_config(config)["rope_parameters"])
    found.setdefault("rope_theta", 10000.0)
    kind = found.get("rope_type")
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"Rope scaling {kind!r} cannot be written to GGUF; supported are: {', '.join(_ROPE_TYPES)}."
        )
    partial = float(found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor={partial} cannot be written to GGUF; only 1.0 can."
        )
    if kind == "yarn" and found.get("truncate") is False:
        raise UnsupportedModelError(
            "Yarn with truncate=false cannot be written to GGUF: llama.cpp truncates."
        )
    return found


def hyperparameters(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Value]:
    """Sizes, norms and rope under the prefix of the base architecture.

    Raises:
        UnsupportedModelError: see `rope_parameters`.
    """
    prefix, shape = architecture.ggml_name, decoder_shape(architecture, config)
    result: dict[str, Value] = {
        f"{prefix}.vocab_size": shape.vocabulary,
        f"{prefix}.context_length": context_length(shape),
        f"{prefix}.embedding_length": shape.hidden,
        f"{prefix}.block_count": shape.layers,
        f"{prefix}.feed_forward_length": shape.intermediate,
        f"{prefix}.attention.head_count": shape.heads,
        f"{prefix}.attention.head_count_kv": shape.key_value_heads,
        f"{prefix}.attention.layer_norm_rms_epsilon": shape.norm_epsilon,
        f"{prefix}.attention.key_length": shape.head_size,
        f"{prefix}.attention.value_length": shape.head_size,
        f"{prefix}.rope.dimension_count": shape.head_size,
    }
    rope = rope_parameters(config)
    result[f"{prefix}.rope.freq_base"] = float(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        result[f"{prefix}.rope.scaling.type"] = kind
        result[f"{prefix}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or shape.context
        result[f"{prefix}.rope.scaling.original_context_length"] = int(original)
        result[f"{prefix}.rope.scaling.attn_factor"] = _yarn_attention(rope)
        result[f"{prefix}.rope.scaling.yarn_attn_factor"] = _yarn_attention(rope)
        result[f"{prefix}.rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32.0)
        result[f"{prefix}.rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1.0)
    return result


def context_length(shape: DecoderShape) -> int:
    """Positions that the file may promise: no more than a sliding window, which llama.cpp's llama ignores."""
    return min([shape.context, *(window for window in shape.windows if window is not None)])


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """Yarn's attention factor relative to the ``1 + 0.1 ln(factor)`` that llama.cpp multiplies in itself."""
    factor = float(rope["factor"])

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    wanted = rope.get("attention_factor")
    if wanted is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        wanted = scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
    return float(wanted) / scale(1.0)


def rope_frequencies(
    architecture: Architecture, config: Mapping[str, Any]
) -> Float32[np.ndarray, " half_head"] | None:
    """Divisors of the rotary frequencies, the tensor ``rope_freqs.weight``; only Llama-3 scaling has them.

    Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1).
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    head = decoder_shape(architecture, config).head_size
    exponents = np.arange(0, head, 2, dtype=np.float64) / head
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / factor + blend), dtype=np.float32)


def interleaved_rope(heads: int, head: int) -> Int64[np.ndarray, " outputs"]:
    """Which column of q or k goes where: ``new[:, j] = old[:, order[j]]``.

    Hugging Face rotates entry i with entry i + head/2, llama.cpp's ``llama`` rotates neighbours.
    For two heads of size 4: ``[0, 2, 1, 3, 4, 6, 5, 7]``.
    """
    return np.arange(heads * head).reshape(heads, 2, head // 2).swapaxes(1, 2).reshape(-1)


def add_key(writer: Any, key: str, value: Value) -> None:
    """Announce a key to a writer of the package gguf."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
