"""Factors on a given support, refined in turns: the least-squares dictionary, the least-squares codes.

Once the support is settled, orthogonality has done its work. Sources: ROCKET (arXiv 2602.11008) for the dictionary,
GeoPair (arXiv 2609.25963) for the codes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64
from torch import Tensor


def refine(
    whitened: Float64[Tensor, "rows outputs"],
    dictionary: Float64[Tensor, "rows atoms"],
    codes: Float64[Tensor, "atoms outputs"],
    support: Bool[Tensor, "atoms outputs"],
    turns: int,
) -> tuple[Float64[Tensor, "rows atoms"], Float64[Tensor, "atoms outputs"]]:
    """Least-squares dictionary, then `turns` times {codes re-fitted on their support, dictionary again}.

    Returns:
        Dictionary and codes, with no more error than the ones that came in.
    """
    best = dictionary, codes
    best_error = float((whitened - dictionary @ codes).norm())
    dictionary = least_squares_dictionary(whitened, codes)
    for turn in range(turns + 1):
        if turn:
            codes = refit_codes(dictionary.T @ dictionary, dictionary.T @ whitened, codes, support)
            dictionary = least_squares_dictionary(whitened, codes)
        error = float((whitened - dictionary @ codes).norm())
        if error >= best_error:  # rounding; or nothing left to gain
            break
        best, best_error = (dictionary, codes), error
    return best


def least_squares_dictionary(
    whitened: Float64[Tensor, "rows outputs"], codes: Float64[Tensor, "atoms outputs"]
) -> Float64[Tensor, "rows atoms"]:
    """``W~Sᵀ(SSᵀ + εI)⁻¹``: the best dictionary for given codes (ROCKET, eq. 8); an unused atom becomes 0."""
    gram = codes @ codes.T
    ridge = 1e-10 * float(gram.diagonal().mean())
    if ridge == 0.0:
        return torch.zeros_like(whitened[:, :1]).expand(-1, codes.shape[0]).clone()
    gram.diagonal().add_(ridge)
    lower = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(codes @ whitened.T, lower).T.contiguous()


def refit_codes(
    gram: Float64[Tensor, "atoms atoms"],
    correlation: Float64[Tensor, "atoms outputs"],
    codes: Float64[Tensor, "atoms outputs"],
    support: Bool[Tensor, "atoms outputs"],
    *,
    steps: int = 50,
    tolerance: float = 1e-8,
) -> Float64[Tensor, "atoms outputs"]:
    """Least-squares codes on a given support, for a dictionary that need not be orthonormal.

    Solves ``min ‖w − D s‖`` for every column w with s zero off its support, all columns at once, by conjugate
    gradients preconditioned with the diagonal and projected on the support. The objective falls in every
    step, so the result is never worse than `codes`, however early it stops. Singular systems are fine.

    Args:
        gram: ``DᵀD``.
        correlation: ``DᵀW~``.
        codes: where to begin; taken as zero outside the support.
        support: entries that may be non-zero.
        steps: at most.
        tolerance: on the preconditioned residual of each column, relative to its first right-hand side.
    """
    diagonal = gram.diagonal()
    inverse = torch.where(diagonal > 0, 1.0 / diagonal.clamp_min(1e-300), 0.0)[:, None] * support
    codes = codes * support
    residual = correlation - gram @ codes
    scaled = inverse * residual
    direction = scaled.clone()
    size = (residual * scaled).sum(0)
    enough = tolerance**2 * (correlation.square() * inverse).sum(0)
    for _ in range(steps):
        active = size > enough
        if not bool(active.any()):
            break
        product = gram @ direction  # `inverse` projects on the support
        curvature = (direction * product).sum(0)
        # A column that has arrived, or whose direction is in the null space, stands still.
        moving = active & (curvature > 0)
        step = torch.where(moving, size / torch.where(moving, curvature, 1.0), 0.0)
        codes = codes + step * direction
        residual = residual - step * product
        scaled = inverse * residual
        following = (residual * scaled).sum(0)
        ratio = torch.where(moving, following / torch.where(moving, size, 1.0), 0.0)
        direction = scaled + ratio * direction
        size = torch.where(moving, following, 0.0)
    return codes
