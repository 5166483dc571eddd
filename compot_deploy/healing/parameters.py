"""What is tuned of a matrix: its scales. One place for every kind of matrix, and each gives its values from them.

A matrix is split into numbers that stay (integers, patterns, grids) and scales, by a key that tells them apart in a
block. Matrices that share a dictionary share its scales, so they have one key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
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


def scale_gradients(
    name: str, matrix: Matrix, scales: Mapping[str, Tensor], gradient: Float[Tensor, "inputs outputs"]
) -> dict[str, Tensor]:
    """Gradients at the scales of a matrix, by key, from the one at its values.

    Args:
        name: of the matrix.
        matrix: its integers.
        scales: by key, float32; see `weight_of`.
        gradient: of a loss at the values.
    """
    match matrix:
        case Dense() | Quantized():
            return {name: _summed(matrix, gradient)} if name in scales else {}
        case Factorized():
            found: dict[str, Tensor] = {}
            for position, pair in enumerate(matrix.pairs):
                keys = _dictionary_key(pair, position), _codes_key(name, position)
                dictionary, codes = (
                    _values(leaf, scales.get(key), gradient.device)
                    for key, leaf in zip(keys, (pair.dictionary, pair.codes), strict=True)
                )
                if keys[0] in scales:
                    found[keys[0]] = _summed(pair.dictionary, gradient @ codes.T)
                if keys[1] in scales:
                    found[keys[1]] = _summed(pair.codes, dictionary.T @ gradient)
            return found
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
    units, group = _units(leaf, device), leaf.grid.group
    if leaf.shape[0] % group:
        return units * scales.repeat_interleave(group, dim=0)[: leaf.shape[0]]
    return (units.view(-1, group, leaf.shape[1]) * scales[:, None]).view(leaf.shape)


def _units(leaf: Quantized, device: torch.device) -> Float[Tensor, "inputs outputs"]:
    """What is multiplied by scales."""
    integers, table = leaf.integers.to(device), leaf.grid.table
    if table is None:
        return integers.float()
    return torch.tensor(table, dtype=torch.float32, device=device)[integers.long() - leaf.grid.lowest]


def _summed(leaf: Leaf, gradient: Float[Tensor, "inputs outputs"]) -> Float[Tensor, "groups outputs"]:
    """From the gradient at values to the one at scales: each scale has the sum over what it multiplies."""
    assert isinstance(leaf, Quantized)
    inputs, outputs = leaf.shape
    products, group = _units(leaf, gradient.device).mul_(gradient), leaf.grid.group
    if inputs % group:
        products = nn.functional.pad(products, (0, 0, 0, -inputs % group))
    return products.view(-1, group, outputs).sum(1)


def _stored(leaf: Leaf, scales: Tensor | None) -> Leaf:
    if isinstance(leaf, Dense) or scales is None:
        return leaf
    return replace(leaf, scales=scales.to("cpu", torch.float16).contiguous())
