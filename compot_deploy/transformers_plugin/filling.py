"""A compressed model in memory, as it would load from a folder that was exported from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compot_deploy.core.matrix import Dense, Matrix, Quantized
from compot_deploy.errors import InputError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.outline import outline_of
from compot_deploy.transformers_plugin.configuration import CompotConfig
from compot_deploy.transformers_plugin.folder import base_config, door_name
from compot_deploy.transformers_plugin.layout import (
    entry_of,
    loose_tensors,
    sharers,
    to_json,
)
from compot_deploy.transformers_plugin.modeling import _linear, compressed_class
from compot_deploy.transformers_plugin.modules import CompotEmbedding


def from_compressed(model: CompressedModel, *, dtype: torch.dtype = torch.float32) -> Any:
    """A compressed model in memory, as it would load from a folder that was exported from it.

    Args:
        model: what the exporters are given.
        dtype: of everything that is not packed.

    Raises:
        InputError: a tensor that the model class does not have.
    """
    owners: dict[str, str] = {}
    entries, values = [], {}
    for name, matrix in model.matrices.items():
        if isinstance(matrix, Dense):
            continue
        values[name] = matrix
        entries.append(entry_of(name, matrix, owners))
    outline = outline_of(model)
    entries += sharers(model, outline, entries)
    base = CompotConfig(base_config=base_config(model)).base()
    base_class: Any = type(outline.meta)
    base.compot = to_json(entries, base_class.__name__)
    made = compressed_class(base_class, door_name(outline.task.auto_class))._from_config(base, dtype=dtype)
    for name, matrix in values.items():
        fill(made.get_submodule(name), matrix)
    state = {
        f"{name}.weight": outline.stored(name, matrix.weight)
        for name, matrix in model.matrices.items()
        if isinstance(matrix, Dense)
    }
    state |= dict(loose_tensors(model, outline))
    parameters = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise InputError(f"The model has no tensor {name} of the shape {tuple(tensor.shape)} to fill.")
        with torch.no_grad():
            parameters[name].copy_(tensor)
    return made.eval()


def fill(module: nn.Module, matrix: Matrix) -> None:
    """Put the numbers of a matrix into its compressed module."""
    if isinstance(module, CompotEmbedding):
        assert isinstance(matrix, Quantized)
        module.leaves[0].fill(matrix)
    else:
        _linear(module).fill(matrix)
