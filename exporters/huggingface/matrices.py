"""The matrices of a folder, read back when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from compot_deploy.core.matrix import Dense, Factorized, Matrix, Pair
from compot_deploy.core.packed import unpack
from compot_deploy.errors import ArtifactError
from compot_deploy.models.hints import Architecture
from compot_deploy.transformers_plugin.layout import from_json, leaf_name
from compot_deploy.transformers_plugin.weight_files import check_tensors


class FolderMatrices(Mapping[str, Matrix]):
    """Matrices by module path, in block order; each access reads one."""

    def __init__(self, folder: Path, config: Mapping[str, Any], architecture: Architecture) -> None:
        where = str(folder / "config.json")
        entries = from_json(config.get("compot"), where)
        self._files = check_tensors(folder, entries, where)
        self._entries = {entry.name: entry for entry in entries}
        head = self._entries.get(architecture.head)
        self.tied = head is not None and head.owner is not None
        if self.tied:
            del self._entries[architecture.head]
        packed = {name for entry in entries for name, _, _ in entry.tensors()}
        layers = config["base_config"].get("num_hidden_layers")
        if not isinstance(layers, int):
            raise ArtifactError(f"{where}: num_hidden_layers is {layers!r}, not a number. Export again.")
        names = (*architecture.linear_names(layers), architecture.embedding, architecture.head)
        self._names = [n for n in names if n in self._entries or f"{n}.weight" in self._files]
        missing = [name for name in names[:-1] if name not in self._names]
        if missing:
            raise ArtifactError(f"{where}: no file holds {missing[0]}. Export the model again.")
        floating = {f"{name}.weight" for name in self._names if name not in self._entries}
        self.tensors: Mapping[str, Tensor] = FolderTensors(
            {name: path for name, path in self._files.items() if name not in packed | floating}
        )

    def __getitem__(self, name: str) -> Matrix:
        if name not in self._names:
            raise KeyError(name)
        entry = self._entries.get(name)
        if entry is None:
            return Dense(self._read(f"{name}.weight").T)
        read = []
        for number, form in enumerate(entry.forms):
            shared = entry.owner is not None and number % 2 == 0
            path = f"{entry.owner if shared else name}.{leaf_name(number, len(entry.forms))}"
            read.append(unpack({tensor: self._read(f"{path}.{tensor}") for tensor in form.tensors}, form))
        if not entry.factorized:
            return read[0]
        return Factorized(
            tuple(
                Pair(read[at], read[at + 1], entry.dictionary or name, entry.forms[at + 1].pattern)
                for at in range(0, len(read), 2)
            )
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)


class FolderTensors(Mapping[str, Tensor]):
    """Ordinary tensors by name; each access reads one."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file.

    Raises:
        ArtifactError: it is not there, or the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            tensor = reader.get_tensor(name)
    except Exception as error:  # SafetensorError and OSError
        raise ArtifactError(f"{path}: the tensor {name} cannot be read ({error}). Copy it again.") from None
    assert isinstance(tensor, Tensor)
    return tensor
