"""What a factorized GGUF file says about its matrices, checked against its tensors, and its leaves read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float16, Float32, Int8

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.parsing import UnreadableError, json_of
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.reader import GgufFile

Layout: TypeAlias = Literal["dense", "factorized", "sparse"]

LAYOUTS: Final[tuple[Layout, ...]] = ("dense", "factorized", "sparse")
LAYOUT_VERSION: Final = 1
ARCHITECTURE: Final = "compot"
"""``general.architecture`` of factorized files; stock tools know no such name and refuse."""


def read_layout(file: GgufFile) -> Layout:
    """The layout of a checked header.

    Raises:
        ArtifactError: a factorized file of an unknown layout or version.
    """
    if file.text("general.architecture") != ARCHITECTURE:
        return "dense"
    layout = file.text("compot.layout")
    if layout not in ("factorized", "sparse"):
        raise ArtifactError(
            f"{file.path.name}: the layout {layout!r} is unknown; known are factorized and sparse."
        )
    version = file.count("compot.layout.version")
    if version != LAYOUT_VERSION:
        raise ArtifactError(
            f"{file.path.name}: layout version {version}, this compot-deploy reads version {LAYOUT_VERSION}. "
            f"Update compot-deploy, or export the file again."
        )
    return "factorized" if layout == "factorized" else "sparse"


@dataclass(frozen=True)
class LeafEntry:
    """How a matrix leaf is stored, as the file says; checked against the tensor."""

    tensor: str
    inputs: int
    outputs: int
    grid: Grid | None
    pattern: Pattern


@dataclass(frozen=True)
class FactorPairEntry:
    """Tensor names of one factor pair, and what `compot_deploy.core.matrix.FactorPair` needs besides."""

    dictionary: str
    codes: str
    name: str
    pattern: Pattern


@dataclass(frozen=True)
class FactorizedIndex:
    """What a factorized file says about its matrices.

    Attributes:
        leaves: by tensor name.
        matrices: GGUF stem (``blk.0.attn_q``) to its pairs; plain matrices are not listed.
    """

    leaves: Mapping[str, LeafEntry]
    matrices: Mapping[str, tuple[FactorPairEntry, ...]]


def read_index(file: GgufFile) -> FactorizedIndex:
    """The description of the matrices of a factorized file, checked against its tensors.

    Raises:
        ArtifactError: it is not there, is malformed, or contradicts a tensor.
    """
    where = file.path.name
    leaves_json = _json_object(file, "compot.tensors")
    matrices_json = _json_object(file, "compot.matrices")
    leaves: dict[str, LeafEntry] = {}
    for name, entry in leaves_json.items():
        if name not in file.tensors:
            raise ArtifactError(f"{where}: {name} is described, but there is no such tensor.")
        leaves[name] = _leaf_entry(file, name, entry)
    matrices: dict[str, tuple[FactorPairEntry, ...]] = {}
    for stem, entries in matrices_json.items():
        if not isinstance(entries, list) or not entries:
            raise ArtifactError(f"{where}: the pairs of {stem} are not a list.")
        pairs = tuple(_pair_entry(where, stem, entry) for entry in entries)
        for pair in pairs:
            if pair.dictionary not in leaves or pair.codes not in leaves:
                raise ArtifactError(
                    f"{where}: {stem} names {pair.dictionary} and {pair.codes}, which are not there."
                )
            dictionary, codes = leaves[pair.dictionary], leaves[pair.codes]
            first, last = leaves[pairs[0].dictionary], leaves[pairs[0].codes]
            if (
                dictionary.outputs != codes.inputs
                or dictionary.inputs != first.inputs
                or codes.outputs != last.outputs
            ):
                raise ArtifactError(
                    f"{where}: a dictionary of {dictionary.inputs} x {dictionary.outputs} does not fit "
                    f"codes of {codes.inputs} x {codes.outputs} in {stem}."
                )
        matrices[stem] = pairs
    return FactorizedIndex(leaves, matrices)


def plane_format(entry: LeafEntry) -> gguf_planes.PlaneFormat:
    """The format of a leaf in an I8 payload."""
    assert entry.grid is not None
    return gguf_planes.PlaneFormat.of(entry.inputs, entry.grid, entry.pattern)


def first_outputs(file: GgufFile, entry: LeafEntry, count: int) -> tuple[GgufFile, LeafEntry]:
    """A file and entry that show only the first outputs of a leaf; columns are always whole."""
    tensor = file.tensors[entry.tensor]
    if tensor.kind == "I8" and plane_format(entry).narrow:
        return file, entry
    count = min(count, entry.outputs)
    shorter = replace(tensor, shape=(count, tensor.shape[1]), nbytes=tensor.nbytes // tensor.shape[0] * count)
    return replace(file, tensors={entry.tensor: shorter}), replace(entry, outputs=count)


def read_integers(
    file: GgufFile, entry: LeafEntry, grid: Grid
) -> tuple[Int8[np.ndarray, "inputs outputs"], Float16[np.ndarray, "groups outputs"]]:
    """Integers and scales of a leaf on a grid, its outputs in the order of the file.

    Raises:
        ArtifactError: the bytes are not what `write` writes.
    """
    kind = file.tensors[entry.tensor].kind
    rows = file.bytes_of(entry.tensor)
    if kind == "I8":
        integers, scales = gguf_planes.unpack(rows.view(np.int8), plane_format(entry), entry.outputs)
    else:
        integers, scales = gguf_blocks.unpack_blocks(rows, entry.inputs, grid.group, kind)
        if integers[entry.inputs :].any():
            raise ArtifactError(f"{file.path.name}: the padding of {entry.tensor} is not zero: damaged file.")
        integers = np.ascontiguousarray(integers[: entry.inputs])
    if integers.size and not grid.lowest <= integers.min() <= integers.max() <= grid.highest:
        raise ArtifactError(f"{file.path.name}: {entry.tensor} has integers outside {grid}.")
    return integers, scales


def read_values(file: GgufFile, entry: LeafEntry) -> Float32[np.ndarray, "inputs outputs"]:
    """The values of a leaf as float32, its outputs in the order of the file.

    Raises:
        ArtifactError: see `read_integers`.
    """
    if entry.grid is None:
        rows, kind = file.bytes_of(entry.tensor), file.tensors[entry.tensor].kind
        return np.ascontiguousarray(gguf_quantize.dequantize(rows, kind).T)
    integers, scales = read_integers(file, entry, entry.grid)
    widened = np.repeat(scales.astype(np.float32), entry.grid.group, axis=0)[: entry.inputs]
    return integers.astype(np.float32) * widened


def _json_object(file: GgufFile, key: str) -> dict[str, Any]:
    try:
        value = json_of(file.text(key))
    except UnreadableError as error:
        raise ArtifactError(
            f"{file.path.name}: the key {key} cannot be read: {error}: damaged file."
        ) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{file.path.name}: the key {key} is not a JSON object: damaged file.")
    return value


def _whole(where: str, entry: Any, key: str) -> int:
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ArtifactError(f"{where}: {key} is {value!r}, not a positive number.")
    return value


def _leaf_entry(file: GgufFile, name: str, entry: Any) -> LeafEntry:
    where = f"{file.path.name}: {name}"
    tensor = file.tensors[name]
    inputs, outputs = _whole(where, entry, "inputs"), _whole(where, entry, "outputs")
    grid, pattern = None, DENSE
    if "bits" in entry:
        try:
            grid = Grid(_whole(where, entry, "bits"), _whole(where, entry, "group"))
            pattern = _pattern(where, entry.get("pattern", "dense"))
            form = gguf_planes.PlaneFormat(grid, pattern, inputs) if tensor.kind == "I8" else None
        except RecipeError as error:
            raise ArtifactError(f"{where}: {error}") from None
        if form is not None:
            shape = form.shape(outputs)
        elif tensor.kind in gguf_blocks.BLOCK_BYTES:
            shape = (outputs, gguf_blocks.padded(inputs))
        else:
            raise ArtifactError(f"{where}: integers in a tensor of type {tensor.kind}.")
    else:
        if tensor.kind == "I8":
            raise ArtifactError(f"{where}: a payload without a description of its bits.")
        shape = (outputs, inputs)
    if tensor.shape != shape:
        raise ArtifactError(f"{where}: the tensor is {tensor.shape}, its description asks for {shape}.")
    return LeafEntry(name, inputs, outputs, grid, pattern)


def _pattern(where: str, text: Any) -> Pattern:
    known: dict[str, Pattern] = {str(pattern): pattern for pattern in (DENSE, *gguf_planes.PATTERNS)}
    if not isinstance(text, str) or text not in known:
        raise ArtifactError(f"{where}: the pattern {text!r} is unknown; known are {', '.join(known)}.")
    return known[text]


def _pair_entry(where: str, stem: str, entry: Any) -> FactorPairEntry:
    texts: list[str] = []
    for key in ("dictionary", "codes", "name"):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str):
            raise ArtifactError(f"{where}: {stem} has no {key}: damaged file.")
        texts.append(value)
    kept, of = _whole(where, entry, "kept"), _whole(where, entry, "of")
    if kept > of:
        raise ArtifactError(f"{where}: {stem} keeps {kept} of {of} atoms.")
    return FactorPairEntry(texts[0], texts[1], texts[2], Pattern(kept, of))
