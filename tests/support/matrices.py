"""Equality of matrices, bit for bit."""

from __future__ import annotations

import torch

from compot_deploy.core.matrix import Dense, Matrix, Quantized, leaves


def same_matrix(first: Matrix, second: Matrix) -> bool:
    """Whether two matrices are equal bit for bit, structure included."""
    if type(first) is not type(second) or first.shape != second.shape:
        return False
    one, two = leaves(first), leaves(second)
    if len(one) != len(two):
        return False
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Dense) and isinstance(b, Dense):
            if not torch.equal(a.weight, b.weight):
                return False
        elif isinstance(a, Quantized) and isinstance(b, Quantized):
            if (
                a.grid != b.grid
                or not torch.equal(a.integers, b.integers)
                or not torch.equal(a.scales, b.scales)
            ):
                return False
        else:
            return False
    return True
