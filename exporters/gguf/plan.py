"""Every tensor of a GGUF file, planned from shapes before a byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.errors import RecipeError, UnsupportedModelError
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.index import LAYOUT_VERSION
from compot_deploy.exporters.gguf.kinds import Value
from compot_deploy.exporters.gguf.metadata import Described, check_layout
from compot_deploy.exporters.gguf.names import GgufNames, loose_names, owner_of
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.products import Products
from compot_deploy.exporters.gguf.rotary import rope_tensors
from compot_deploy.exporters.gguf.rows import (
    Entry,
    block_rows,
    float_rows,
    leaf_getter,
    ordered,
    plane_rows,
    shape_of,
)
from compot_deploy.exporters.gguf.storage import GgufStorage
from compot_deploy.models.compressed import CompressedModel

_TORCH_FLOATS: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorPlan:
    """Names, types and sizes of every tensor, from shapes alone; the bytes are made one tensor at a time."""

    def __init__(self, model: CompressedModel, described: Described, options: GgufOptions) -> None:
        self.model, self.options, self._kind = model, options, described.kind
        check_layout(described, options.layout)
        self._products = Products(model, options)
        self.entries: list[Entry] = []
        self.notes: list[str] = []
        self.matrix_bytes: dict[str, int] = {}
        self._leaves: dict[str, dict[str, Any]] = {}
        self._pairs: dict[str, list[dict[str, Any]]] = {}
        self._dictionaries: dict[tuple[str, int], str] = {}
        for tensor, divisors in rope_tensors(described.kind, model.config, described.sizes.head_size).items():
            self._floats(tensor, divisors.shape, "F32", lambda d=divisors: d)  # type: ignore[misc]
        tensors = loose_names(model.tensors)
        modules = (*model.matrices, *(owner_of(name)[0] for name in tensors))
        names = GgufNames(described.kind, described.sizes, modules)
        for name, matrix in model.matrices.items():
            if name == model.head and model.tied:
                continue
            stack = names.experts(names.stem(name))
            if stack:
                if name == stack[0]:
                    self._stack(names.stem(name), stack)
                continue
            before = sum(entry.nbytes for entry in self.entries)
            for stem, order in names.parts(name):
                self._matrix(name, stem, matrix, order)
            self.matrix_bytes[name] = sum(entry.nbytes for entry in self.entries) - before
        for name in tensors:
            module, part = owner_of(name)
            stack = names.experts(names.stem(module))
            for target, order in names.tensors(name):
                if not stack:
                    self._tensor(name, target, order, names.shift(name))
                elif module == stack[0]:
                    self._stacked_tensors([f"{expert}.{part}" for expert in stack], target)
        self.notes += self._products.remarks()

    def keys(self) -> dict[str, Value]:
        """The description of factorized matrices; nothing for a dense file."""
        if self.options.layout == "dense":
            return {}
        return {
            "compot.layout": self.options.layout,
            "compot.layout.version": LAYOUT_VERSION,
            "compot.base_architecture": self._kind.ggml,
            "compot.tensors": json.dumps(self._leaves, separators=(",", ":")),
            "compot.matrices": json.dumps(self._pairs, separators=(",", ":")),
        }

    def _stack(self, stem: str, names: Sequence[str]) -> None:
        """The same matrix of all experts, one tensor."""
        entry = self._products.stack({name: self.model.matrices[name] for name in names}, f"{stem}.weight")
        self.entries.append(entry)
        self.matrix_bytes |= dict.fromkeys(names, entry.nbytes // len(names))

    def _stacked_tensors(self, names: Sequence[str], target: str) -> None:
        shape = (len(names), *self.model.tensors[names[0]].shape)

        def rows() -> np.ndarray:
            return np.stack([self.model.tensors[name].detach().float().cpu().numpy() for name in names])

        self._floats(target, shape, "F32", rows)

    def _matrix(self, name: str, stem: str, matrix: Matrix, order: np.ndarray | None) -> None:
        table = self.model.role(name) == "table"
        if self.options.layout == "dense":
            self.entries.append(self._products.entry(name, f"{stem}.weight", matrix, order, table))
        elif isinstance(matrix, Factorized):
            if table:
                raise UnsupportedModelError(
                    f"{name}: a factorized embedding or head cannot be stored in this layout."
                )
            self._factorized(name, stem, matrix, order)
        else:
            self._leaf(f"{stem}.weight", leaf_getter(self.model, name), matrix, DENSE, order, table)

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
        """A leaf of a factorized or sparse file, exactly as it is."""
        inputs, outputs = shape_of(leaf, order)
        entry: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
        if isinstance(leaf, Dense):
            kind = _TORCH_FLOATS.get(leaf.weight.dtype, "")
            if not kind:
                raise RecipeError(
                    f"{tensor}: {leaf.weight.dtype} cannot be stored; use float16, bfloat16 or float32."
                )
            if table and self.options.table_type is not None and self.options.table_type != kind:
                self._table(tensor, get, (inputs, outputs), self.options.table_type, order)
                return
            self._leaves[tensor] = entry
            self._floats(tensor, (outputs, inputs), kind, lambda: float_rows(get(), kind, order))
            return
        GgufStorage(self.options.layout).check(inputs, leaf.grid, pattern)
        self._leaves[tensor] = entry | {"bits": leaf.grid.bits, "group": leaf.grid.group}
        if self.options.layout == "sparse":
            self._planes(tensor, get, leaf, pattern, order)
        else:
            self._blocks(tensor, get, leaf, order)

    def _planes(
        self,
        tensor: str,
        get: Callable[[], Leaf],
        leaf: Quantized,
        pattern: Pattern,
        order: np.ndarray | None,
    ) -> None:
        (inputs, outputs), grid = shape_of(leaf, order), leaf.grid
        form = gguf_planes.PlaneFormat.of(inputs, grid, pattern)
        if not pattern.is_dense and form.pattern.is_dense:
            self.notes.append(f"{tensor}: codes of pattern {pattern} are stored dense, zeros included.")
        self._leaves[tensor]["pattern"] = str(form.pattern)
        described = f"{'columns' if form.narrow else 'planes'} {grid} {form.pattern}"
        self.entries.append(
            Entry(
                tensor,
                "I8",
                form.shape(outputs),
                form.nbytes(outputs),
                described,
                lambda: plane_rows(get(), form, order),
            )
        )

    def _blocks(
        self, tensor: str, get: Callable[[], Leaf], leaf: Quantized, order: np.ndarray | None
    ) -> None:
        (inputs, outputs), grid = shape_of(leaf, order), leaf.grid
        gguf_blocks.check_group(grid, inputs)
        kind = gguf_blocks.block_type(grid)
        padded = gguf_blocks.padded(inputs)
        if padded != inputs:
            self.notes.append(f"{tensor}: rows of {inputs} are padded to {padded} with zeros.")
        nbytes = outputs * padded // gguf_blocks.BLOCK * gguf_blocks.BLOCK_BYTES[kind]
        self.entries.append(
            Entry(
                tensor, kind, (outputs, padded), nbytes, kind, lambda: block_rows(get(), kind, padded, order)
            )
        )

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
        self.notes.append(f"{tensor}: floating point converted to {kind}.")
        self._leaves[tensor] = {"inputs": inputs, "outputs": outputs}
        self.entries.append(
            Entry(
                tensor,
                kind,
                (outputs, inputs),
                outputs * gguf_quantize.row_bytes(kind, inputs),
                kind,
                lambda: gguf_quantize.quantize(
                    np.ascontiguousarray(ordered(get().dequantize().numpy(), order).T), kind
                ),
            )
        )

    def _tensor(self, name: str, target: str, order: np.ndarray | None, shift: float) -> None:
        """A norm, a bias or a table of positions: always float32, which is what llama.cpp wants of them."""
        tensor = self.model.tensors[name]
        shape = tuple(
            size for size in tensor.shape if size != 1 or tensor.dim() < 3
        )  # kernels of one channel
        if len(shape) not in (1, 2):
            raise UnsupportedModelError(
                f"{name}: a tensor of shape {tuple(tensor.shape)} has no place in GGUF."
            )
        if order is not None:
            shape = (len(order),)

        def rows() -> np.ndarray:
            values = self.model.tensors[name].detach().float().cpu().numpy().reshape(tensor.shape)
            values = values if order is None else values[order]
            return (values + np.float32(shift) if shift else values).reshape(shape)

        self._floats(target, shape, "F32", rows)

    def _floats(self, tensor: str, shape: tuple[int, ...], kind: str, rows: Callable[[], np.ndarray]) -> None:
        size = 4 if kind == "F32" else 2
        self.entries.append(Entry(tensor, kind, shape, size * math.prod(shape), kind, rows))


def _pair_of(model: CompressedModel, name: str, position: int) -> FactorPair:
    matrix = model.matrices[name]
    assert isinstance(matrix, Factorized)
    return matrix.pairs[position]
