"""The Hugging Face folder: safetensors and a configuration of our own type, for ``from_pretrained``.

::

    config.json  compot_modeling.py  generation_config.json  tokenizer files
    model.safetensors                      or shards of it, with model.safetensors.index.json

Factors are stored packed, at their true size, each shared dictionary once; see `compot_deploy.core.packed` for the
bytes and `compot_deploy.transformers_plugin.layout` for the configuration. What is given is written bit for bit, one
matrix in memory at a time but for the shard that is being filled. Nothing here imports transformers.

A model of plain linears on bitsandbytes' grids with floating-point tables is written in bitsandbytes' own layout
instead, under the model type of the original, for everybody who has bitsandbytes: `exporters.huggingface_bnb`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compot_deploy.core.diagnostics import Finding
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, Matrix, Pair, Quantized
from compot_deploy.core.packed import PackedStorage, pack, unpack
from compot_deploy.errors import ArtifactError, InputError, RecipeError
from compot_deploy.exporters.huggingface.bnb import BnbStorage, matrix_of, quantization_config, tensors_of
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import Architecture, find_architecture
from compot_deploy.models.source import TOKENIZER_FILES, ModelSource
from compot_deploy.transformers_plugin.layout import (
    AUTO_MAP,
    CODE,
    CODE_TEXT,
    FORMAT,
    INDEX,
    MODEL_TYPE,
    POINTER,
    WEIGHTS,
    Entry,
    base_config,
    check_tensors,
    entry_of,
    from_json,
    grid_from_json,
    leaf_name,
    read_config,
    read_object,
    reveal,
    tied_head,
    to_json,
    weight_files,
)

SHARD_BYTES: Final = 2_000_000_000
"""A shard is closed before it grows beyond this; small enough for every file host."""

_CLASSES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class HuggingFaceOptions:
    """What there is to choose about the folder.

    Attributes:
        shard_bytes: a file is closed before it grows beyond this.
        layout: ``compot``, our own, for everything; ``bnb``, bitsandbytes' own, for plain linears on its grids.
    """

    shard_bytes: int = SHARD_BYTES
    layout: Literal["compot", "bnb"] = "compot"


@dataclass(frozen=True)
class HuggingFaceExporter:
    """CompressedModel in, transformers folder out, and back.

    Attributes:
        name: under which the exporter is known.
    """

    name: str = "huggingface"

    def options(self, knobs: Mapping[str, Any]) -> HuggingFaceOptions:
        """Bitsandbytes' layout for what it can hold whole: plain linears, tables as they are."""
        plain = knobs.get("quantizer") == "bnb" and knobs.get("method") == "plain"
        floating = knobs.get("embeddings") == knobs.get("head") == "none"
        return HuggingFaceOptions(layout="bnb" if plain and floating else "compot")

    def supports(self, source: ModelSource) -> str | None:
        """Every decoder with an architecture."""
        return None if source.architecture is not None else f"no folder for a {source.model_type} here."

    def storage(self, options: HuggingFaceOptions) -> PackedStorage | BnbStorage:
        """What a leaf takes in the file."""
        return BnbStorage() if options.layout == "bnb" else PackedStorage()

    def multiplies_out(self, options: HuggingFaceOptions) -> bool:
        """Factors are stored, not their product."""
        return False

    def check(
        self, source: ModelSource, grids: Mapping[str, Grid | None], options: HuggingFaceOptions
    ) -> None:
        """Every grid can be stored; nothing is refused."""

    def write(self, model: CompressedModel, folder: Path, options: HuggingFaceOptions) -> None:
        """Write every file but the manifest into an existing folder."""
        self._write(model, folder, options, _Shards(folder, options.shard_bytes))

    def rehearse(self, model: CompressedModel, folder: Path, options: HuggingFaceOptions) -> int:
        """Write as `write` does, for matrices of stand-ins; returns the bytes that the tensor files lack."""
        shards = _Shards(folder, options.shard_bytes, counted=True)
        self._write(model, folder, options, shards)
        return shards.missing

    def _write(
        self, model: CompressedModel, folder: Path, options: HuggingFaceOptions, shards: _Shards
    ) -> None:
        if options.layout == "bnb":
            _write_bnb(model, folder, shards)
            return
        owners: dict[str, str] = {}
        entries: list[Entry] = []
        for name, matrix in model.matrices.items():
            if isinstance(matrix, Dense):
                shards.add(f"{name}.weight", matrix.weight.T)
                continue
            entry = entry_of(name, matrix, owners)
            entries.append(entry)
            for tensor, value in _stored(entry, matrix):
                shards.add(tensor, value)
        for name in model.tensors:
            if not name.endswith("rotary_emb.inv_freq"):
                shards.add(name, model.tensors[name])
        shards.finish()
        if model.tied and any(entry.name == model.architecture.embedding for entry in entries):
            entries.append(tied_head(model.architecture, entries))
        kind = _CLASSES[model.architecture.model_type]
        config = {
            "architectures": ["CompotForCausalLM"],
            "auto_map": AUTO_MAP,
            "base_config": base_config(model),
            "compot": to_json(entries, kind),
            # What loads the folder computes in the type of the original, as it would have done itself.
            "dtype": model.config.get("dtype") or model.config.get("torch_dtype") or "float32",
            "hidden_size": POINTER,
            "model_type": MODEL_TYPE,
        }
        _write_json(folder / "config.json", config)
        (folder / CODE).write_text(CODE_TEXT, encoding="utf-8", newline="\n")
        _copy_texts(model, folder)

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of a folder, read when it is asked for.

        Raises:
            ArtifactError: files and configuration disagree, or point elsewhere.
        """
        return self.read_model(folder).matrices

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone: what `write` was given.

        Raises:
            ArtifactError: a file is missing or damaged, or files and configuration disagree.
            UnsupportedModelError: a base model that is not one of the decoders; load it with transformers.
        """
        if is_bnb(folder):
            return _read_bnb(folder)
        config = read_config(folder)
        base = reveal(config["base_config"])
        architecture = find_architecture(base)
        matrices = _Matrices(folder, config, architecture)
        tied = bool(base.get("tie_word_embeddings")) or matrices.tied
        return CompressedModel(
            architecture=architecture,
            config={**base, "tie_word_embeddings": tied},
            matrices=matrices,
            tensors=matrices.tensors,
            tied=tied,
            source=str(folder),
        )

    def lint(self, folder: Path) -> tuple[Finding, ...]:
        """What is wrong about the structure of a folder; the first error hides what comes after it."""
        try:
            if is_bnb(folder):
                for matrix in _read_bnb(folder).matrices.values():
                    _ = matrix.shape  # every linear is read and compared
                return ()
            config = read_config(folder)
            check_tensors(folder, from_json(config.get("compot"), "config.json"), "config.json")
        except ArtifactError as error:
            return (Finding("error", "config.json", str(error)),)
        code = folder / CODE
        if not code.is_file() or code.read_text(encoding="utf-8") != CODE_TEXT:
            return (
                Finding(
                    "error",
                    CODE,
                    "This file is code that trust_remote_code would run, and it is not the one that compot-deploy "
                    "writes: do not load the folder with trust_remote_code; export the model again.",
                ),
            )
        return ()


EXPORTER: Final = HuggingFaceExporter()
"""For whoever needs this one and not the table of all."""


@dataclass(frozen=True)
class FileAccount:
    """What the bytes of the tensor files of a folder are spent on; the three add up to the files.

    Attributes:
        matrices: the manifest's.
        others: norms, biases, and what else is stored beside the matrices.
        headers: names, types and places of the tensors, in front of them.
    """

    matrices: int
    others: int
    headers: int


def account(folder: Path, matrices: int) -> FileAccount:
    """Split the bytes of the safetensors files of a folder.

    Args:
        folder: verified.
        matrices: bytes of all matrices, from the manifest.
    """
    tensors = headers = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")  # its length stands in front of it
        headers += header
        tensors += path.stat().st_size - header
    return FileAccount(matrices, tensors - matrices, headers)


def is_bnb(folder: Path) -> bool:
    """Whether a folder is in bitsandbytes' own layout.

    Raises:
        ArtifactError: config.json cannot be read.
    """
    settings = read_object(folder / "config.json").get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "bitsandbytes"


def _write_bnb(model: CompressedModel, folder: Path, shards: _Shards) -> None:
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
    _write_json(folder / "config.json", config)
    _copy_texts(model, folder)


def _read_bnb(folder: Path) -> CompressedModel:
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
    tensors = {name: _read(path, name) for name, path in weight_files(folder).items()}
    sizes = linear_shapes(architecture, config)
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


def linear_shapes(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of every kind of linear, from the configuration."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, head = int(config["num_attention_heads"]), architecture.head_size(config)
    keys = int(config.get("num_key_value_heads") or heads)
    return {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, keys * head),
        "v_proj": (hidden, keys * head),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def _copy_texts(model: CompressedModel, folder: Path) -> None:
    source = Path(model.source) if model.source else None
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class _Matrices(Mapping[str, Matrix]):
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
        self.tensors: Mapping[str, Tensor] = _Tensors(
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
        return _read(self._files[name], name)


class _Tensors(Mapping[str, Tensor]):
    """Ordinary tensors by name; each access reads one."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _Shards:
    """Tensors to files of limited size, and an index where there are several."""

    def __init__(self, folder: Path, limit: int, counted: bool = False) -> None:
        self._folder, self._limit, self._counted = folder, limit, counted
        self.missing = 0
        """Bytes of tensors that were counted, not written."""
        self._pending: dict[str, Tensor] = {}
        self._closed: list[tuple[str, ...]] = []
        self._bytes, self._total = 0, 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        if self._pending and self._bytes + tensor.nbytes > self._limit:
            self._close()
        self._pending[name] = tensor.to("meta") if self._counted else tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their names, write the index."""
        self._close()
        if len(self._closed) == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        placed: dict[str, str] = {}
        for number, names in enumerate(self._closed):
            file = f"model-{number + 1:05d}-of-{len(self._closed):05d}.safetensors"
            self._part(number).rename(self._folder / file)
            placed |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
        _write_json(self._folder / INDEX, index)

    def _close(self) -> None:
        part = self._part(len(self._closed))
        if self._counted:
            part.write_bytes(bytes(_header_bytes(self._pending)))
            self.missing += self._bytes
        else:
            # transformers refuses files without this note.
            save_file(self._pending, part, metadata={"format": "pt"})
            part.chmod((self._folder.stat().st_mode & 0o444) | 0o200)  # safetensors lets nobody else read it
        self._closed.append(tuple(self._pending))
        self._pending, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f".part-{number}.safetensors"


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What stands before the tensors of a safetensors file: a length of 8 bytes, then JSON up to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The order in which safetensors lays tensors out, which decides how many digits their places have.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


_SAFETENSORS: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def _stored(entry: Entry, matrix: Matrix) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a matrix itself stores."""
    if isinstance(matrix, Factorized):
        chain = [leaf for pair in matrix.pairs for leaf in (pair.dictionary, pair.codes)]
    else:
        assert isinstance(matrix, Quantized)
        chain = [matrix]
    if any((leaf.integers if isinstance(leaf, Quantized) else leaf.weight).is_meta for leaf in chain):
        for name, shape, dtype in entry.tensors():
            yield name, torch.empty(shape, dtype=dtype, device="meta")
        return
    own = {name for name, _, _ in entry.tensors()}
    for number, (leaf, form) in enumerate(zip(chain, entry.forms, strict=True)):
        prefix = f"{entry.name}.{leaf_name(number, len(chain))}"
        if f"{prefix}.{next(iter(form.tensors))}" in own:
            for name, tensor in pack(leaf, form.pattern).items():
                yield f"{prefix}.{name}", tensor


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as reader:
            tensor = reader.get_tensor(name)
    except Exception as error:  # SafetensorError and OSError
        raise ArtifactError(f"{path}: the tensor {name} cannot be read ({error}). Copy it again.") from None
    assert isinstance(tensor, Tensor)
    return tensor


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False)
    except TypeError as error:
        raise InputError(f"{path.name} cannot be written: {error}.") from None
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
