"""The cache of a transformers model: what its forward pass calls it, which transformers has changed, and what it holds.

Most layers keep keys and values of every token. Others keep a state of one size however long the text is: the last
inputs of a convolution, or what a recurrence has come to.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn


def cache_argument(model: nn.Module) -> str:
    """The argument of the forward pass that takes the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returns; None without one."""
    found = output.get("cache")
    return output.get("past_key_values") if found is None else found


def cache_tensors(cache: Any) -> list[Tensor]:
    """Keys and values, layer by layer, of those that keep them; none of a cache that holds something else."""
    with_states = {state.layer for state in states_of(cache)}
    layers = [layer for number, layer in enumerate(getattr(cache, "layers", ())) if number not in with_states]
    tensors = [part for layer in layers for part in _layer_tensors(layer)]
    return tensors if all(isinstance(tensor, Tensor) for tensor in tensors) else []


@dataclass(frozen=True)
class State:
    """What a layer keeps of a text in the place of keys and values.

    Attributes:
        kind: ``conv`` or ``recurrent``.
        layer: its number.
        values: with the batch first.
    """

    kind: str
    layer: int
    values: Tensor


STATES: Final = ("conv", "recurrent")


def states_of(cache: Any) -> list[State]:
    """States of one size, layer by layer; none of a cache of keys and values alone."""
    return [
        State(kind, number, state)
        for number, layer in enumerate(getattr(cache, "layers", ()))
        for kind in STATES
        for state in getattr(layer, f"{kind}_states", {}).values()
        if isinstance(state, Tensor)
    ]


def attending(cache: Any) -> tuple[int, ...]:
    """Numbers of the layers that keep keys and values."""
    return tuple(
        number
        for number, layer in enumerate(getattr(cache, "layers", ()))
        if isinstance(getattr(layer, "keys", None), Tensor)
    )


def cache_with_states(config: Any, states: Sequence[State]) -> Any:
    """A cache in which some layers have a state already; keys and values are to be added.

    A state of zeros is that of a text that has not begun.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for state in states:
        layer = cache.layers[state.layer]
        values = state.values.clone()  # it is written to
        getattr(layer, f"{state.kind}_states")[0] = values
        getattr(layer, f"is_{state.kind}_states_initialized")[0] = True
        layer.device, layer.dtype = values.device, values.dtype
        layer.has_previous_state[0] = True
        if state.kind == "conv":
            layer.conv_kernel_size[0] = values.shape[-1]
    return cache


def _layer_tensors(layer: Any) -> tuple[Any, Any]:
    return getattr(layer, "keys", None), getattr(layer, "values", None)
