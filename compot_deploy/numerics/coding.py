"""Codes for an orthonormal dictionary: of every group of neighbouring atoms the largest coefficients.

This is hard thresholding, and optimal: with ``DᵀD = I`` the error is what the dropped coefficients have.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compot_deploy.core.grid import Pattern


def threshold(
    coefficients: Float[Tensor, "atoms outputs"], pattern: Pattern
) -> tuple[Float[Tensor, "atoms outputs"], Bool[Tensor, "atoms outputs"]]:
    """The largest coefficients of every group of the pattern, and where they are.

    Optimal codes for an orthonormal dictionary. Exactly ``pattern.kept`` entries are kept in each group and
    column; of equal magnitudes the one of the earlier atom.

    Returns:
        The coefficients with all others set to zero, and the support.
    """
    support = _largest(coefficients.T.contiguous(), pattern).T.contiguous()
    return torch.where(support, coefficients, 0.0), support


def keep_largest(
    coefficients: Float[Tensor, "outputs atoms"], pattern: Pattern
) -> Float[Tensor, "outputs atoms"]:
    """The largest magnitudes of each group, all others set to zero."""
    return coefficients * _largest(coefficients, pattern)


def _largest(coefficients: Float[Tensor, "outputs atoms"], pattern: Pattern) -> Bool[Tensor, "outputs atoms"]:
    """Where the largest magnitudes of each group of neighbours in a row are, exactly as many as are kept."""
    if pattern.is_dense:
        return torch.ones_like(coefficients, dtype=torch.bool)
    magnitude = coefficients.abs().unflatten(1, (-1, pattern.of))
    # NaN never gets here (`check_problem`), so the order is total.
    bar = magnitude.kthvalue(pattern.of - pattern.kept + 1, dim=-1, keepdim=True).values
    kept = magnitude >= bar
    if int(torch.count_nonzero(kept)) > coefficients.numel() // pattern.of * pattern.kept:
        # Ties at the bar: all above it stay, of those at it as many as are missing, earliest first.
        above = magnitude > bar
        tied = magnitude == bar
        missing = pattern.kept - above.sum(-1, keepdim=True)
        kept = above | (tied & (tied.cumsum(-1) <= missing))
    return kept.flatten(1)
