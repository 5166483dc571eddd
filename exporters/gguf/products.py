"""The matrices of a dense GGUF file: which type each is stored in, and the product that is rounded to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from typing_extensions import assert_never

from compot_deploy.core.matrix import Dense, Factorized, Matrix, Quantized
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.rows import Entry, block_rows, leaf_getter, ordered, shape_of
from compot_deploy.models.compressed import CompressedModel


class Products:
    """The matrices of a dense file: integers that one of ggml's types holds as they are, everything else rounded.

    Args:
        model: what is written.
        options: types and importance.
    """

    def __init__(self, model: CompressedModel, options: GgufOptions) -> None:
        self.model, self.options = model, options
        self._wider: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self._unweighted: dict[str, list[str]] = {}
        self._mixed: list[tuple[str, str]] = []

    def entry(self, name: str, tensor: str, matrix: Matrix, order: np.ndarray | None, table: bool) -> Entry:
        """How a matrix is stored.

        Args:
            name: module path.
            tensor: name in the file.
            matrix: what it is.
            order: of its outputs in the file.
            table: whether it is the token embedding or the head.

        Raises:
            RecipeError: a type that needs importance weights, which are not there.
        """
        inputs, outputs = shape_of(matrix, order)
        wanted = self._type(matrix, table)
        kind = gguf_quantize.fitting_type(wanted, inputs)
        if isinstance(matrix, Quantized) and _carries_over(matrix, kind):
            nbytes = outputs * inputs // gguf_blocks.BLOCK * gguf_blocks.BLOCK_BYTES[kind]
            get = leaf_getter(self.model, name)
            return Entry(
                tensor,
                kind,
                (outputs, inputs),
                nbytes,
                f"{kind} exact",
                lambda: block_rows(get(), kind, inputs, order),
            )
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
        return Entry(tensor, kind, (outputs, inputs), nbytes, kind, lambda: self._rows(name, kind, order))

    def stack(self, matrices: Mapping[str, Matrix], tensor: str) -> Entry:
        """How the same matrix of all experts of a block is stored: in one type, the widest that one of them takes."""
        made = [self.entry(name, tensor, matrix, None, False) for name, matrix in matrices.items()]
        widest = max(made, key=lambda entry: entry.nbytes)
        (outputs, inputs), kinds = widest.shape, sorted({entry.kind for entry in made})
        if len(kinds) > 1:
            self._mixed.append((tensor, widest.kind))

        def rows() -> np.ndarray:
            return np.concatenate(
                [self._expert_rows(name, matrix, widest.kind) for name, matrix in matrices.items()]
            )

        shape = (len(made), outputs, inputs)
        return Entry(tensor, widest.kind, shape, widest.nbytes * len(made), widest.described, rows)

    def _expert_rows(self, name: str, matrix: Matrix, kind: str) -> np.ndarray:
        if isinstance(matrix, Quantized) and _carries_over(matrix, kind):
            return block_rows(leaf_getter(self.model, name)(), kind, matrix.shape[0], None)
        return self._rows(name, kind, None)

    def remarks(self) -> list[str]:
        """What many matrices have in common is said once."""
        result = []
        for (wanted, kind), cases in self._wider.items():
            tensor = cases[0][0]
            others = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
            widths = ", ".join(map(str, sorted({inputs for _, inputs in cases})))
            result.append(
                f"{tensor}{others}: rows of {widths} do not split into blocks of {wanted}; stored as {kind}."
            )
        if self._mixed:
            tensor, kind = self._mixed[0]
            result.append(
                f"{tensor} and {len(self._mixed) - 1} more: experts of several types are stored in the widest of them "
                f"({kind} there), because a stack has one."
            )
        for kind, tensors in self._unweighted.items():
            result.append(
                f"{tensors[0]} and {len(tensors) - 1} more: rounded to {kind} without importance weights, "
                "which need llama.cpp's library (the extra llama)."
            )
        return result

    def _type(self, matrix: Matrix, table: bool) -> str:
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

    def _rows(self, name: str, kind: str, order: np.ndarray | None) -> np.ndarray:
        rows = ordered(self.model.matrices[name].dequantize().numpy(), order).T
        weights = (self.options.importance or {}).get(name)
        importance = None if weights is None else weights.detach().float().cpu().numpy()
        if importance is not None and importance.shape != (rows.shape[1],):
            raise RecipeError(f"{name}: {importance.shape} importance weights for {rows.shape[1]} inputs.")
        return gguf_quantize.quantize(np.ascontiguousarray(rows), kind, importance)


def _carries_over(matrix: Quantized, kind: str) -> bool:
    """Whether a type holds the integers and scales as they are."""
    if matrix.grid.codebook != "integer" or kind not in gguf_blocks.BLOCK_BYTES:
        return False
    group_fits = matrix.grid.group % gguf_blocks.BLOCK == 0 or matrix.grid.group >= matrix.shape[0]
    return group_fits and matrix.grid.bits <= (4 if kind == "Q4_0" else 8)
