"""Whitening: the change of basis in which the error of a layer's output is a plain Frobenius norm.

For inputs X with Gram ``G = XᵀX = L Lᵀ`` (Cholesky), ``‖X(W − Ŵ)‖_F = ‖Lᵀ(W − Ŵ)‖_F``: the factorization
works on ``LᵀW`` and what it finds is carried back by ``L⁻ᵀ`` (SVD-LLM, arXiv 2403.07378, section 3.1; COMPOT,
arXiv 2602.15200). All of it in float64: a Gram squares the condition number of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compot_deploy.errors import InputError
from compot_deploy.quant.feedback import Feedback, feedback_of

FIRST_RIDGE: Final = 1e-6
"""Relative to the mean of the diagonal: below every signal seen in activations, far above float64 noise."""

_LARGEST_RIDGE: Final = 10.0

_NOTHING: Final = 1e-9
"""What stands for inputs that are always zero (an attention or an MLP that was switched off): rounding their matrices
to nearest is as good as anything, and what it costs is nothing beside any other."""


@dataclass(frozen=True)
class Whitening:
    """The Cholesky factor of a Gram and what had to be done to get it.

    Attributes:
        factor: L, lower triangular, float64, with ``G + ridge · mean(diag G) · I = L Lᵀ``.
        ridge: what was added to the diagonal, relative to its mean.
        attempts: Cholesky factorizations tried, one for a healthy Gram, none for one without energy.
        gram: the Gram with its ridge, ``L Lᵀ``.
    """

    factor: Float64[Tensor, "inputs inputs"]
    ridge: float
    attempts: int
    gram: Float64[Tensor, "inputs inputs"] = field(repr=False, compare=False)

    @property
    def empty(self) -> bool:
        """Whether the input was always zero: whatever is multiplied with it costs nothing."""
        return self.attempts == 0

    @property
    def escalated(self) -> bool:
        """Whether the first ridge was too small, which a report should mention."""
        return self.attempts > 1

    @cached_property
    def feedback(self) -> Feedback:
        """What GPTQ has to know of the input, made once for all grids and matrices."""
        return feedback_of(self.gram)

    def apply(self, weight: Float[Tensor, "inputs columns"]) -> Float64[Tensor, "inputs columns"]:
        """``LᵀW``."""
        return self.factor.T @ weight.to(self.factor)

    def unapply(self, whitened: Float[Tensor, "inputs columns"]) -> Float64[Tensor, "inputs columns"]:
        """``L⁻ᵀD``, the inverse of `apply`."""
        return torch.linalg.solve_triangular(self.factor.T, whitened.to(self.factor), upper=True)

    def error(
        self, weight: Float[Tensor, "inputs outputs"], approximation: Float[Tensor, "inputs outputs"]
    ) -> float:
        """Relative whitened error ``‖Lᵀ(W − Ŵ)‖ / ‖LᵀW‖``; see `relative_error` for a zero weight.

        The difference is taken in float64 and multiplied in float32: six digits of an error are enough.
        """
        exact, factor = weight.to(self.factor), self.factor.T.float()
        missed = exact - approximation.to(self.factor)
        return relative_error(factor @ exact.float(), factor @ missed.float())


def relative_error(target: Float[Tensor, "rows columns"], residual: Float[Tensor, "rows columns"]) -> float:
    """``‖residual‖ / ‖target‖``; for a zero target 0 if the residual is zero, else infinity."""
    norm, size = float(residual.norm()), float(target.norm())
    if size == 0.0:
        return 0.0 if norm == 0.0 else float("inf")
    return norm / size


def whiten(gram: Float[Tensor, "inputs inputs"], *, ridge: float = FIRST_RIDGE) -> Whitening:
    """The Cholesky factor of a Gram matrix, with as small a ridge as it takes.

    A Gram is singular when there were fewer tokens than inputs, or inputs that were always zero; both are
    ordinary and only need the ridge. Rounding can make it slightly indefinite: the ridge then grows tenfold
    per attempt, and the result says so. Inputs that were all always zero need no calibration.

    Args:
        gram: ``XᵀX``, symmetric; any floating dtype, used as float64.
        ridge: first value tried, relative to the mean of the diagonal. 0 tries none at all first.

    Raises:
        InputError: NaN or infinity, or a matrix that is no Gram at any sensible ridge.
    """
    if ridge < 0:
        raise InputError(f"A ridge of {ridge} is impossible: use 0 or more, {FIRST_RIDGE} for example.")
    inputs = gram.shape[0]
    if not bool(torch.isfinite(gram).all()):
        raise InputError(
            f"The Gram matrix of {inputs} inputs has NaN or infinite entries: the activations overflowed. "
            "Calibrate in float32 or bfloat16, or check the model's weights."
        )
    # One copy of it, which the ridge goes into: at 5632 inputs each takes a quarter of a gigabyte.
    damped = gram.double() + gram.double().T
    damped /= 2
    diagonal = damped.diagonal().clone()
    mean = float(diagonal.mean())
    if not bool(damped.any()):
        identity = torch.eye(inputs, dtype=torch.float64, device=gram.device)
        return Whitening(identity * _NOTHING, ridge, 0, identity * _NOTHING**2)
    if mean <= 0.0:
        raise InputError(
            f"The matrix of {inputs} inputs is no Gram matrix: the mean of its diagonal is {mean:g}. Collect it as XᵀX."
        )
    attempts = 0
    while True:
        attempts += 1
        damped.diagonal().copy_(diagonal + ridge * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return Whitening(factor, ridge, attempts, damped)
        ridge = max(ridge * 10, FIRST_RIDGE)
        if ridge > _LARGEST_RIDGE:
            raise InputError(
                f"The matrix of {inputs} inputs is no Gram matrix: it is not positive definite even with "
                f"{_LARGEST_RIDGE:g} times the mean of its diagonal added. Collect it as XᵀX."
            )
