"""The key-value cache of a transformers model: what its forward pass calls it, which transformers has changed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def cache_argument(model: nn.Module) -> str:
    """The argument of the forward pass that takes the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returns; None without one."""
    found = output.get("cache")
    return output.get("past_key_values") if found is None else found


def cache_tensors(cache: Any) -> list[Tensor]:
    """Keys and values, layer by layer; none of a cache that holds something else."""
    tensors = [part for layer in getattr(cache, "layers", ()) for part in _layer_tensors(layer)]
    return tensors if all(isinstance(tensor, Tensor) for tensor in tensors) else []


def _layer_tensors(layer: Any) -> tuple[Any, Any]:
    return getattr(layer, "keys", None), getattr(layer, "values", None)
