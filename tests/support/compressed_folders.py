"""Hugging Face folders of tiny compressed models."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reference_onnx import (
    MODELS,
    compressed,
    rounded,
    share_dictionaries,
    torch_model,
    two_pairs,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Matrix
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.huggingface.exporter import HuggingFaceOptions
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.transformers_plugin.folder import AUTO_MAP

EXPORTER = EXPORTERS["huggingface"]
IDS = torch.arange(40).view(2, 20) % 90


def mixed(name: str, weight: Tensor) -> Matrix:
    """Pairs where they share an input, plain int4 and int3, int8 tables."""
    if "embed" in name or "lm_head" in name:
        return rounded(weight, Grid(8, 32))
    if "self_attn" in name:
        return two_pairs(name, weight)
    return rounded(weight, Grid(3 if "down" in name else 4, 32))


@functools.cache
def sample(kind: str = "llama-llama3-tied") -> CompressedModel:
    original = torch_model(MODELS[kind])
    torch.manual_seed(0)
    model = compressed(original, mixed)
    matrices = dict(model.matrices)
    for layer in range(model.layers):
        block = model.architecture.block_path(layer)
        names = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        matrices = share_dictionaries(matrices, names, f"{block}.attention_input")
    return replace(model, matrices=matrices)


def written(folder: Path, kind: str = "llama-llama3-tied", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    EXPORTER.write(sample(kind), folder, HuggingFaceOptions(**options))
    return folder


def load(folder: Path, auto: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float32, **arguments)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def other_code(config: dict[str, Any]) -> None:
    config["auto_map"] = {**AUTO_MAP, "AutoModelForCausalLM": "someone/else--evil.Model"}
