"""What config.json says about a compressed model, and whether the files agree; everything is distrusted.

::

    {"model_type": "compot", "auto_map": {...},          our own type: a reader without us refuses
     "base_config": {"base_model_type": "llama", ...},    the configuration of the model underneath
     "compot": {"format": 1, "architecture": "LlamaForCausalLM", "matrices": [
        {"name": "model.embed_tokens", "leaves": [{"shape": [64, 320], "values": "int8/g32"}]},
        {"name": "model.layers.0.self_attn.q_proj", "dictionary": "model.layers.0.attention_input", "leaves": [
            {"shape": [64, 32], "values": "int4/g32"},
            {"shape": [32, 64], "values": "int4/g32", "pattern": "16:32"}]},
        {"name": "model.layers.0.self_attn.k_proj", "owner": "model.layers.0.self_attn.q_proj", ...},
        {"name": "lm_head", "owner": "model.embed_tokens", "leaves": [...]}]}}

``owner`` is the matrix, listed before, that stores what is shared: the dictionaries of a factorized matrix, all
of a plain one. The order of the list is that of the blocks. Tensors are named after modules, see
`compot_deploy.transformers_plugin.modules`; a matrix that is not listed is an ordinary weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open

from compot_deploy.core.grid import DENSE, Codebook, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, Matrix, leaves
from compot_deploy.core.packed import LeafForm
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import Architecture

MODEL_TYPE: Final = "compot"
FORMAT: Final = 1
CODE: Final = "compot_modeling.py"
"""The file that ``auto_map`` points to: it imports our package or says that it is missing."""

INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model.safetensors"

BASE_TYPE: Final = "base_model_type"
"""Stands for ``model_type`` in the base configuration: transformers hands a class any nested configuration whose
``model_type`` is that of the class, and the class would fill the model with random weights."""

POINTER: Final = "see base_config"
"""Stands where other model classes look for a number, so that one of them cannot take this file for its own and
fill a model of its default size with random weights."""

AUTO_CLASSES: Final = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
)

_LARGEST: Final = 1 << 31
_TYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def door_name(auto_class: str) -> str:
    """Name of our class behind an Auto class: AutoModelForCausalLM → CompotForCausalLM."""
    return "CompotModel" if auto_class == "AutoModel" else auto_class.replace("AutoModel", "Compot")


AUTO_MAP: Final = {
    "AutoConfig": "compot_modeling.CompotConfig",
    **{name: f"compot_modeling.{door_name(name)}" for name in AUTO_CLASSES},
}

CODE_TEXT: Final = f'''\
"""This model was compressed by compot-deploy, and runs with it: ``import compot_deploy`` is all it takes."""

try:
    from compot_deploy.huggingface import (
        CompotConfig,
{"".join(f"        {door_name(name)},{chr(10)}" for name in AUTO_CLASSES)}    )
except ImportError as error:
    raise ImportError(
        "The weights of this model are packed factors that only compot-deploy can unpack, and it is not "
        "installed here. Install it with: pip install compot-deploy"
    ) from error
'''


@dataclass(frozen=True)
class Entry:
    """One compressed matrix.

    Attributes:
        name: module path.
        forms: of its leaves: one, or dictionary, codes, dictionary, codes …
        owner: module path of the matrix that stores the dictionaries (or, for a plain matrix, everything).
        dictionary: `Pair.dictionary_name`, for factorized matrices.
    """

    name: str
    forms: tuple[LeafForm, ...]
    owner: str | None = None
    dictionary: str | None = None

    @property
    def factorized(self) -> bool:
        """Whether there are dictionaries."""
        return len(self.forms) > 1

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.forms[0].inputs, self.forms[-1].outputs

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and type of every tensor that this matrix itself stores."""
        for number, form in enumerate(self.forms):
            if self.owner is not None and (not self.factorized or number % 2 == 0):
                continue
            for tensor, (shape, dtype) in form.tensors.items():
                yield f"{self.name}.{leaf_name(number, len(self.forms))}.{tensor}", shape, dtype


def leaf_name(number: int, count: int) -> str:
    """Name of the module of a leaf by its position."""
    if count == 1:
        return "matrix"
    return f"{('dictionary', 'codes')[number % 2]}{number // 2}"


def entry_of(name: str, matrix: Matrix, owners: dict[str, str]) -> Entry:
    """The entry of a matrix that is not an ordinary weight.

    Args:
        name: module path.
        matrix: quantized or factorized.
        owners: dictionary name → matrix that stores it; added to.
    """
    if not isinstance(matrix, Factorized):
        (leaf,) = leaves(matrix)
        return Entry(name, (LeafForm.of(leaf),))
    (dictionary,) = {pair.dictionary_name for pair in matrix.pairs}
    forms = tuple(
        LeafForm.of(leaf, pattern)
        for pair in matrix.pairs
        for leaf, pattern in ((pair.dictionary, DENSE), (pair.codes, pair.pattern))
    )
    owner = owners.setdefault(dictionary, name)
    return Entry(name, forms, None if owner == name else owner, dictionary)


def base_config(model: CompressedModel) -> dict[str, Any]:
    """The base configuration as it is stored: a packed table is shared by the layout, not by transformers."""
    packed = not isinstance(model.matrices[model.architecture.embedding], Dense)
    return hide({**model.config, "tie_word_embeddings": model.tied and not packed})


def hide(config: Mapping[str, Any]) -> dict[str, Any]:
    """A base configuration for `base_config`; `reveal` is the inverse."""
    without = ("auto_map", "quantization_config", "transformers_version", "_name_or_path", "compot")
    kept = {key: value for key, value in config.items() if key not in without}
    kept[BASE_TYPE] = kept.pop("model_type")
    return kept


def reveal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A base configuration as transformers knows it."""
    found = dict(config)
    found["model_type"] = found.pop(BASE_TYPE)
    return found


def tied_head(architecture: Architecture, entries: Sequence[Entry]) -> Entry:
    """The entry of a head that uses the packed table of the embedding."""
    (table,) = (entry for entry in entries if entry.name == architecture.embedding)
    return Entry(architecture.head, table.forms, owner=table.name)


def to_json(entries: Iterable[Entry], architecture: str) -> dict[str, Any]:
    """The object ``compot`` of config.json."""
    return {"format": FORMAT, "architecture": architecture, "matrices": [_entry_to_json(e) for e in entries]}


def from_json(layout: object, where: str) -> tuple[Entry, ...]:
    """Read what `to_json` wrote, every field checked.

    Args:
        layout: the object ``compot`` of config.json.
        where: for messages.

    Raises:
        ArtifactError: one sentence that names the matrix and what is wrong with it.
    """
    if not isinstance(layout, Mapping) or layout.get("format") != FORMAT:
        raise ArtifactError(
            f"{where}: the object 'compot' has the format {_get(layout, 'format')!r}, and this version of "
            f"compot-deploy reads {FORMAT}. Update compot-deploy, or export the model again."
        )
    if not isinstance(layout.get("matrices"), list) or not isinstance(layout.get("architecture"), str):
        raise ArtifactError(f"{where}: 'compot' lacks 'architecture' or 'matrices'. Export the model again.")
    entries: dict[str, Entry] = {}
    for raw in layout["matrices"]:
        entry = _entry_from_json(raw, where)
        if entry.name in entries:
            raise ArtifactError(f"{where} lists {entry.name} twice. Export the model again.")
        _check_owner(entry, entries, where)
        entries[entry.name] = entry
    return tuple(entries.values())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a compressed folder: our type, our auto_map, nothing that would run code.

    Raises:
        ArtifactError: it is missing, damaged, of another type, or points elsewhere.
    """
    path = folder / "config.json"
    config = read_object(path)
    check_config(config, str(path))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that is not ours or points to other code; see `read_config`."""
    if config.get("model_type") != MODEL_TYPE:
        raise ArtifactError(
            f"{where} is of the type {config.get('model_type')!r}, not {MODEL_TYPE!r}: compot-deploy did not "
            "write it."
        )
    auto_map = config.get("auto_map")
    if auto_map != AUTO_MAP:
        odd = auto_map if not isinstance(auto_map, Mapping) else _difference(auto_map)
        raise ArtifactError(
            f"{where}: auto_map points to {odd!r}, which is not the module that compot-deploy writes. It could "
            "run any code, so the folder is refused; export the model again."
        )
    base = config.get("base_config")
    if not isinstance(base, Mapping) or not isinstance(base.get(BASE_TYPE), str):
        raise ArtifactError(f"{where} lacks the configuration of the base model. Export the model again.")
    for key in ("auto_map", "quantization_config"):
        if base.get(key):
            raise ArtifactError(
                f"{where}: base_config has {key!r}, which a compressed model cannot have. Export it again."
            )
    if base[BASE_TYPE] == MODEL_TYPE or "model_type" in base:
        raise ArtifactError(f"{where}: base_config is itself a compressed model. Export the model again.")


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
            if stored != shape or kind != _SAFETENSORS[dtype]:
                raise ArtifactError(
                    f"{name} is {kind} {list(stored)} in the file, and {where} says "
                    f"{_SAFETENSORS[dtype]} {list(shape)} (k or another size was changed): export the model again."
                )
    return files


_SAFETENSORS: Final = {
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.name}
    if entry.owner is not None:
        found["owner"] = entry.owner
    if entry.dictionary is not None:
        found["dictionary"] = entry.dictionary
    found["leaves"] = [_form_to_json(form) for form in entry.forms]
    return found


def _form_to_json(form: LeafForm) -> dict[str, Any]:
    values = str(form.grid) if form.grid else str(form.float_type).removeprefix("torch.")
    found: dict[str, Any] = {"shape": [form.inputs, form.outputs], "values": values}
    if not form.pattern.is_dense:
        found["pattern"] = str(form.pattern)
    return found


def _entry_from_json(raw: object, where: str) -> Entry:
    name, count = _get(raw, "name"), _get(raw, "leaves")
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ArtifactError(f"{where} lists a matrix with the name {name!r}. Export the model again.")
    if not isinstance(count, list) or not (len(count) == 1 or (count and len(count) % 2 == 0)):
        raise ArtifactError(f"{where}: {name} has no list of leaves. Export the model again.")
    forms = tuple(_form_from_json(leaf, f"{where}: {name}") for leaf in count)
    for dictionary, codes in zip(forms[::2], forms[1::2], strict=False):
        if dictionary.outputs != codes.inputs:
            raise ArtifactError(
                f"{where}: {name} has a dictionary of {dictionary.outputs} atoms and codes of {codes.inputs}. "
                "Export the model again."
            )
        if (dictionary.inputs, codes.outputs) != (forms[0].inputs, forms[1].outputs):
            raise ArtifactError(f"{where}: the pairs of {name} disagree about its shape. Export it again.")
    owner, dictionary_name = _get(raw, "owner"), _get(raw, "dictionary")
    for value in (owner, dictionary_name):
        if value is not None and not isinstance(value, str):
            raise ArtifactError(f"{where}: {name} refers to {value!r}, not to a name. Export it again.")
    if len(forms) > 1 and dictionary_name is None:
        dictionary_name = owner or name
    return Entry(name, forms, owner, dictionary_name if len(forms) > 1 else None)


def _form_from_json(raw: object, where: str) -> LeafForm:
    shape, values, pattern = _get(raw, "shape"), _get(raw, "values"), _get(raw, "pattern")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
        or not all(0 < size < _LARGEST for size in shape)
    ):
        raise ArtifactError(f"{where} has the size {shape!r}, not two positive numbers. Export it again.")
    grid, float_type = _values_from_json(values, where)
    found = DENSE if pattern is None else _pattern_from_json(pattern, where)
    return LeafForm(shape[0], shape[1], grid, found, float_type)


def _values_from_json(values: object, where: str) -> tuple[Grid | None, torch.dtype]:
    if isinstance(values, str):
        if values in _TYPES:
            return None, _TYPES[values]
        match = re.fullmatch(r"(?:int([2348])|(nf4|fp4))/g([1-9]\d{0,8})", values)
        if match is not None:
            codebook = cast(Codebook, match[2] or "integer")
            return Grid(int(match[1] or 4), int(match[3]), codebook), torch.float32
    raise ArtifactError(f"{where} stores values as {values!r}, which does not exist. Export it again.")


def grid_from_json(values: object, where: str) -> Grid:
    """The grid that a configuration names.

    Raises:
        ArtifactError: there is no such grid.
    """
    grid, _ = _values_from_json(values, where)
    if grid is None:
        raise ArtifactError(f"{where} names no grid but {values!r}. Export it again.")
    return grid


def _pattern_from_json(pattern: object, where: str) -> Pattern:
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pattern) if isinstance(pattern, str) else None
    try:
        if match is not None:
            return Pattern(int(match[1]), int(match[2]))
    except RecipeError:
        pass
    raise ArtifactError(f"{where} has the pattern {pattern!r}, which does not exist. Export it again.")


def _check_owner(entry: Entry, before: Mapping[str, Entry], where: str) -> None:
    if entry.owner is None:
        return
    owner = before.get(entry.owner)
    if owner is None or owner.owner is not None:
        raise ArtifactError(
            f"{where}: {entry.name} shares what {entry.owner} stores, which is not listed before it as an owner. "
            "Export the model again."
        )
    shared = owner.forms[::2] == entry.forms[::2] if entry.factorized else owner.forms == entry.forms
    if not shared or owner.factorized != entry.factorized:
        raise ArtifactError(
            f"{where}: {entry.name} shares what {entry.owner} stores, but their sizes differ. Export it again."
        )


def _difference(auto_map: Mapping[str, Any]) -> str:
    for name, target in auto_map.items():
        if AUTO_MAP.get(name) != target:
            return f"{target}"
    return f"{len(auto_map)} of {len(AUTO_MAP)} classes"


def _get(raw: object, key: str) -> Any:
    return raw.get(key) if isinstance(raw, Mapping) else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: give a folder that compot-deploy wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.")
    return value


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
