"""The weights of a Hugging Face folder as a mapping from names to tensors, read lazily.

Nothing is unpickled unless asked for, and then only by torch's weights-only reader. Damage (truncated files, NaN,
missing tensors) is found where it is read, and named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compot_deploy.core.parsing import UnreadableError, decoded, json_of
from compot_deploy.errors import InputError, a_few


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

    def kind(self, name: str) -> str:
        """Type of a tensor as safetensors calls it, without reading its values."""
        path = self.files[name]
        if path.suffix != ".safetensors":
            kind = self._unpickle(path)[name].dtype
            return _KINDS.get(kind, str(kind))
        with safe_open(path, framework="pt") as reader:
            return str(reader.get_slice(name).get_dtype())

    def _unpickle(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._pickled:
            self._pickled = {path: unpickled(path)}
        return self._pickled[path]


_KINDS: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def unpickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickle, by torch's weights-only reader.

    Raises:
        InputError: it holds anything but tensors by name.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read as plain weights ({error}).") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(
            f"{path} holds something else than tensors by name: it is no checkpoint of transformers."
        )
    return found


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names, still lazy.

    Args:
        tensors: what is read.
        names: name here to name there.
        computed: tensors that the model makes itself, and that no file has.
    """

    def __init__(
        self, tensors: LazyTensors, names: Mapping[str, str], computed: Mapping[str, Tensor] | None = None
    ) -> None:
        self._tensors, self.names, self._computed = tensors, names, dict(computed or {})

    def __getitem__(self, name: str) -> Tensor:
        if name in self._computed:
            return self._computed[name].clone()
        return self._tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self._computed

    def __len__(self) -> int:
        return len(self.names) + len(self._computed)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self._computed

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its values."""
        if name in self._computed:
            return tuple(self._computed[name].shape)
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
        value = json_of(decoded(path.read_bytes()))
    except (OSError, UnreadableError) as error:
        raise InputError(f"{path} cannot be read: {error}. Copy or download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object.")
    return value


def weight_files(folder: Path, allow_pickle: bool) -> dict[str, Path]:
    """The file of every tensor of a folder: one file of the known name, or those that the index names.

    Whatever else lies there (older saves, adapters, the same weights in another layout) is not read, as in
    transformers.

    Raises:
        InputError: no weights, damaged or missing files, a name twice, or pickles that were not allowed.
    """
    if (folder / SINGLE).is_file():
        return _merged([folder / SINGLE], _safetensors_names)
    if (folder / INDEX).is_file():
        return _indexed(folder, INDEX, _safetensors_names)
    if not any((folder / name).is_file() for name in (PICKLED, PICKLED_INDEX)):
        raise InputError(
            f"{folder} holds no weights: neither {SINGLE} nor {INDEX} was found{_others(folder)}."
        )
    if not allow_pickle:
        raise InputError(
            f"{folder} holds only pickled weights ({PICKLED}), which can run code when read. Convert them "
            "to safetensors, or give --allow-pickle to read them with torch's weights-only reader."
        )
    if (folder / PICKLED).is_file():
        return _merged([folder / PICKLED], _pickled_names)
    return _indexed(folder, PICKLED_INDEX, _pickled_names)


SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLED: Final = "pytorch_model.bin"
PICKLED_INDEX: Final = "pytorch_model.bin.index.json"


def _others(folder: Path) -> str:
    """What lies there instead, in words."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    return f", only {a_few(found)}, which transformers does not read either" if found else ""


def _indexed(folder: Path, name: str, names_of: Callable[[Path], Sequence[str]]) -> dict[str, Path]:
    """The tensors of all parts that an index names; every one that it promises is there."""
    index = folder / name
    promised = read_json(folder, name).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise InputError(f"{index} has no weight_map. Download it again.")
    for tensor, part in promised.items():
        if not isinstance(part, str) or not _PLAIN_NAME.fullmatch(part):
            raise InputError(
                f"{index} keeps {tensor} in {part!r}, which is not the plain name of a file beside it: refused."
            )
    parts = sorted(set(promised.values()))
    for part in parts:
        if not (folder / part).is_file():
            tensor = next(tensor for tensor, where in promised.items() if where == part)
            raise InputError(f"{index} promises {tensor} in {part}, which is missing. Download {part} again.")
    files = _merged([folder / part for part in parts], names_of)
    for tensor, part in promised.items():
        if files.get(tensor) != folder / part:
            raise InputError(
                f"{index} promises {tensor} in {part}, and it is not there. Download both again."
            )
    return files


_PLAIN_NAME: Final = re.compile(r"(?!\.)[^/\\:\0]{1,150}")


def _merged(paths: Sequence[Path], names_of: Callable[[Path], Sequence[str]]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        for name in names_of(path):
            if name in files:
                raise InputError(
                    f"{path.parent} holds {name} twice, in {files[name].name} and in {path.name}: nobody can tell "
                    "which one is meant."
                )
            files[name] = path
    return files


def _safetensors_names(path: Path) -> Sequence[str]:
    try:
        with safe_open(path, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}). Download it again.") from None


def _pickled_names(path: Path) -> Sequence[str]:
    return list(unpickled(path))
