"""Rotary embeddings as llama.cpp is told of them: keys for base and scaling, a tensor for Llama 3's.

Several of these are silently wrong when absent (rope base, rope_freqs, attn_factor), so a scaling that has no key is
refused instead of dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int64

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf.kinds import Kind, Value
from compot_deploy.models.rotary import portable_config

_ROUNDED: Final = 256

_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


def rope_parameters(kind: Kind, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Rotary settings by type of layer, in one shape, whichever generation of transformers wrote the configuration.

    Models that rotate all blocks alike have ``full_attention`` alone; those without rotary embeddings nothing.

    Raises:
        UnsupportedModelError: a scaling that llama.cpp has no key for.
    """
    if not kind.rotary:
        return {}
    found: dict[str, Any] = dict(portable_config(config)["rope_parameters"])
    by_layer = {key: value for key, value in found.items() if isinstance(value, Mapping)}
    if not by_layer:
        return {_FULL: _checked(kind, found, config)}
    made = {key: _checked(kind, value, config) for key, value in by_layer.items()}
    if kind.window == "key":
        if made[_SLIDING]["rope_type"] != "default":
            raise UnsupportedModelError(
                "Rotary embeddings of sliding windows that are scaled cannot be written to GGUF."
            )
        return made
    first, *others = made.values()
    if any(other != first for other in others):
        raise UnsupportedModelError(
            f"Rotary embeddings that differ between blocks cannot be written to GGUF for llama.cpp's {kind.ggml}."
        )
    return {_FULL: first}


def _checked(kind: Kind, given: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = dict(given)
    found.setdefault("rope_theta", 10000.0)
    scaling = found.get("rope_type")
    if scaling not in kind.rotary:
        raise UnsupportedModelError(
            f"Rope scaling {scaling!r} cannot be written to GGUF for llama.cpp's {kind.ggml}; supported are: "
            f"{', '.join(kind.rotary)}."
        )
    partial = float(found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0)
    if partial != 1.0 and not kind.partial:
        raise UnsupportedModelError(
            f"partial_rotary_factor={partial} cannot be written to GGUF for llama.cpp's {kind.ggml}; only 1.0 can."
        )
    found["partial_rotary_factor"] = partial
    if scaling == "yarn" and found.get("truncate") is False:
        raise UnsupportedModelError(
            "Yarn with truncate=false cannot be written to GGUF: llama.cpp truncates."
        )
    return found


def rope_keys(kind: Kind, config: Mapping[str, Any], head: int, context: int) -> dict[str, Value]:
    """Keys behind the prefix of the architecture.

    Args:
        kind: of the model.
        config: of the model.
        head: width of one head.
        context: positions that the model was made for.

    Raises:
        UnsupportedModelError: see `rope_parameters`.
    """
    by_layer = rope_parameters(kind, config)
    if not by_layer:
        return {}
    rope = by_layer[_FULL]
    keys: dict[str, Value] = {
        "rope.dimension_count": int(head * rope["partial_rotary_factor"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if _SLIDING in by_layer:
        keys["rope.freq_base_swa"] = float(by_layer[_SLIDING]["rope_theta"])
    scaling = rope["rope_type"]
    if scaling in ("linear", "yarn"):
        keys["rope.scaling.type"] = scaling
        keys["rope.scaling.factor"] = float(rope["factor"])
    if scaling == "longrope":
        original = short_context(kind, config) or context
        keys["rope.scaling.original_context_length"] = original
        keys["rope.scaling.attn_factor"] = _longrope_attention(rope, context / original, original)
    if scaling == "yarn":
        original = rope.get("original_max_position_embeddings") or context
        keys["rope.scaling.original_context_length"] = int(original)
        keys["rope.scaling.attn_factor"] = _yarn_attention(rope)
        keys["rope.scaling.yarn_attn_factor"] = _yarn_attention(rope)
        keys["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32.0)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1.0)
    return keys


def short_context(kind: Kind, config: Mapping[str, Any]) -> int | None:
    """Positions that the rotary factors for short texts reach; None without such factors.

    Transformers takes those for long texts where a text is longer, llama.cpp where its context is, rounded up to 256.

    Raises:
        UnsupportedModelError: a number that llama.cpp would round up.
    """
    rope = rope_parameters(kind, config).get(_FULL, {})
    if rope.get("rope_type") != "longrope":
        return None
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if not isinstance(original, int) or original % _ROUNDED:
        raise UnsupportedModelError(
            f"Longrope with original_max_position_embeddings={original} cannot be written to GGUF: llama.cpp rounds "
            f"contexts up to {_ROUNDED}."
        )
    return original


def _longrope_attention(rope: Mapping[str, Any], factor: float, original: int) -> float:
    """How much longrope enlarges cosines and sines, as transformers computes it."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    factor = float(rope.get("factor") or factor)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


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


def rope_tensors(
    kind: Kind, config: Mapping[str, Any], head: int
) -> Mapping[str, Float32[np.ndarray, " half_head"]]:
    """Divisors of the rotary frequencies by tensor name; only the scalings of Llama 3 and Phi-3 have them."""
    rope = rope_parameters(kind, config).get(_FULL, {})
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.asarray(rope[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, head)}
    return {}


def _llama3_divisors(rope: Mapping[str, Any], head: int) -> Float32[np.ndarray, " half_head"]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
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
