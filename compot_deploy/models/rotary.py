"""What a configuration says about rotary embeddings, in the styles of both generations of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

ROPE_KEYS: Final = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")
"""Where a configuration keeps them."""

_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


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
