"""A folder in bitsandbytes' own layout: a model of plain linears on one of its grids, with floating-point tables.

It has the model type of the original, for everybody who has bitsandbytes; see `compot_deploy.exporters.huggingface.bnb`
for the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compot_deploy.core.grid import Grid
from compot_deploy.core.json_files import read_object, write_object
from compot_deploy.core.matrix import Dense, Matrix, Quantized
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.exporters.files import copy_generation, copy_present
from compot_deploy.exporters.huggingface.bnb import matrix_of, quantization_config, tensors_of
from compot_deploy.exporters.huggingface.matrices import read_tensor
from compot_deploy.exporters.huggingface.shards import Shards
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.outline import Outline, outline_of, outline_of_config
from compot_deploy.models.source import TOKENIZER_FILES
from compot_deploy.transformers_plugin.layout import FORMAT, grid_from_json, loose_tensors
from compot_deploy.transformers_plugin.weight_files import weight_files


def is_bnb(folder: Path) -> bool:
    """Whether a folder is in bitsandbytes' own layout.

    Raises:
        ArtifactError: config.json cannot be read.
    """
    settings = read_object(folder / "config.json").get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "bitsandbytes"


def write_bnb(model: CompressedModel, folder: Path, shards: Shards) -> None:
    """Write every file but the manifest.

    Raises:
        RecipeError: a matrix that the layout cannot hold, or more than one grid.
    """
    outline = outline_of(model)
    grids: set[Grid] = set()
    for name, matrix in model.matrices.items():
        if isinstance(matrix, Dense) and model.role(name) != "linear":
            shards.add(f"{name}.weight", outline.stored(name, matrix.weight))
        elif isinstance(matrix, Quantized) and model.role(name) == "linear" and outline.turned(name):
            grids.add(matrix.grid)
            for tensor, value in tensors_of(name, matrix):
                shards.add(tensor, value)
        else:
            raise RecipeError(f"{name} cannot be written in bitsandbytes' layout: only plain linears can.")
    if len(grids) != 1:
        raise RecipeError(f"bitsandbytes' layout has one grid for all linears, and here are {len(grids)}.")
    for name, loose in loose_tensors(model, outline):
        shards.add(name, loose)
    shards.finish()
    (grid,) = grids
    own = {"format": FORMAT, "linears": str(grid)}
    config = {key: value for key, value in model.stored_config.items() if key != "auto_map"}
    config.setdefault("architectures", [type(outline.meta).__name__])
    config |= {"quantization_config": quantization_config(grid, _floating(outline)), "compot": own}
    write_object(folder / "config.json", config, indent=1)
    copy_generation(model.source, folder)
    copy_present(model.source, folder, TOKENIZER_FILES)


def read_bnb(folder: Path) -> CompressedModel:
    """The whole model of a folder: what `write_bnb` was given.

    Raises:
        ArtifactError: the folder is not as it was written.
    """
    where = folder / "config.json"
    config = read_object(where)
    own = config.pop("compot", None)
    if config.get("auto_map"):
        raise ArtifactError(f"{where}: auto_map points to code, which this folder does not need: refused.")
    if not isinstance(own, Mapping) or own.get("format") != FORMAT:
        raise ArtifactError(f"{where}: compot-deploy did not write this folder, or a newer version did.")
    grid = grid_from_json(own.get("linears"), str(where))
    settings = config.pop("quantization_config")
    outline = outline_of_config(config, str(where))
    if settings != quantization_config(grid, _floating(outline)):
        raise ArtifactError(f"{where}: quantization_config is not what belongs to {grid}. Export it again.")
    tensors = {name: read_tensor(path, name) for name, path in weight_files(folder).items()}
    matrices: dict[str, Matrix] = {}
    for name in outline.names:
        if name in outline.layout.names:
            matrices[name] = matrix_of(name, tensors, outline.shape(name), grid)
        elif f"{name}.weight" in tensors:
            matrices[name] = Dense(outline.stored(name, tensors[f"{name}.weight"]))
    return outline.compressed(config, matrices, tensors, str(folder))


def _floating(outline: Outline) -> tuple[str, ...] | None:
    """Linears that stay in floating point; None where transformers finds them by itself, a decoder's head."""
    if outline.task.generates and not outline.outside:
        return None
    head = () if outline.layout.head is None else (outline.layout.head,)
    return (*outline.outside, *head)
