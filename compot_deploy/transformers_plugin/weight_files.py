"""The safetensors files of a compressed folder: which tensors they hold, and whether those are the promised ones.

Headers are read, not tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from compot_deploy.core.json_files import read_object
from compot_deploy.errors import ArtifactError
from compot_deploy.transformers_plugin.layout import Entry

INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model.safetensors"

SAFETENSORS_TYPES: Final = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
"""Names of types; safetensors lays tensors out by type, the last of these first."""


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from the headers of the shards themselves; the index only has to agree.

    Raises:
        ArtifactError: a shard is missing, damaged or outside the folder, or the index disagrees.
    """
    index = folder / INDEX
    if not index.is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    promised = read_object(index).get("weight_map")
    if not isinstance(promised, Mapping) or not promised:
        raise ArtifactError(f"{index} has no weight_map. Export the model again.")
    for shard in sorted({str(name) for name in promised.values()}):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.safetensors", shard):
            raise ArtifactError(
                f"{index} names the file {shard!r}, which is not a plain file name inside the folder: refused."
            )
    found = {
        name: folder / shard for shard in sorted(set(promised.values())) for name in _names(folder / shard)
    }
    for name, shard in promised.items():
        if found.get(name) != folder / shard:
            raise ArtifactError(f"{index} promises {name} in {shard}, and it is not there. Copy it again.")
    return found


def check_tensors(folder: Path, entries: Sequence[Entry], where: str) -> dict[str, Path]:
    """Compare every stored leaf with its entry: presence, shape, type. Reads headers only.

    Returns:
        Tensor name → file.

    Raises:
        ArtifactError: the first tensor that differs, with both shapes.
    """
    files = weight_files(folder)
    shapes = _shapes(files)
    for entry in entries:
        for name, shape, dtype in entry.tensors():
            if name not in shapes:
                raise ArtifactError(
                    f"{where} promises the tensor {name}, which no file holds. Export the model again."
                )
            stored, kind = shapes[name]
            if stored != shape or kind != SAFETENSORS_TYPES[dtype]:
                raise ArtifactError(
                    f"{name} is {kind} {list(stored)} in the file, and {where} says "
                    f"{SAFETENSORS_TYPES[dtype]} {list(shape)} (k or another size was changed): export the model again."
                )
    return files


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as reader:
            return list(reader.keys())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing. Copy the folder again.") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Copy it again.") from None


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                piece = reader.get_slice(name)
                found[name] = (tuple(piece.get_shape()), str(piece.get_dtype()))
    return found
