"""What llama.cpp must know besides the weights: sizes, norms, windows, rotary embeddings, scales.

Everything is read from the object that transformers builds of a configuration; what a type of model has of its own
stands in `kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf.index import Layout
from compot_deploy.exporters.gguf.kinds import KINDS, Kind, Value
from compot_deploy.exporters.gguf.rotary import rope_keys, short_context
from compot_deploy.models.configuration import settings_of
from compot_deploy.models.decoder_shape import windows_of

_EPSILONS: Final = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_ACTIVATIONS: Final = ("hidden_act", "hidden_activation", "activation_function")
_CONTEXT: Final = 2048
"""Positions of a model whose configuration does not say: one without any tables of them."""

_OLMO_EPSILON: Final = 1e-5
"""Of norms whose configuration has no word for it."""


@dataclass(frozen=True)
class Sizes:
    """What names, orders and keys depend on.

    Attributes:
        layers: number of blocks.
        heads: query heads.
        key_value_heads: key and value heads.
        head_size: width of one head.
    """

    layers: int
    heads: int
    key_value_heads: int
    head_size: int


@dataclass(frozen=True)
class Described:
    """A model as llama.cpp is told of it.

    Attributes:
        kind: the entry of its type.
        sizes: what names and orders depend on.
        keys: metadata by full name.
        context: positions that the model was made for.
        promised: positions that the file may promise, within which llama.cpp computes what transformers does: no more
            than a sliding window that it ignores, or than rotary factors for short texts reach.
    """

    kind: Kind
    sizes: Sizes
    keys: Mapping[str, Value]
    context: int
    promised: int


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The entry of a configuration's type.

    Raises:
        UnsupportedModelError: there is none.
    """
    model_type = str(config.get("model_type"))
    if model_type not in KINDS:
        raise UnsupportedModelError(
            f"GGUF has no way for a {model_type} here: {', '.join(sorted(KINDS))} have one."
        )
    return KINDS[model_type]


def describe(config: Mapping[str, Any]) -> Described:
    """What llama.cpp is told of a model.

    Raises:
        UnsupportedModelError: a type or a feature that llama.cpp does not have, or has no key for.
    """
    kind = kind_of(config)
    model_type = config["model_type"]
    settings = settings_of(config, f"The configuration of this {model_type}").get_text_config()
    reason = _refusal(kind, settings)
    if reason is not None:
        raise UnsupportedModelError(
            f"A {model_type} with {reason}: GGUF has no key for that. Use another --format."
        )
    sizes, context = _sizes(settings), _context(settings)
    windows = windows_of(settings, sizes.layers)
    promised = min([context, *(w for w in windows if w is not None)]) if kind.window == "cut" else context
    promised = min(promised, short_context(kind, config) or promised)
    own: dict[str, Value] = {
        "vocab_size": int(settings.vocab_size),
        "context_length": promised,
        "embedding_length": int(settings.hidden_size),
        "block_count": sizes.layers,
        "feed_forward_length": _intermediate(settings),
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.key_value_heads,
        "attention.layer_norm_rms_epsilon" if kind.rms else "attention.layer_norm_epsilon": _epsilon(
            settings
        ),
        "attention.key_length": sizes.head_size,
        "attention.value_length": sizes.head_size,
    }
    own |= _window_keys(kind, windows, model_type, context)
    own |= rope_keys(kind, config, sizes.head_size, context)
    own |= {key: read(settings) for key, read in kind.keys.items()}
    return Described(
        kind, sizes, {f"{kind.ggml}.{key}": value for key, value in own.items()}, context, promised
    )


def check_layout(described: Described, layout: Layout) -> None:
    """Refuse factors where the plug-in does not run them.

    Raises:
        UnsupportedModelError: only dense files can be had.
    """
    if layout != "dense" and not described.kind.factorized:
        raise UnsupportedModelError(
            f"--gguf-layout {layout}: factors in llama.cpp's {described.kind.ggml} are not proven to be run right. "
            "Use --gguf-layout dense."
        )


def _refusal(kind: Kind, settings: Any) -> str | None:
    """What of a model llama.cpp's graph would ignore; None for nothing."""
    activation = next((getattr(settings, n) for n in _ACTIVATIONS if hasattr(settings, n)), None)
    if activation is not None and activation not in kind.activations:
        return f"the activation {activation!r} where llama.cpp has {kind.activations[0]!r} built in"
    for name, values in kind.fixed.items():
        if hasattr(settings, name) and getattr(settings, name) not in values:
            return (
                f"{name}={getattr(settings, name)!r} where llama.cpp's {kind.ggml} has {values[0]!r} built in"
            )
    return kind.further(settings)


def _sizes(settings: Any) -> Sizes:
    heads = int(settings.num_attention_heads)
    return Sizes(
        layers=int(settings.num_hidden_layers),
        heads=heads,
        key_value_heads=int(getattr(settings, "num_key_value_heads", None) or heads),
        head_size=int(getattr(settings, "head_dim", None) or settings.hidden_size // heads),
    )


def _context(settings: Any) -> int:
    return int(getattr(settings, "max_position_embeddings", None) or _CONTEXT)


def _intermediate(settings: Any) -> int:
    """Width inside the MLP; some leave it at four times the width of the stream."""
    found = getattr(settings, "intermediate_size", None) or getattr(settings, "n_inner", None)
    return int(found or 4 * settings.hidden_size)


def _epsilon(settings: Any) -> float:
    return float(next((getattr(settings, n) for n in _EPSILONS if hasattr(settings, n)), _OLMO_EPSILON))


def _window_keys(
    kind: Kind, windows: tuple[int | None, ...], model_type: str, context: int
) -> dict[str, Value]:
    """Window, and which blocks have it.

    Raises:
        UnsupportedModelError: other blocks than llama.cpp can be told.
    """
    if kind.window == "cut":
        return {}
    width = next((window for window in windows if window is not None), None)
    period = kind.window if kind.window != "key" else _period(windows)
    if tuple(width if (block + 1) % period else None for block in range(len(windows))) != windows:
        raise UnsupportedModelError(
            f"A {model_type} whose blocks with a sliding window are not all but every so-manyth: GGUF has no key for "
            "that. Use another --format."
        )
    # Without a window llama.cpp would take one of its own.
    keys: dict[str, Value] = {"attention.sliding_window": width or context}
    if kind.window == "key":
        keys["attention.sliding_window_pattern"] = period
    return keys


def _period(windows: tuple[int | None, ...]) -> int:
    """Every so-manyth block sees everything; longer than the model where none does."""
    return next((at + 1 for at, window in enumerate(windows) if window is None), len(windows) + 1)


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
