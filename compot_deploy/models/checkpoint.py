"""A Hugging Face folder as a mapping from names to tensors, read lazily.

Nothing is unpickled unless asked for, and then only by torch's weights-only reader; code that comes with a
model is never run. Damage (truncated files, NaN, missing tensors) is found where it is read and named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compot_deploy.errors import InputError
from compot_deploy.models.hints import Architecture, find_architecture

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a tokenizer may consist of; copied along where present."""

_HUB_PATTERNS: Final = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a folder by name; each access reads one tensor and checks that it is finite."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self._pickled: dict[Path, Mapping[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        if path.suffix == ".safetensors":
            try:
                with ExitStack() as stack:
                    reader = stack.enter_context(safe_open(path, framework="pt"))
                    tensor = reader.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: the tensor {name} cannot be read ({error}). Download the file again."
                ) from None
        else:
            tensor = self._unpickle(path)[name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{path}: {name} has {count} values that are NaN or infinite out of {tensor.numel()}. "
                "The checkpoint is damaged; download or save it again."
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def _unpickle(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._pickled:
            try:
                self._pickled = {path: torch.load(path, map_location="cpu", weights_only=True, mmap=True)}
            except Exception as error:
                raise InputError(f"{path} cannot be read as plain weights ({error}).") from None
        return self._pickled[path]


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder.

    Attributes:
        folder: where it is.
        config: config.json.
        architecture: the matching entry of `architectures.ARCHITECTURES`.
        tensors: weights by name, read on access.
    """

    folder: Path
    config: Mapping[str, Any]
    architecture: Architecture
    tensors: LazyTensors

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the embedding knows."""
        return int(self.config["vocab_size"])

    @property
    def context(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        return int(self.config.get("max_position_embeddings", 2048))

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False)) or self.head_name not in self.tensors

    @property
    def head_name(self) -> str:
        """Checkpoint name of the output head."""
        return f"{self.architecture.head}.weight"

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, each once, in name order."""
        return tuple(sorted(set(self.tensors.files.values())))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and every weight file, in name order."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self.files:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                for chunk in iter(lambda: file.read(1 << 22), b""):
                    digest.update(chunk)
        return digest.hexdigest()

    def weight(self, linear: str) -> Tensor:
        """Weight of a linear as (in, out); torch's transposed view of what is stored."""
        return self.tensors[f"{linear}.weight"].T


def open_checkpoint(model: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a local folder or a hub id; reads names and configuration, no weights.

    Args:
        model: a folder with config.json and safetensors, or a hub id such as ``org/name``.
        allow_pickle: read ``.bin`` files by torch's weights-only reader when there are no safetensors.

    Raises:
        InputError: not there, not a transformers folder, damaged, or pickles without the flag.
        UnsupportedModelError: an architecture that is not handled.
    """
    folder = Path(model)
    if not folder.exists():
        folder = _download(str(model))
    if not folder.is_dir():
        raise InputError(f"{folder} is a file. Give the folder that holds config.json.")
    config = _read_json(folder, "config.json")
    architecture = find_architecture(config)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise InputError(
                f"{folder / 'config.json'}: {key} is {config.get(key)!r}, not a positive number."
            )
    checkpoint = Checkpoint(
        folder=folder,
        config=config,
        architecture=architecture,
        tensors=LazyTensors(_weight_files(folder, allow_pickle)),
    )
    _check_shapes(checkpoint)
    return checkpoint


def _read_json(folder: Path, name: str) -> dict[str, Any]:
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


def _weight_files(folder: Path, allow_pickle: bool) -> dict[str, Path]:
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
        for name, part in _read_json(folder, index.name).get("weight_map", {}).items():
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


def _check_shapes(checkpoint: Checkpoint) -> None:
    architecture, config, names = checkpoint.architecture, checkpoint.config, checkpoint.tensors
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = architecture.head_size(config)
    query = head * config["num_attention_heads"]
    key = head * (config.get("num_key_value_heads") or config["num_attention_heads"])
    expected = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    for linear in architecture.linear_names(checkpoint.layers):
        name = f"{linear}.weight"
        if name not in names:
            raise InputError(f"{checkpoint.folder}: the tensor {name} is missing; config.json promises it.")
        shape, wanted = checkpoint_shape(checkpoint, name), expected[linear.rsplit(".", 1)[1]]
        if shape != wanted:
            raise InputError(f"{checkpoint.folder}: {name} is {shape}, but config.json says {wanted}.")
    embedding = f"{architecture.embedding}.weight"
    if embedding not in names:
        raise InputError(f"{checkpoint.folder}: the tensor {embedding} is missing.")
    if checkpoint_shape(checkpoint, embedding) != (config["vocab_size"], hidden):
        raise InputError(
            f"{checkpoint.folder}: {embedding} is {checkpoint_shape(checkpoint, embedding)}, but config.json says "
            f"{(config['vocab_size'], hidden)}."
        )
    if not config.get("tie_word_embeddings", False) and checkpoint.head_name not in names:
        raise InputError(
            f"{checkpoint.folder}: {checkpoint.head_name} is missing, and config.json does not tie it to the "
            "embedding."
        )


def checkpoint_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Shape of a stored tensor, without reading its values."""
    path = checkpoint.tensors.files[name]
    if path.suffix != ".safetensors":
        return tuple(checkpoint.tensors._unpickle(path)[name].shape)
    with safe_open(path, framework="pt") as reader:
        return tuple(reader.get_slice(name).get_shape())


def _download(model: str) -> Path:
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or "\\" in model:
        raise InputError(f"The folder {model} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model} is neither a local folder nor a model that the hub answers for ({reason})."
        ) from None
