"""GGUF files for llama.cpp: dense for every build of it, factorised and sparse for `compot_deploy.llama`.

Three layouts, from widest to smallest:

``dense``       factors multiplied out, the base architecture, any ggml type. Loads in every llama.cpp.
``factorized``  dictionaries and codes in ggml's Q4_0 / Q8_0, our integers bit-exactly.
``sparse``      every integer in the planes of `gguf_planes`: 2, 3, 4 and 8 bits, 2:4 and 4:8 codes.

The last two carry ``general.architecture = "compot"``, because other readers of the base architecture would
fill the missing matrices with random numbers; under an unknown name they all refuse. Rows of a GGUF tensor
are outputs, so integers (in, out) are transposed on the way; for ``llama`` the outputs of q and k are also
reordered to neighbouring rotary pairs, which for a factorised matrix concerns the codes alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.architectures import ARCHITECTURES, Architecture
from compot_deploy.errors import ArtifactError, RecipeError, UnsupportedModelError
from compot_deploy.exporters import gguf_blocks, gguf_metadata, gguf_planes, gguf_quantize
from compot_deploy.exporters.gguf_reader import GgufFile, read_header
from compot_deploy.exporters.gguf_tokenizer import tokenizer_keys
from compot_deploy.weights import (
    DENSE,
    CompressedModel,
    Dense,
    Factorized,
    Grid,
    Leaf,
    Matrix,
    Pair,
    Pattern,
    Quantized,
)

Layout: TypeAlias = Literal["dense", "factorized", "sparse"]

LAYOUTS: Final[tuple[Layout, ...]] = ("dense", "factorized", "sparse")
LAYOUT_VERSION: Final = 1
ARCHITECTURE: Final = "compot"
"""``general.architecture`` of factorised files; stock tools know no such name and refuse."""

_TORCH_FLOATS: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
_FILE_TYPE_GUESSED: Final = 1024


@dataclass(frozen=True)
class GgufOptions:
    """What to write.

    Attributes:
        layout: ``dense`` (default, runs everywhere), ``factorized`` or ``sparse``.
        type: ggml type of the linears in a dense file. ``auto`` carries integers over exactly (Q4_0 up to 4
            bits, Q8_0 above) and takes Q8_0 for factors that are multiplied out. Other layouts ignore it.
        table_type: ggml type of a floating-point embedding or head. None: `type` when that is a floating
            type or Q8_0, F16 with ``auto``, otherwise Q8_0. In factorised files None keeps what it is.
        importance: linear to the diagonal of its Gram, shape (in,); weights the rounding of a dense file.
        name: ``general.name``; None takes the folder name of the source.
        provenance: written as ``compot.<key>``: recipe, calibration hash, versions.
    """

    layout: Layout = "dense"
    type: str = "auto"
    table_type: str | None = None
    importance: Mapping[str, Tensor] | None = None
    name: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise RecipeError(f"The GGUF layout {self.layout!r} does not exist. Use {', '.join(LAYOUTS)}.")
        if self.type != "auto":
            gguf_quantize.check_type(self.type)
        if self.table_type is not None:
            gguf_quantize.check_type(self.table_type)


@dataclass(frozen=True)
class GgufResult:
    """What was written.

    Attributes:
        path: the file.
        nbytes: its size.
        matrix_bytes: bytes of each matrix, a shared dictionary counted with its first user.
        kinds: how each GGUF tensor was stored, ``Q4_0`` or ``planes int4/g64 2:4`` for example.
        facts: everything that differs from what was asked: wider types, padding, tokenizer notes.
    """

    path: Path
    nbytes: int
    matrix_bytes: Mapping[str, int]
    kinds: Mapping[str, str]
    facts: tuple[str, ...]


@dataclass(frozen=True)
class GgufModel:
    """A file read back.

    Attributes:
        layout: which of the three.
        architecture: the base architecture.
        matrices: by module path, in (in, out) and the order of Hugging Face's rotary pairs.
        tensors: norms and biases by checkpoint name.
        tied: the file has no output head of its own.
        metadata: all keys.
    """

    layout: Layout
    architecture: Architecture
    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, Tensor]
    tied: bool
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class GgufStorage:
    """True bytes of a leaf in a layout, and which grids it stores exactly. Implements `weights.Storage`.

    Attributes:
        layout: ``factorized`` or ``sparse``; a dense file holds products, counted as plain matrices.
    """

    layout: Layout

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of an (rows, columns) leaf, scales, positions and padding included.

        Raises:
            RecipeError: the layout cannot hold the grid exactly.
        """
        if grid is None:
            return 2 * rows * columns
        if grid.codebook != "integer":
            raise RecipeError(
                f"GGUF has no {grid.codebook}: use --gguf-layout dense, which multiplies factors out, or "
                "--quant int4."
            )
        if self.layout == "sparse":
            return gguf_planes.PlaneFormat.of(rows, grid, pattern).nbytes(columns)
        gguf_blocks.check_group(grid, rows)
        blocks = math.ceil(rows / gguf_blocks.BLOCK)
        return blocks * gguf_blocks.BLOCK_BYTES[gguf_blocks.block_type(grid)] * columns

    def check(self, rows: int, grid: Grid | None, pattern: Pattern = DENSE) -> None:
        """Refuse what the layout cannot store exactly, before any work starts.

        Raises:
            RecipeError: naming what it can.
        """
        self.leaf_bytes(rows, 1, grid, pattern)


def write(model: CompressedModel, path: str | Path, options: GgufOptions | None = None) -> GgufResult:
    """Write a model as one GGUF file, which appears whole or not at all.

    Args:
        model: any mix of dense, quantized and factorised matrices.
        path: the file; its folder must exist.
        options: layout and types; None writes the dense layout.

    Raises:
        RecipeError: a grid that the layout cannot hold, or a type that needs importance weights.
        UnsupportedModelError: a feature that GGUF has no key for.
        MissingDependencyError: a K or IQ type without llama.cpp's library.
    """
    from gguf import GGUFWriter

    options = options or GgufOptions()
    path = Path(path)
    keys, facts = _metadata(model, options)
    plan = _Plan(model, options)
    facts += plan.facts
    temporary = path.with_name(f".{path.name}.partial")
    architecture = model.architecture.ggml_name if options.layout == "dense" else ARCHITECTURE
    writer = GGUFWriter(temporary, architecture)
    try:
        _write_header(writer, keys | plan.keys(), plan.entries)
        for entry in plan.entries:
            rows = entry.rows()
            if rows.nbytes != entry.nbytes:
                raise RuntimeError(
                    f"{entry.name}: {rows.nbytes} bytes instead of the planned {entry.nbytes}."
                )
            writer.write_tensor_data(rows)
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return GgufResult(
        path=path,
        nbytes=path.stat().st_size,
        matrix_bytes=plan.matrix_bytes,
        kinds={entry.name: entry.described for entry in plan.entries},
        facts=tuple(facts),
    )


def write_header(model: CompressedModel, path: str | Path, options: GgufOptions | None = None) -> int:
    """Write what stands before the tensors of a file, whose values are not looked at.

    Returns:
        Bytes that would follow: the tensors, and what aligns them.
    """
    from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter

    options = options or GgufOptions()
    keys, _ = _metadata(model, options)
    plan = _Plan(model, options)
    writer = GGUFWriter(path, model.architecture.ggml_name if options.layout == "dense" else ARCHITECTURE)
    try:
        _write_header(writer, keys | plan.keys(), plan.entries)
    finally:
        writer.close()
    sizes = (Path(path).stat().st_size, *(entry.nbytes for entry in plan.entries))
    return sum(_round_up(size, GGUF_DEFAULT_ALIGNMENT) for size in sizes) - sizes[0]


def _write_header(writer: Any, keys: Mapping[str, gguf_metadata.Value], entries: Sequence[_Entry]) -> None:
    for key, value in keys.items():
        _add_key(writer, key, value)
    for entry in entries:
        _announce(writer, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def read(path: str | Path) -> GgufModel:
    """Read a file written here back to matrices: integers and scales bit for bit.

    Matrices of a dense file are what they were stored as: Q4_0 and Q8_0 become integers in groups of 32,
    every other type floating point.

    Raises:
        ArtifactError: the file is damaged, contradicts itself, or has an unknown layout or version.
    """
    return read_file(read_header(path))


def read_file(file: GgufFile) -> GgufModel:
    """`read` on a header that was read already.

    Raises:
        ArtifactError: see `read`.
    """
    return _Reader(file).model()


def read_layout(file: GgufFile) -> Layout:
    """The layout of a checked header.

    Raises:
        ArtifactError: a factorised file of an unknown layout or version.
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
class PairEntry:
    """Tensor names of one pair, and what `weights.Pair` needs besides."""

    dictionary: str
    codes: str
    name: str
    pattern: Pattern


@dataclass(frozen=True)
class FactorizedIndex:
    """What a factorised file says about its matrices.

    Attributes:
        leaves: by tensor name.
        matrices: GGUF stem (``blk.0.attn_q``) to its pairs; plain matrices are not listed.
    """

    leaves: Mapping[str, LeafEntry]
    matrices: Mapping[str, tuple[PairEntry, ...]]


def read_index(file: GgufFile) -> FactorizedIndex:
    """The description of the matrices of a factorised file, checked against its tensors.

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
    matrices: dict[str, tuple[PairEntry, ...]] = {}
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


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: known size first, bytes later."""

    name: str
    kind: str  # ggml type
    shape: tuple[int, ...]  # as numpy counts, in elements
    nbytes: int
    described: str
    rows: Callable[[], np.ndarray]


class _Plan:
    """Names, types and sizes of every tensor, from shapes alone; the bytes are made one tensor at a time."""

    def __init__(self, model: CompressedModel, options: GgufOptions) -> None:
        self.model, self.options = model, options
        self.entries: list[_Entry] = []
        self.facts: list[str] = []
        self.matrix_bytes: dict[str, int] = {}
        self._leaves: dict[str, dict[str, Any]] = {}
        self._pairs: dict[str, list[dict[str, Any]]] = {}
        self._dictionaries: dict[tuple[str, int], str] = {}
        frequencies = gguf_metadata.rope_frequencies(model.architecture, model.config)
        if frequencies is not None:
            self._floats("rope_freqs.weight", frequencies.shape, "F32", lambda: frequencies)
        names = _Names(model.architecture, model.config)
        for name, matrix in model.matrices.items():
            if name == model.architecture.head and model.tied:
                continue
            before = sum(entry.nbytes for entry in self.entries)
            self._matrix(name, names.stem(name), matrix, names.order(name))
            self.matrix_bytes[name] = sum(entry.nbytes for entry in self.entries) - before
        for name in model.tensors:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            self._tensor(name, names.tensor(name), names.order(name.rpartition(".")[0]))

    def keys(self) -> dict[str, gguf_metadata.Value]:
        """The description of factorised matrices; nothing for a dense file."""
        if self.options.layout == "dense":
            return {}
        return {
            "compot.layout": self.options.layout,
            "compot.layout.version": LAYOUT_VERSION,
            "compot.base_architecture": self.model.architecture.ggml_name,
            "compot.tensors": json.dumps(self._leaves, separators=(",", ":")),
            "compot.matrices": json.dumps(self._pairs, separators=(",", ":")),
        }

    def _matrix(self, name: str, stem: str, matrix: Matrix, order: np.ndarray | None) -> None:
        table = name in (self.model.architecture.embedding, self.model.architecture.head)
        if self.options.layout == "dense":
            self._dense_matrix(name, stem, matrix, order, table)
        elif isinstance(matrix, Factorized):
            if table:
                raise UnsupportedModelError(
                    f"{name}: a factorised embedding or head cannot be stored in this layout."
                )
            self._factorized(name, stem, matrix, order)
        else:
            self._leaf(f"{stem}.weight", self._getter(name), matrix, DENSE, order, table)

    def _getter(self, name: str) -> Callable[[], Leaf]:
        """Read a plain matrix when its turn comes."""

        def get() -> Leaf:
            matrix = self.model.matrices[name]
            assert not isinstance(matrix, Factorized)
            return matrix

        return get

    def _factorized(self, name: str, stem: str, matrix: Factorized, order: np.ndarray | None) -> None:
        pairs: list[dict[str, Any]] = []
        for position, pair in enumerate(matrix.pairs):
            number = f".{position}" if position else ""
            shared = (pair.dictionary_name, position)
            if shared not in self._dictionaries:
                self._dictionaries[shared] = f"{stem}.dict{number}.weight"
                self._leaf(
                    self._dictionaries[shared],
                    lambda p=position: _pair_of(self.model, name, p).dictionary,  # type: ignore[misc]
                    pair.dictionary,
                    DENSE,
                    None,
                )
            codes = f"{stem}.code{number}.weight"
            self._leaf(
                codes,
                lambda p=position: _pair_of(self.model, name, p).codes,  # type: ignore[misc]
                pair.codes,
                pair.pattern,
                order,
            )
            pairs.append(
                {
                    "dictionary": self._dictionaries[shared],
                    "codes": codes,
                    "name": pair.dictionary_name,
                    "kept": pair.pattern.kept,
                    "of": pair.pattern.of,
                }
            )
        self._pairs[stem] = pairs

    def _leaf(
        self,
        tensor: str,
        get: Callable[[], Leaf],
        leaf: Leaf,
        pattern: Pattern,
        order: np.ndarray | None,
        table: bool = False,
    ) -> None:
        """A leaf of a factorised or sparse file, exactly as it is."""
        inputs, outputs = leaf.shape
        entry: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
        if isinstance(leaf, Dense):
            kind = _TORCH_FLOATS.get(leaf.weight.dtype, "")
            if not kind:
                raise RecipeError(
                    f"{tensor}: {leaf.weight.dtype} cannot be stored; use float16, bfloat16 or float32."
                )
            if table and self.options.table_type is not None and self.options.table_type != kind:
                self._table(tensor, get, leaf.shape, self.options.table_type, order)
                return
            self._leaves[tensor] = entry
            self._floats(tensor, (outputs, inputs), kind, lambda: _float_rows(get(), kind, order))
            return
        grid = leaf.grid
        entry |= {"bits": grid.bits, "group": grid.group}
        if self.options.layout == "sparse":
            form = gguf_planes.PlaneFormat.of(inputs, grid, pattern)
            if not pattern.is_dense and form.pattern.is_dense:
                self.facts.append(f"{tensor}: codes of pattern {pattern} are stored dense, zeros included.")
            entry["pattern"] = str(form.pattern)
            self._leaves[tensor] = entry
            shape = form.shape(outputs)
            described = f"{'columns' if form.narrow else 'planes'} {grid} {form.pattern}"
            self.entries.append(
                _Entry(
                    tensor,
                    "I8",
                    shape,
                    form.nbytes(outputs),
                    described,
                    lambda: _plane_rows(get(), form, order),
                )
            )
            return
        gguf_blocks.check_group(grid, inputs)
        self._leaves[tensor] = entry
        kind = gguf_blocks.block_type(grid)
        padded = _round_up(inputs, gguf_blocks.BLOCK)
        if padded != inputs:
            self.facts.append(f"{tensor}: rows of {inputs} are padded to {padded} with zeros.")
        nbytes = outputs * padded // gguf_blocks.BLOCK * gguf_blocks.BLOCK_BYTES[kind]
        self.entries.append(
            _Entry(
                tensor, kind, (outputs, padded), nbytes, kind, lambda: _block_rows(get(), kind, padded, order)
            )
        )

    def _dense_matrix(
        self, name: str, stem: str, matrix: Matrix, order: np.ndarray | None, table: bool
    ) -> None:
        inputs, outputs = matrix.shape
        tensor = f"{stem}.weight"
        wanted = self._dense_type(matrix, table)
        kind = gguf_quantize.fitting_type(wanted, inputs)
        if isinstance(matrix, Quantized) and kind in gguf_blocks.BLOCK_BYTES:
            group_fits = matrix.grid.group % gguf_blocks.BLOCK == 0 or matrix.grid.group >= inputs
            bits_fit = matrix.grid.bits <= (4 if kind == "Q4_0" else 8)
            if group_fits and bits_fit:
                nbytes = outputs * inputs // gguf_blocks.BLOCK * gguf_blocks.BLOCK_BYTES[kind]
                self.entries.append(
                    _Entry(
                        tensor,
                        kind,
                        (outputs, inputs),
                        nbytes,
                        f"{kind} exact",
                        lambda: _block_rows(self._getter(name)(), kind, inputs, order),
                    )
                )
                return
        if kind != wanted:
            self.facts.append(
                f"{tensor}: rows of {inputs} do not split into blocks of {wanted}; stored as {kind}."
            )
        if kind in gguf_quantize.NEED_IMPORTANCE and name not in (self.options.importance or {}):
            raise RecipeError(
                f"{name}: {kind} needs importance weights, the diagonal of its Gram. "
                f"Calibrate, or use IQ2_S or Q2_K."
            )
        nbytes = outputs * gguf_quantize.row_bytes(kind, inputs)
        self.entries.append(
            _Entry(
                tensor, kind, (outputs, inputs), nbytes, kind, lambda: self._product_rows(name, kind, order)
            )
        )

    def _dense_type(self, matrix: Matrix, table: bool) -> str:
        if table and isinstance(matrix, Dense):
            if self.options.table_type is not None:
                return self.options.table_type
            if self.options.type == "auto":
                return "F16"
            return self.options.type if self.options.type in (*gguf_quantize.FLOATS, "Q8_0") else "Q8_0"
        if self.options.type != "auto":
            # A table is read row by row and decides the logits: no fewer than 8 bits unless it has fewer.
            if table and self.options.type not in gguf_quantize.FLOATS:
                return gguf_blocks.block_type(matrix.grid) if isinstance(matrix, Quantized) else "Q8_0"
            return self.options.type
        match matrix:
            case Quantized():
                return gguf_blocks.block_type(matrix.grid)
            case Factorized():
                return "Q8_0"
            case Dense():
                return "F16"
            case _:
                assert_never(matrix)

    def _product_rows(self, name: str, kind: str, order: np.ndarray | None) -> np.ndarray:
        rows = _ordered(self.model.matrices[name].dequantize().numpy(), order).T
        weights = (self.options.importance or {}).get(name)
        importance = None if weights is None else weights.detach().float().cpu().numpy()
        if importance is not None and importance.shape != (rows.shape[1],):
            raise RecipeError(f"{name}: {importance.shape} importance weights for {rows.shape[1]} inputs.")
        return gguf_quantize.quantize(np.ascontiguousarray(rows), kind, importance)

    def _table(
        self,
        tensor: str,
        get: Callable[[], Leaf],
        shape: tuple[int, int],
        wanted: str,
        order: np.ndarray | None,
    ) -> None:
        inputs, outputs = shape
        kind = gguf_quantize.fitting_type(wanted, inputs)
        self.facts.append(f"{tensor}: floating point converted to {kind}.")
        self._leaves[tensor] = {"inputs": inputs, "outputs": outputs}
        self.entries.append(
            _Entry(
                tensor,
                kind,
                (outputs, inputs),
                outputs * gguf_quantize.row_bytes(kind, inputs),
                kind,
                lambda: gguf_quantize.quantize(
                    np.ascontiguousarray(_ordered(get().dequantize().numpy(), order).T), kind
                ),
            )
        )

    def _tensor(self, name: str, target: str, order: np.ndarray | None) -> None:
        """A norm or a bias: always float32, which is what llama.cpp wants of vectors."""
        tensor = self.model.tensors[name]
        if tensor.dim() != 1:
            raise UnsupportedModelError(
                f"{name}: a tensor of shape {tuple(tensor.shape)} has no place in GGUF."
            )
        permuted = order if name.endswith(".bias") else None

        def rows() -> np.ndarray:
            values = self.model.tensors[name].detach().float().cpu().numpy()
            return values if permuted is None else values[permuted]

        self._floats(target, tuple(tensor.shape), "F32", rows)

    def _floats(self, tensor: str, shape: tuple[int, ...], kind: str, rows: Callable[[], np.ndarray]) -> None:
        size = 4 if kind == "F32" else 2
        self.entries.append(_Entry(tensor, kind, shape, size * math.prod(shape), kind, rows))


class _Names:
    """Module paths to GGUF stems, and the output order that a matrix needs."""

    def __init__(self, architecture: Architecture, config: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self._stems = {
            architecture.embedding: "token_embd",
            architecture.head: "output",
            architecture.final_norm: "output_norm",
        }
        for layer in range(int(config["num_hidden_layers"])):
            for path, short in architecture.ggml_names.items():
                self._stems[f"{architecture.block_path(layer)}.{path}"] = f"blk.{layer}.{short}"
        self._orders: dict[str, np.ndarray] = {}
        if architecture.ggml_interleaved_rope:
            heads, head = int(config["num_attention_heads"]), architecture.head_size(config)
            groups = int(config.get("num_key_value_heads") or heads)
            self._orders = {
                "attn_q": gguf_metadata.interleaved_rope(heads, head),
                "attn_k": gguf_metadata.interleaved_rope(groups, head),
            }

    def stem(self, module: str) -> str:
        """``model.layers.0.self_attn.q_proj`` to ``blk.0.attn_q``."""
        if module not in self._stems:
            raise UnsupportedModelError(f"{module} has no name in GGUF for {self.architecture.model_type}.")
        return self._stems[module]

    def module(self, stem: str) -> str | None:
        """The inverse of `stem`; None for a stem that no module has."""
        if not hasattr(self, "_modules"):
            self._modules = {short: path for path, short in self._stems.items()}
        return self._modules.get(stem)

    def tensor(self, name: str) -> str:
        """A checkpoint name to a GGUF tensor name."""
        module, _, part = name.rpartition(".")
        return f"{self.stem(module)}.{part}"

    def order(self, module: str) -> np.ndarray | None:
        """``new[:, j] = old[:, order[j]]`` for a module's outputs, or None."""
        return self._orders.get(self._stems.get(module, "").rpartition(".")[2])


def _pair_of(model: CompressedModel, name: str, position: int) -> Pair:
    matrix = model.matrices[name]
    assert isinstance(matrix, Factorized)
    return matrix.pairs[position]


def _ordered(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    return array if order is None else array[:, order]


def _float_rows(leaf: Leaf, kind: str, order: np.ndarray | None) -> np.ndarray:
    if kind == "BF16":
        assert isinstance(leaf, Dense)
        bits = leaf.weight.detach().cpu().contiguous().view(torch.int16).numpy()
        return np.ascontiguousarray(_ordered(bits, order).T).view(np.uint8)
    values = leaf.weight.detach().cpu().numpy() if isinstance(leaf, Dense) else leaf.dequantize().numpy()
    return np.ascontiguousarray(_ordered(values, order).T).astype("<f4" if kind == "F32" else "<f2")


def _arrays(leaf: Leaf, order: np.ndarray | None) -> Quantized:
    assert isinstance(leaf, Quantized)
    if order is None:
        return leaf
    index = torch.from_numpy(order)
    return Quantized(leaf.integers[:, index], leaf.scales[:, index], leaf.grid)


def _plane_rows(leaf: Leaf, form: gguf_planes.PlaneFormat, order: np.ndarray | None) -> np.ndarray:
    quantized = _arrays(leaf, order)
    return gguf_planes.pack(quantized.integers.cpu().numpy(), quantized.scales.cpu().numpy(), form)


def _block_rows(leaf: Leaf, kind: str, padded: int, order: np.ndarray | None) -> np.ndarray:
    quantized = _arrays(leaf, order)
    integers, scales = quantized.integers.cpu().numpy(), quantized.scales.cpu().numpy()
    if padded != len(integers):
        integers = np.concatenate([integers, np.zeros((padded - len(integers), integers.shape[1]), np.int8)])
    return gguf_blocks.pack_blocks(integers, scales, quantized.grid.group, kind)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _metadata(
    model: CompressedModel, options: GgufOptions
) -> tuple[dict[str, gguf_metadata.Value], list[str]]:
    architecture, config = model.architecture, model.config
    tokenizer = tokenizer_keys(model.source, config)
    facts = list(tokenizer.facts)
    longest, window = int(config["max_position_embeddings"]), gguf_metadata.sliding_window(config)
    if window is not None and window < longest:
        facts.append(
            f"llama.cpp has no sliding window for {architecture.model_type}: the context of {longest} "
            f"positions is cut to the window of {window}, within which both agree."
        )
    file_type = (
        _FILE_TYPES.get(options.type, _FILE_TYPE_GUESSED) if options.layout == "dense" else _FILE_TYPE_GUESSED
    )
    keys: dict[str, gguf_metadata.Value] = {
        "general.name": options.name or Path(model.source).name or architecture.model_type,
        "general.quantization_version": 2,
        "general.file_type": file_type,
    }
    for key, text in options.provenance.items():
        keys[f"compot.{key}"] = text
    keys |= gguf_metadata.hyperparameters(architecture, config)
    keys |= tokenizer.keys
    return keys, facts


def _add_key(writer: Any, key: str, value: gguf_metadata.Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _announce(writer: Any, entry: _Entry) -> None:
    from gguf import GGMLQuantizationType

    floats = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
    if entry.kind in floats:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(floats[entry.kind]), entry.nbytes)
    else:
        byte_shape = (*entry.shape[:-1], entry.nbytes // math.prod(entry.shape[:-1]))
        writer.add_tensor_info(
            entry.name,
            byte_shape,
            np.dtype(np.uint8),
            entry.nbytes,
            raw_dtype=GGMLQuantizationType[entry.kind],
        )


# --- reading ------------------------------------------------------------------------------------------------


class _Reader:
    """One pass over a checked file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.layout = read_layout(file)
        base = file.text("general.architecture" if self.layout == "dense" else "compot.base_architecture")
        self.architecture = _base_architecture(file, base)
        self.names = _Names(self.architecture, _config(file, base))
        self.index = FactorizedIndex({}, {}) if self.layout == "dense" else read_index(file)

    def model(self) -> GgufModel:
        matrices: dict[str, Matrix] = {}
        tensors: dict[str, Tensor] = {}
        used = {
            name for pairs in self.index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        }
        for stem, pairs in self.index.matrices.items():
            module = self._module(stem)
            matrices[module] = self._factorized(module, pairs)
        for name, tensor in self.file.tensors.items():
            if name in used or name == "rope_freqs.weight":
                continue
            stem, _, part = name.rpartition(".")
            module = self._module(stem)
            if len(tensor.shape) == 1:
                values = gguf_quantize.dequantize(self.file.bytes_of(name), tensor.kind).reshape(-1)
                order = self.names.order(module) if part == "bias" else None
                tensors[f"{module}.{part}"] = torch.from_numpy(_restored(values[None], order)[0].copy())
            elif len(tensor.shape) == 2:
                matrices[module] = self._plain(module, name)
            else:
                raise ArtifactError(
                    f"{self.file.path.name}: {name} has {len(tensor.shape)} dimensions, not 1 or 2."
                )
        layers = self.file.count(f"{self.architecture.ggml_name}.block_count")
        expected = (self.architecture.embedding, *self.architecture.linear_names(layers))
        missing = [name for name in expected if name not in matrices]
        if missing:
            raise ArtifactError(
                f"{self.file.path.name}: {len(missing)} matrices are missing, {missing[0]} first."
            )
        return GgufModel(
            layout=self.layout,
            architecture=self.architecture,
            matrices={
                name: matrices[name] for name in (*expected, self.architecture.head) if name in matrices
            },
            tensors=tensors,
            tied=self.architecture.head not in matrices,
            metadata=self.file.metadata,
        )

    def _module(self, stem: str) -> str:
        module = self.names.module(stem)
        if module is None:
            raise ArtifactError(
                f"{self.file.path.name}: {stem} belongs to no module of {self.architecture.model_type}."
            )
        return module

    def _factorized(self, module: str, pairs: tuple[PairEntry, ...]) -> Factorized:
        order = self.names.order(module)
        return Factorized(
            tuple(
                Pair(
                    self._leaf(self.index.leaves[pair.dictionary], None),
                    self._leaf(self.index.leaves[pair.codes], order),
                    pair.name,
                    pair.pattern,
                )
                for pair in pairs
            )
        )

    def _plain(self, module: str, name: str) -> Leaf:
        order = self.names.order(module)
        if name in self.index.leaves:
            return self._leaf(self.index.leaves[name], order)
        if self.layout != "dense":
            raise ArtifactError(
                f"{self.file.path.name}: the matrix {name} is not described in compot.tensors."
            )
        tensor = self.file.tensors[name]
        grid = {"Q4_0": Grid(4, 32), "Q8_0": Grid(8, 32)}.get(tensor.kind)
        return self._leaf(LeafEntry(name, tensor.shape[1], tensor.shape[0], grid, DENSE), order)

    def _leaf(self, entry: LeafEntry, order: np.ndarray | None) -> Leaf:
        return _reordered(read_leaf(self.file, entry), order)


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


def read_leaf(file: GgufFile, entry: LeafEntry) -> Leaf:
    """A leaf with its outputs in the order of the file.

    Raises:
        ArtifactError: the bytes are not what `write` writes.
    """
    kind = file.tensors[entry.tensor].kind
    rows = file.bytes_of(entry.tensor)
    if entry.grid is None:
        return Dense(_floating(rows, kind))
    if kind == "I8":
        integers, scales = gguf_planes.unpack(rows.view(np.int8), plane_format(entry), entry.outputs)
    else:
        integers, scales = gguf_blocks.unpack_blocks(rows, entry.inputs, entry.grid.group, kind)
        if integers[entry.inputs :].any():
            raise ArtifactError(f"{file.path.name}: the padding of {entry.tensor} is not zero: damaged file.")
        integers = np.ascontiguousarray(integers[: entry.inputs])
    if integers.size and not entry.grid.lowest <= integers.min() <= integers.max() <= entry.grid.highest:
        raise ArtifactError(f"{file.path.name}: {entry.tensor} has integers outside {entry.grid}.")
    return Quantized(torch.from_numpy(integers), torch.from_numpy(scales), entry.grid)


def _floating(rows: np.ndarray, kind: str) -> Tensor:
    if kind == "BF16":
        bits = np.ascontiguousarray(np.ascontiguousarray(rows).view("<i2").T)
        return torch.from_numpy(bits).view(torch.bfloat16)
    if kind == "F16":
        return torch.from_numpy(np.ascontiguousarray(np.ascontiguousarray(rows).view("<f2").T))
    return torch.from_numpy(np.ascontiguousarray(gguf_quantize.dequantize(rows, kind).T))


def _reordered(leaf: Leaf, order: np.ndarray | None) -> Leaf:
    """Undo the order of rotary pairs."""
    if order is None:
        return leaf
    if leaf.shape[1] != len(order):
        raise ArtifactError(f"A matrix of {leaf.shape[1]} outputs, {len(order)} are expected: damaged file.")
    back = torch.from_numpy(np.argsort(order))
    if isinstance(leaf, Dense):
        return Dense(leaf.weight[:, back])
    return Quantized(leaf.integers[:, back], leaf.scales[:, back], leaf.grid)


def _restored(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Undo `_ordered`."""
    if order is None:
        return array
    if array.shape[1] != len(order):
        raise ArtifactError(f"A matrix of {array.shape[1]} outputs, {len(order)} are expected: damaged file.")
    return array[:, np.argsort(order)]


def _base_architecture(file: GgufFile, name: str) -> Architecture:
    """The architecture that llama.cpp calls `name`; Mistral reads back as Llama, which it equals."""
    for architecture in ARCHITECTURES.values():
        if architecture.ggml_name == name:
            return architecture
    raise ArtifactError(f"{file.path.name}: the architecture {name!r} is not one that compot-deploy writes.")


def _config(file: GgufFile, prefix: str) -> dict[str, int]:
    """The sizes that names and orders depend on, as a transformers configuration calls them."""
    result = {
        "num_hidden_layers": file.count(f"{prefix}.block_count"),
        "num_attention_heads": file.count(f"{prefix}.attention.head_count"),
        "num_key_value_heads": file.count(f"{prefix}.attention.head_count_kv"),
        "hidden_size": file.count(f"{prefix}.embedding_length"),
        "head_dim": file.count(f"{prefix}.attention.key_length"),
    }
    # Orders of rotary pairs are built from these numbers, so they must be those of real tensors.
    widest = max((tensor.shape[0] for tensor in file.tensors.values()), default=0)
    rows = max(result["num_attention_heads"], result["num_key_value_heads"]) * result["head_dim"]
    if result["num_hidden_layers"] > len(file.tensors) or rows > 64 * widest:
        raise ArtifactError(
            f"{file.path.name}: {result['num_hidden_layers']} blocks of {result['num_attention_heads']} "
            f"heads contradict the {len(file.tensors)} tensors of the file."
        )
    return result


def _json_object(file: GgufFile, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.text(key))
    except (ValueError, RecursionError):
        raise ArtifactError(f"{file.path.name}: the key {key} is not JSON: damaged file.") from None
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
            shape = (outputs, _round_up(inputs, gguf_blocks.BLOCK))
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


def _pair_entry(where: str, stem: str, entry: Any) -> PairEntry:
    texts: list[str] = []
    for key in ("dictionary", "codes", "name"):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str):
            raise ArtifactError(f"{where}: {stem} has no {key}: damaged file.")
        texts.append(value)
    kept, of = _whole(where, entry, "kept"), _whole(where, entry, "of")
    if kept > of:
        raise ArtifactError(f"{where}: {stem} keeps {kept} of {of} atoms.")
    return PairEntry(texts[0], texts[1], texts[2], Pattern(kept, of))
