"""The matrices of a folder, read back when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix
from compot_deploy.core.packed import unpack
from compot_deploy.errors import ArtifactError
from compot_deploy.models.checkpoint import may_be_absent
from compot_deploy.models.outline import Outline
from compot_deploy.transformers_plugin.layout import Entry, leaf_name


class FolderMatrices(Mapping[str, Matrix]):
    """Matrices by module path, in running order; each access reads one.

    Args:
        entries: of the packed ones.
        files: tensor name to file.
        outline: of the model.
        where: for messages.

    Raises:
        ArtifactError: a matrix that no file holds.
    """

    def __init__(
        self, entries: Sequence[Entry], files: Mapping[str, Path], outline: Outline, where: str
    ) -> None:
        self._files, self._outline = files, outline
        self._entries = {entry.name: entry for entry in entries}
        names = outline.names
        self._names = {n: None for n in names if n in self._entries or f"{n}.weight" in files}
        missing = [n for n in names if n not in self._names and not may_be_absent(f"{n}.weight")]
        if missing:
            raise ArtifactError(f"{where}: no file holds {missing[0]}. Export the model again.")

    def __getitem__(self, name: str) -> Matrix:
        if name not in self._names:
            raise KeyError(name)
        entry = self._entries.get(name)
        if entry is None:
            return Dense(self._outline.stored(name, self._read(f"{name}.weight")))
        read = []
        for number, scheme in enumerate(entry.schemes):
            shared = entry.owner is not None and number % 2 == 0
            path = f"{entry.owner if shared else name}.{leaf_name(number, len(entry.schemes))}"
            read.append(unpack({tensor: self._read(f"{path}.{tensor}") for tensor in scheme.tensors}, scheme))
        if not entry.factorized:
            return read[0]
        return Factorized(
            tuple(
                FactorPair(read[at], read[at + 1], entry.dictionary or name, entry.schemes[at + 1].pattern)
                for at in range(0, len(read), 2)
            )
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

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

    def __contains__(self, name: object) -> bool:
        return name in self._files


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
