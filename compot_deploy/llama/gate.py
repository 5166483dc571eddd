"""Whether llama.cpp computes a type of model as torch does, asked of a tiny one with the features of the real one.

The table of types says what llama.cpp's graphs have built in. A configuration may hold something that nobody thought
of; so before any work a random model of the same settings, with few blocks and small widths, goes through both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from compot_deploy.core.matrix import Dense
from compot_deploy.errors import CompotDeployError, UnsupportedModelError
from compot_deploy.exporters.gguf.library import LlamaError, load_library
from compot_deploy.exporters.gguf.metadata import describe
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama.apart import logits_apart
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.configuration import config_of, settings_of
from compot_deploy.models.experts import unstack
from compot_deploy.models.outline import outline_of_config
from compot_deploy.models.small import with_random_weights

_LAYERS: Final = 7
"""One more than the longest period of blocks with sliding windows that models have."""

_HEADS, _WIDTH, _WINDOW, _TOKENS, _VOCABULARY = 2, 128, 8, 28, 128

LIMIT: Final = 0.02
"""Largest difference of a logit over the spread of logits. What is left out changes a tenth of it and more; llama.cpp's
table of GELU in float16 two thousandths."""


def objection(config: Mapping[str, Any]) -> str | None:
    """Why a model of a configuration is not written to GGUF; None where both agree, or nobody can be asked."""
    try:
        load_library()
    except CompotDeployError:
        return None
    return _objection(json.dumps(dict(config), sort_keys=True))


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same features with few blocks, two heads of the real size and small widths."""
    model_type = config["model_type"]
    settings = settings_of(config, f"The configuration of this {model_type}")
    described, values = describe(config), config_of(settings)
    sizes = described.sizes
    layers = min(sizes.layers, _LAYERS)
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": _HEADS * sizes.head_size,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS if sizes.key_value_heads == sizes.heads else 1,
        "head_dim": sizes.head_size,
        "intermediate_size": _WIDTH,
        "n_inner": _WIDTH,
        "vocab_size": _VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if described.kind.window != "cut" and getattr(settings, "sliding_window", None) is not None:
        changes["sliding_window"] = _WINDOW
    for name in ("layer_types", "no_rope_layers"):
        if values.get(name) is not None:
            changes[name] = list(values[name])[:layers]
    renamed = getattr(type(settings), "attribute_map", {})
    return values | {
        renamed.get(name, name): value
        for name, value in changes.items()
        if getattr(settings, name, None) is not None
    }


@lru_cache(maxsize=8)
def _objection(config: str) -> str | None:
    whole = json.loads(config)
    try:
        tiny = small(whole)
        describe(tiny)
    except UnsupportedModelError:
        return None  # what is said of the number of blocks, and cannot be shown with fewer
    try:
        furthest = difference(tiny)
    except LlamaError as error:
        return f"a tiny {whole['model_type']} with the features of this one is refused by llama.cpp: {error}"
    if furthest <= LIMIT:
        return None
    return (
        f"a tiny {whole['model_type']} with the features of this one has other logits in llama.cpp than in torch: they "
        f"differ by {furthest:.2g} of their spread, at most {LIMIT} is rounding. Use another --format."
    )


def difference(config: Mapping[str, Any]) -> float:
    """Largest difference of a logit between torch and llama.cpp over the spread of logits, for random weights.

    Raises:
        LlamaError: llama.cpp refuses the file, or aborts on it.
        UnsupportedModelError: the file cannot be written.
    """
    from transformers import AutoModelForCausalLM

    settings = settings_of(config, f"The configuration of this {config['model_type']}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()
        with_random_weights(model)
        tokens = torch.randint(3, _VOCABULARY, (1, _TOKENS))
    unstack(model)
    with torch.no_grad():
        wanted = model(tokens).logits[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write(_compressed(model, config, folder), path, GgufOptions(type="F32"))
        found = logits_apart(path, tokens[0].tolist())
    return float(np.abs(found - wanted).max() / wanted.std())


def _compressed(model: nn.Module, config: Mapping[str, Any], folder: str) -> CompressedModel:
    outline = outline_of_config({**config, "architectures": [type(model).__name__]}, "A tiny model")
    state = {name: value.detach() for name, value in model.named_parameters()}
    matrices = {
        name: Dense(outline.stored(name, state.pop(f"{name}.weight")).contiguous()) for name in outline.names
    }
    return outline.compressed(config, matrices, state, folder)
