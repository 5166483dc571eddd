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
from compot_deploy.exporters.files import copy_present
from compot_deploy.exporters.huggingface.bnb import matrix_of, quantization_config, tensors_of
from compot_deploy.exporters.huggingface.matrices import read_tensor
from compot_deploy.exporters.huggingface.shards import Shards
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.decoders import linear_shapes
from compot_deploy.models.hints import find_architecture
from compot_deploy.models.source import TOKENIZER_FILES
from compot_deploy.transformers_plugin.layout import FORMAT, grid_from_json
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
    grids: set[Grid] = set()
    for name, matrix in model.matrices.items():
        if isinstance(matrix, Dense):
            shards.add(f"{name}.weight", matrix.weight.T)
        elif isinstance(matrix, Quantized) and name not in (
            model.architecture.embedding,
            model.architecture.head,
        ):
            grids.add(matrix.grid)
            for tensor, value in tensors_of(name, matrix):
                shards.add(tensor, value)
        else:
            raise RecipeError(f"{name} cannot be written in bitsandbytes' layout: only plain linears can.")
    if len(grids) != 1:
        raise RecipeError(f"bitsandbytes' layout has one grid for all linears, and here are {len(grids)}.")
    for name in model.tensors:
        if not name.endswith("rotary_emb.inv_freq"):
            shards.add(name, model.tensors[name])
    shards.finish()
    (grid,) = grids
    own = {"format": FORMAT, "linears": str(grid)}
    config = {key: value for key, value in model.config.items() if key != "auto_map"}
    config |= {
        "quantization_config": quantization_config(grid),
        "tie_word_embeddings": model.tied,
        "compot": own,
    }
    write_object(folder / "config.json", config, indent=1)
    copy_present(model.source, folder, ("generation_config.json", *TOKENIZER_FILES))


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
    if config.pop("quantization_config") != quantization_config(grid):
        raise ArtifactError(f"{where}: quantization_config is not what belongs to {grid}. Export it again.")
    architecture = find_architecture(config)
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ArtifactError(f"{where}: num_hidden_layers is {layers!r}, not a number. Export again.")
    tensors = {name: read_tensor(path, name) for name, path in weight_files(folder).items()}
    sizes = linear_shapes(config, architecture.head_size(config))
    matrices: dict[str, Matrix] = {}
    used: set[str] = set()
    for name in architecture.linear_names(layers):
        matrices[name] = matrix_of(name, tensors, sizes[name.rpartition(".")[2]], grid)
        used |= {key for key in tensors if key.startswith((f"{name}.weight", f"{name}.SCB"))}
    for name in (architecture.embedding, architecture.head):
        if f"{name}.weight" in tensors:
            matrices[name] = Dense(tensors[f"{name}.weight"].T)
            used.add(f"{name}.weight")
    return CompressedModel(
        architecture=architecture,
        config=config,
        matrices=matrices,
        tensors={name: tensor for name, tensor in tensors.items() if name not in used},
        tied=architecture.head not in matrices,
        source=str(folder),
    )
