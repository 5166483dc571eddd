"""What a weight matrix can be: the closed set that every other part agrees on.

A linear layer computes ``y = x W`` with ``W`` of shape (in, out); torch stores the transpose. Everything
here keeps (in, out). A matrix is one of three things, and code that treats them differently matches on the
type and ends in ``assert_never``::

    Matrix = Dense | Quantized | Factorized        Leaf = Dense | Quantized

    Dense        weight (in, out), floating point
    Quantized    integers (in, out) on a symmetric grid, one float16 scale per group of inputs and output
    Factorized   Σ_p dictionary_p (in, k_p) @ codes_p (k_p, out), each factor a Leaf

A *leaf* is one stored tensor: what a file holds of a matrix in one piece, its scales included. A dictionary and its
codes are a *factor pair*. What is quantized and not factorized is called *plain*.

The exporters never quantize: error enters before them, in one place, and what they write is exactly these
numbers. Nothing in this module knows a file format, a runtime or a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid, Pattern


@dataclass(frozen=True)
class Dense:
    """A plain floating-point matrix.

    Attributes:
        weight: shape (in, out).
    """

    weight: Float[Tensor, "inputs outputs"]

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self) -> Float[Tensor, "inputs outputs"]:
        """The values as float32."""
        return self.weight.float()


@dataclass(frozen=True)
class Quantized:
    """Integers on a symmetric grid with a float16 scale per group of inputs and output.

    Attributes:
        integers: shape (in, out), within ``grid.lowest … grid.highest``; 0 is exactly zero.
        scales: shape (groups, out); row g scales inputs ``g·group … (g+1)·group - 1``.
        grid: bits and group.
    """

    integers: Int8[Tensor, "inputs outputs"]
    scales: Float16[Tensor, "groups outputs"]
    grid: Grid

    def __post_init__(self) -> None:
        rows = self.integers.shape[0]
        if self.scales.shape[0] != self.grid.groups(rows):
            raise ValueError(
                f"{rows} inputs in groups of {self.grid.group} have {self.grid.groups(rows)} scales per "
                f"output, not {self.scales.shape[0]}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.integers.shape[0], self.integers.shape[1]

    def dequantize(self) -> Float[Tensor, "inputs outputs"]:
        """``integers · scales`` as float32, what every runtime computes from the same file."""
        scales = self.scales.float().repeat_interleave(self.grid.group, dim=0)[: self.shape[0]]
        table = self.grid.table
        if table is not None:
            return torch.tensor(table).to(scales)[self.integers.long() - self.grid.lowest] * scales
        return self.integers.float() * scales


Leaf: TypeAlias = Dense | Quantized


@dataclass(frozen=True)
class FactorPair:
    """One dictionary and its codes: ``x @ dictionary @ codes``.

    Attributes:
        dictionary: shape (in, k).
        codes: shape (k, out); entries outside ``pattern`` are exactly zero.
        dictionary_name: Factor pairs with one name hold the same dictionary, and a file stores it once. For a
            matrix that shares nothing it is the matrix's own name.
        pattern: which codes may be non-zero.
    """

    dictionary: Leaf
    codes: Leaf
    dictionary_name: str
    pattern: Pattern = DENSE

    def __post_init__(self) -> None:
        if self.dictionary.shape[1] != self.codes.shape[0]:
            raise ValueError(
                f"{self.dictionary_name}: a dictionary of {self.dictionary.shape[1]} atoms "
                f"does not fit codes of {self.codes.shape[0]} atoms."
            )

    @property
    def atoms(self) -> int:
        """k, the number of atoms."""
        return self.dictionary.shape[1]


@dataclass(frozen=True)
class Factorized:
    """A sum of factor pairs. One is COMPOT; a second one holds the strongest atoms at a higher precision."""

    pairs: tuple[FactorPair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("A factorized matrix needs at least one factor pair.")
        if any(
            p.dictionary.shape[0] != self.shape[0] or p.codes.shape[1] != self.shape[1] for p in self.pairs
        ):
            raise ValueError("The pairs of a factorized matrix disagree about its shape.")

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.pairs[0].dictionary.shape[0], self.pairs[0].codes.shape[1]

    def dequantize(self) -> Float[Tensor, "inputs outputs"]:
        """The product multiplied out in float64 and rounded once to float32."""
        product = sum(p.dictionary.dequantize().double() @ p.codes.dequantize().double() for p in self.pairs)
        assert isinstance(product, Tensor)
        return product.float()


Matrix: TypeAlias = Dense | Quantized | Factorized


def leaves(matrix: Matrix) -> tuple[Leaf, ...]:
    """All leaves of a matrix, in a fixed order (dictionary, codes, dictionary, codes …)."""
    if isinstance(matrix, Factorized):
        return tuple(leaf for pair in matrix.pairs for leaf in (pair.dictionary, pair.codes))
    return (matrix,)
