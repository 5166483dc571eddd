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

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from compot_deploy.core.grid import DENSE, Codebook, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, Matrix, leaves
from compot_deploy.core.packed import LeafScheme
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.outline import Outline

FORMAT: Final = 1

_LARGEST: Final = 1 << 31
_TYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One compressed matrix.

    Attributes:
        name: module path.
        schemes: of its leaves: one, or dictionary, codes, dictionary, codes …
        owner: module path of the matrix that stores the dictionaries (or, for a plain matrix, everything).
        dictionary: `FactorPair.dictionary_name`, for factorized matrices.
    """

    name: str
    schemes: tuple[LeafScheme, ...]
    owner: str | None = None
    dictionary: str | None = None

    @property
    def factorized(self) -> bool:
        """Whether there are dictionaries."""
        return len(self.schemes) > 1

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.schemes[0].inputs, self.schemes[-1].outputs

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and type of every tensor that this matrix itself stores."""
        for number, scheme in enumerate(self.schemes):
            if self.owner is not None and (not self.factorized or number % 2 == 0):
                continue
            for tensor, (shape, dtype) in scheme.tensors.items():
                yield f"{self.name}.{leaf_name(number, len(self.schemes))}.{tensor}", shape, dtype


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
        return Entry(name, (LeafScheme.of(leaf),))
    (dictionary,) = {pair.dictionary_name for pair in matrix.pairs}
    schemes = tuple(
        LeafScheme.of(leaf, pattern)
        for pair in matrix.pairs
        for leaf, pattern in ((pair.dictionary, DENSE), (pair.codes, pair.pattern))
    )
    owner = owners.setdefault(dictionary, name)
    return Entry(name, schemes, None if owner == name else owner, dictionary)


def shares_packed_table(model: CompressedModel) -> bool:
    """Whether the head uses a token table that is packed."""
    table = model.embedding
    if not model.tied or table is None or table not in model.matrices:
        return False
    return not isinstance(model.matrices[table], Dense)


def sharers(model: CompressedModel, outline: Outline, entries: Sequence[Entry]) -> list[Entry]:
    """Entries of modules that use the packed token table under names of their own: a tied head, other towers."""
    table = next((entry for entry in entries if entry.name == model.embedding), None)
    if table is None:
        return []
    names = _names_of(outline, f"{table.name}.weight")
    others = [name.removesuffix(".weight") for name in names]
    return [Entry(other, table.schemes, owner=table.name) for other in others if other != table.name]


def dense_places(model: CompressedModel, outline: Outline, name: str) -> tuple[str, ...]:
    """Under which names the weight of a matrix is stored that is not packed.

    What transformers ties is stored once. Where the head has a table of its own, it ties nothing, and towers that read
    one token table find it under each of their names.
    """
    weight = f"{name}.weight"
    apart = not model.tied and model.head is not None and name == model.embedding
    return _names_of(outline, weight) if apart else (weight,)


def _names_of(outline: Outline, weight: str) -> tuple[str, ...]:
    """All names of a parameter in the model."""
    groups = ((first, *others) for first, others in outline.aliases.items())
    return next((group for group in groups if weight in group), (weight,))


def loose_tensors(model: CompressedModel, outline: Outline) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is stored as it is, one at a time.

    transformers ties whatever belongs to a head together with its table, biases too; where the layout shares the
    table, nothing is tied, and a tensor that stands in the model twice is stored under both names.
    """
    twice = outline.aliases if shares_packed_table(model) else {}
    for name in model.tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        tensor = model.tensors[name]
        yield name, tensor
        for other in twice.get(name, ()):
            if other not in model.tensors:
                yield other, tensor


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


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.name}
    if entry.owner is not None:
        found["owner"] = entry.owner
    if entry.dictionary is not None:
        found["dictionary"] = entry.dictionary
    found["leaves"] = [_scheme_to_json(scheme) for scheme in entry.schemes]
    return found


def _scheme_to_json(scheme: LeafScheme) -> dict[str, Any]:
    values = str(scheme.grid) if scheme.grid else str(scheme.float_type).removeprefix("torch.")
    found: dict[str, Any] = {"shape": [scheme.inputs, scheme.outputs], "values": values}
    if not scheme.pattern.is_dense:
        found["pattern"] = str(scheme.pattern)
    return found


def _entry_from_json(raw: object, where: str) -> Entry:
    name, count = _get(raw, "name"), _get(raw, "leaves")
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ArtifactError(f"{where} lists a matrix with the name {name!r}. Export the model again.")
    if not isinstance(count, list) or not (len(count) == 1 or (count and len(count) % 2 == 0)):
        raise ArtifactError(f"{where}: {name} has no list of leaves. Export the model again.")
    schemes = tuple(_scheme_from_json(leaf, f"{where}: {name}") for leaf in count)
    for dictionary, codes in zip(schemes[::2], schemes[1::2], strict=False):
        if dictionary.outputs != codes.inputs:
            raise ArtifactError(
                f"{where}: {name} has a dictionary of {dictionary.outputs} atoms and codes of {codes.inputs}. "
                "Export the model again."
            )
        if (dictionary.inputs, codes.outputs) != (schemes[0].inputs, schemes[1].outputs):
            raise ArtifactError(f"{where}: the pairs of {name} disagree about its shape. Export it again.")
    owner, dictionary_name = _get(raw, "owner"), _get(raw, "dictionary")
    for value in (owner, dictionary_name):
        if value is not None and not isinstance(value, str):
            raise ArtifactError(f"{where}: {name} refers to {value!r}, not to a name. Export it again.")
    if len(schemes) > 1 and dictionary_name is None:
        dictionary_name = owner or name
    return Entry(name, schemes, owner, dictionary_name if len(schemes) > 1 else None)


def _scheme_from_json(raw: object, where: str) -> LeafScheme:
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
    return LeafScheme(shape[0], shape[1], grid, found, float_type)


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
    shared = owner.schemes[::2] == entry.schemes[::2] if entry.factorized else owner.schemes == entry.schemes
    if not shared or owner.factorized != entry.factorized:
        raise ArtifactError(
            f"{where}: {entry.name} shares what {entry.owner} stores, but their sizes differ. Export it again."
        )


def _get(raw: object, key: str) -> Any:
    return raw.get(key) if isinstance(raw, Mapping) else None
