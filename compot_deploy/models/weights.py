"""The weights of a Hugging Face folder as a mapping from names to tensors, read lazily.

Nothing is unpickled unless asked for, and then only by torch's weights-only reader. Damage (truncated files, NaN,
missing tensors) is found where it is read, and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compot_deploy.errors import InputError


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a folder by name; each access reads one tensor and checks that it is finite."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self._pickled: dict[Path, Mapping[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as reader:
                    tensor = reader.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: the tensor {name} cannot be read ({error}). Download the file again."
                ) from None
        else:
            tensor = self._unpickle(path)[name]
        assert isinstance(tensor, Tensor)
        return _finite(tensor, name, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its values."""
        path = self.files[name]
        if path.suffix != ".safetensors":
            return tuple(self._unpickle(path)[name].shape)
        with safe_open(path, framework="pt") as reader:
            return tuple(reader.get_slice(name).get_shape())

    def _unpickle(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._pickled:
            try:
                self._pickled = {path: torch.load(path, map_location="cpu", weights_only=True, mmap=True)}
            except Exception as error:
                raise InputError(f"{path} cannot be read as plain weights ({error}).") from None
        return self._pickled[path]


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names, still lazy.

    Args:
        tensors: what is read.
        names: name here to name there.
    """

    def __init__(self, tensors: LazyTensors, names: Mapping[str, str]) -> None:
        self._tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its values."""
        return self._tensors.shape(self.names[name])


class Held(Mapping[str, Tensor]):
    """Tensors in memory; each access checks that they are finite, and gives a copy: nobody changes what others read.

    Args:
        tensors: by name.
        folder: where they were read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        self._tensors, self._folder = dict(tensors), folder

    def __getitem__(self, name: str) -> Tensor:
        return _finite(self._tensors[name], name, self._folder).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{path}: {name} has {count} values that are NaN or infinite out of {tensor.numel()}. "
            "The checkpoint is damaged; download or save it again."
        )
    return tensor


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        InputError: not there, or not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(
            f"{folder} has no {name}, so it is not a transformers model folder. "
            "Save one with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object.")
    return value


def weight_files(folder: Path, allow_pickle: bool) -> dict[str, Path]:
    """The file of every tensor of a folder.

    Raises:
        InputError: no weights, damaged or missing files, or pickles that were not allowed.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    files[name] = path
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or damaged ({error}). Download it again.") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name, part in read_json(folder, index.name).get("weight_map", {}).items():
            if name not in files:
                raise InputError(
                    f"{index} promises {name} in {part}, which is missing. Download {part} again."
                )
    if files:
        return files
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise InputError(f"{folder} holds no weights: no *.safetensors file was found.")
    if not allow_pickle:
        raise InputError(
            f"{folder} holds only pickled weights ({pickles[0].name}), which can run code when read. Convert them "
            "to safetensors, or give --allow-pickle to read them with torch's weights-only reader."
        )
    for path in pickles:
        for name in LazyTensors({})._unpickle(path):
            files[name] = path
    return files
