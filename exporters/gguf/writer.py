"""A model as one GGUF file: every tensor planned from shapes, then written one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.core.matrix import Dense, Factorized, Leaf, Matrix, Pair, Quantized
from compot_deploy.errors import RecipeError, UnsupportedModelError
from compot_deploy.exporters.gguf import (
    blocks as gguf_blocks,
)
from compot_deploy.exporters.gguf import (
    metadata as gguf_metadata,
)
from compot_deploy.exporters.gguf import (
    planes as gguf_planes,
)
from compot_deploy.exporters.gguf import (
    quantize as gguf_quantize,
)
from compot_deploy.exporters.gguf.index import ARCHITECTURE, LAYOUT_VERSION, LAYOUTS, Layout
from compot_deploy.exporters.gguf.names import GgufNames
from compot_deploy.exporters.gguf.storage import GgufStorage
from compot_deploy.exporters.gguf.tokenizer import tokenizer_keys
from compot_deploy.models.compressed import CompressedModel

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
    return sum(math.ceil(size / GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT for size in sizes) - sizes[0]


def _write_header(writer: Any, keys: Mapping[str, gguf_metadata.Value], entries: Sequence[_Entry]) -> None:
    for key, value in keys.items():
        _add_key(writer, key, value)
    for entry in entries:
        _announce(writer, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


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
        self._wider: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self._unweighted: dict[str, list[str]] = {}
        frequencies = gguf_metadata.rope_frequencies(model.architecture, model.config)
        if frequencies is not None:
            self._floats("rope_freqs.weight", frequencies.shape, "F32", lambda: frequencies)
        names = GgufNames(model.architecture, model.config)
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
        self.facts += self._remarks()

    def _remarks(self) -> list[str]:
        """What many matrices have in common is said once."""
        result = []
        for (wanted, kind), cases in self._wider.items():
            tensor = cases[0][0]
            others = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
            widths = ", ".join(map(str, sorted({inputs for _, inputs in cases})))
            result.append(
                f"{tensor}{others}: rows of {widths} do not split into blocks of {wanted}; stored as {kind}."
            )
        for kind, tensors in self._unweighted.items():
            result.append(
                f"{tensors[0]} and {len(tensors) - 1} more: rounded to {kind} without importance weights, "
                "which need llama.cpp's library (the extra llama)."
            )
        return result

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
        GgufStorage(self.options.layout).check(inputs, grid, pattern)
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
        padded = gguf_blocks.padded(inputs)
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
        integers = isinstance(matrix, Quantized) and matrix.grid.codebook == "integer"
        if isinstance(matrix, Quantized) and integers and kind in gguf_blocks.BLOCK_BYTES:
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
            self._wider.setdefault((wanted, kind), []).append((tensor, inputs))
        important = name in (self.options.importance or {})
        if kind in gguf_quantize.NEED_IMPORTANCE and not important:
            raise RecipeError(
                f"{name}: {kind} needs importance weights, the diagonal of its Gram. "
                f"Calibrate, or use IQ2_S or Q2_K."
            )
        if important and gguf_quantize.searched(kind) and not gguf_quantize.weighs(kind):
            self._unweighted.setdefault(kind, []).append(tensor)
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
