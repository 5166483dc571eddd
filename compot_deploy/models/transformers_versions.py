"""What releases of transformers spell differently, from 4.56 to 5.x: every such pair stands here, and nowhere else.

Release 5.24 calls a decoder's keys and values ``cache``, as an argument of the forward pass and as a field of what
it returns; releases before call both ``past_key_values``. The model is asked which of them it knows, not the release
for its number, so that a model that was renamed earlier or later than the others runs too.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def cache_keyword(model: nn.Module) -> str:
    """The argument by which the forward pass of `model` takes its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def forward_with_cache(model: nn.Module, cache: Any, **inputs: Tensor) -> Any:
    """What `model` returns for `inputs` after all that `cache` holds; `cache_of` finds the longer cache in it.

    Args:
        model: a decoder of transformers.
        cache: of the tokens before, None for the first.
        inputs: ``input_ids``, and what else its forward pass takes.
    """
    return model(**inputs, use_cache=True, **{cache_keyword(model): cache})


def cache_of(output: Any) -> Any:
    """The cache that a model of transformers returned; None where it keeps none."""
    # Asking for the old name warns in a release that has the new one, so the new one is asked for first.
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    return getattr(output, name, None)


def hidden_states_of(output: Any) -> Tensor:
    """What a decoder layer returned: a tensor in releases of today, a tuple that starts with it in older ones."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
