"""What is tuned of a matrix: its scales. One place for every kind of matrix, and each gives its values from them.

A matrix is split into numbers that stay (integers, patterns, grids) and scales, by a key that tells them apart in a
block. Matrices that share a dictionary share its scales, so they have one key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized


def grids_of(name: str, matrix: Matrix) -> dict[str, Quantized]:
    """Leaves of a matrix that have scales, by key; none of floating-point ones."""
    return {key: leaf for key, leaf in _leaves(name, matrix).items() if isinstance(leaf, Quantized)}


def weight_of(name: str, matrix: Matrix, scales: Mapping[str, Tensor]) -> Float[Tensor, "inputs outputs"]:
    """Values of a matrix with other scales, in float32: what `Matrix.dequantize` gives, and gradients reach the scales.

    Args:
        name: of the matrix.
        matrix: its integers.
        scales: by key, (groups, outputs) of each leaf, float32; the matrix's own stand where there are none.
    """
    device = next((values.device for values in scales.values()), torch.device("cpu"))
    match matrix:
        case Dense() | Quantized():
            return _values(matrix, scales.get(name), device)
        case Factorized():
            products = [
                _values(pair.dictionary, scales.get(_dictionary_key(pair, position)), device)
                @ _values(pair.codes, scales.get(_codes_key(name, position)), device)
                for position, pair in enumerate(matrix.pairs)
            ]
            total = products[0]
            for product in products[1:]:
                total = total + product
            return total
        case _:
            assert_never(matrix)


def with_scales(name: str, matrix: Matrix, scales: Mapping[str, Tensor]) -> Matrix:
    """The same matrix with other scales, by key; integers are the same tensors."""
    match matrix:
        case Dense() | Quantized():
            return _stored(matrix, scales.get(name))
        case Factorized():
            return Factorized(
                tuple(
                    replace(
                        pair,
                        dictionary=_stored(pair.dictionary, scales.get(_dictionary_key(pair, position))),
                        codes=_stored(pair.codes, scales.get(_codes_key(name, position))),
                    )
                    for position, pair in enumerate(matrix.pairs)
                )
            )
        case _:
            assert_never(matrix)


def _leaves(name: str, matrix: Matrix) -> dict[str, Leaf]:
    if not isinstance(matrix, Factorized):
        return {name: matrix}
    found: dict[str, Leaf] = {}
    for position, pair in enumerate(matrix.pairs):
        found[_dictionary_key(pair, position)] = pair.dictionary
        found[_codes_key(name, position)] = pair.codes
    return found


def _dictionary_key(pair: FactorPair, position: int) -> str:
    return f"{pair.dictionary_name}|dictionary{position}"


def _codes_key(name: str, position: int) -> str:
    return f"{name}|codes{position}"


def _values(leaf: Leaf, scales: Tensor | None, device: torch.device) -> Tensor:
    if isinstance(leaf, Dense) or scales is None:
        return leaf.dequantize().to(device)
    table, grid = leaf.grid.table, leaf.grid
    integers = leaf.integers.to(device)
    units = integers.float() if table is None else scales.new_tensor(table)[integers.long() - grid.lowest]
    return units * scales.repeat_interleave(grid.group, dim=0)[: leaf.shape[0]]


def _stored(leaf: Leaf, scales: Tensor | None) -> Leaf:
    if isinstance(leaf, Dense) or scales is None:
        return leaf
    return replace(leaf, scales=scales.to("cpu", torch.float16).contiguous())
