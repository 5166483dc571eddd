"""The orthonormal dictionary that fits given codes best: the polar factor of ``W~Sᵀ`` (orthogonal Procrustes)."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float64
from torch import Tensor

from compot_deploy.numerics.spectrum import eigenvectors


def polar(matrix: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """The matrix with orthonormal columns nearest to `matrix`: ``U Vᵀ`` of its thin SVD ``U Σ Vᵀ``.

    It maximizes ``tr(DᵀM)``, the Procrustes problem. Taken from the small Gram ``MᵀM = V Σ² Vᵀ`` as
    ``M V Σ⁻¹ Vᵀ``; a Gram squares the condition, so singular values below 1e-4 of the largest are taken from
    the Gram of what is left when the others are removed, and so on. Directions without any energy are
    completed to an orthonormal basis. On CUDA Newton–Schulz iterations replace the eigenvectors wherever
    they converge, because matrix products are what a GPU is good at.

    Args:
        matrix: M, at least as many rows as columns.

    Returns:
        Columns that are orthonormal to 1e-8; `orthonormalize` makes them so to 1e-16.
    """
    if matrix.is_cuda:
        iterate = newton_schulz(matrix)
        if iterate is not None:
            return iterate
    columns = matrix.shape[1]
    squares, vectors = eigenvectors(matrix.T @ matrix)
    if float(squares[0]) > _STRONG * float(squares[-1]):
        return matrix @ (vectors * squares.rsqrt() @ vectors.T)
    norm = float(matrix.norm())
    left = matrix.new_zeros(matrix.shape[0], 0)
    right = matrix.new_zeros(columns, 0)
    remaining, basis = matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
    while basis.shape[1]:
        if left.shape[1]:
            squares, vectors = eigenvectors(remaining.T @ remaining)
        limit = max(float(squares[-1]) * _STRONG, (norm * 1e-14) ** 2)
        strong = squares > limit
        if not bool(strong.any()):
            break
        scaled = remaining @ vectors[:, strong] * squares[strong].rsqrt()
        left = torch.cat([left, scaled], dim=1)
        right = torch.cat([right, basis @ vectors[:, strong]], dim=1)
        basis = basis @ vectors[:, ~strong]
        if basis.shape[1]:
            remaining = matrix @ basis
            for _ in range(2):  # the second pass removes what the first one's rounding left
                remaining = remaining - left @ (left.T @ remaining)
    found = left.shape[1]
    if found < columns:
        complete = (
            torch.linalg.qr(left, mode="complete").Q
            if found
            else torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        )
        left = torch.cat([left, complete[:, found:columns]], dim=1)
        right = torch.cat([right, basis], dim=1)
    return left @ right.T


_STRONG: Final = 1e-8
"""Eigenvalues of a Gram above this part of the largest are good to eight digits."""


def orthonormalize(factor: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """One Newton–Schulz step: squares the distance to orthonormality, which Grams leave at 1e-8 at worst."""
    return 1.5 * factor - 0.5 * factor @ (factor.T @ factor)


def newton_schulz(
    matrix: Float64[Tensor, "rows columns"], *, steps: int = 60
) -> Float64[Tensor, "rows columns"] | None:
    """The polar factor by ``X ← X (3I − XᵀX) / 2``; None where a direction is too weak to converge."""
    norm = torch.linalg.matrix_norm(matrix.T @ matrix).sqrt()  # no smaller than the largest singular value
    if float(norm) == 0.0:
        return None
    iterate = matrix / norm
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for step in range(steps):
        gram = iterate.T @ iterate
        if step % 5 == 4 and float((gram - identity).abs().amax()) < 1e-12:
            return iterate
        iterate = iterate @ (1.5 * identity - 0.5 * gram)
    return None
