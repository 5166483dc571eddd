"""What GPTQ has to know of an input: made once, for all grids and for all matrices that read it.

Letters: ``G`` the Gram of the input, ``H = G + λI`` the damped one, ``H = T C Tᵀ`` with ``T`` unit upper triangular
and ``C`` diagonal. GPTQ (arXiv 2210.17323) takes the upper Cholesky factor U of ``H⁻¹ = UᵀU`` instead; the two say
the same, ``T = U⁻¹ diag(U)`` and ``C_ii = 1 / U_ii²``, but T and C need one Cholesky factorization (of H with its rows
and columns reversed) where U needs two and an inverse. In these letters, with ``D = W − Q``,

    ``tr(Dᵀ H D) = Σ_i C_ii ‖w'_i − q_i‖²``,   ``w'_i = w_i + Σ_{j<i} T_ji d_j``

so input i is to be rounded from ``w'_i``, what it should be after the errors of those before it, and its error
costs ``C_ii``. That sum is the loss of any Q, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from compot_deploy.core.threads import one_thread
from compot_deploy.errors import InputError

DAMPING: Final = 1e-2
"""Relative to the mean of the diagonal, the paper's value: keeps the feedback of unseen inputs bounded."""

_LARGEST_DAMPING: Final = 10.0


@dataclass(frozen=True)
class Feedback:
    """The factors of a damped Gram, in units of the mean of the Gram's diagonal.

    Factors and pivots were computed in float64; what multiplies whole matrices is kept in float32.

    Attributes:
        gram: G, symmetric, float32.
        onward: ``Tᵀ``, unit lower triangular, float32: what the errors of earlier inputs (columns) ask of later ones.
        cost: the diagonal of C, float64.
        damping: λ.
        unit: the mean of the diagonal of the Gram as it came.
    """

    gram: Float32[Tensor, "inputs inputs"]
    onward: Float32[Tensor, "inputs inputs"]
    cost: Float64[Tensor, " inputs"]
    damping: float
    unit: float


Inputs: TypeAlias = Float[Tensor, "inputs inputs"] | Feedback
"""A Gram, or what was made of it already."""


def feedback_of(gram: Inputs, damping: float = DAMPING) -> Feedback:
    """The factors of a Gram.

    Args:
        gram: ``XᵀX``; factors that were made before are returned as they are.
        damping: added to the diagonal, relative to its mean; grows tenfold until Cholesky succeeds.

    Raises:
        InputError: a Gram with NaN or without energy, or a matrix that is no Gram.
    """
    if isinstance(gram, Feedback):
        return gram
    mean = float(gram.diagonal().double().mean())
    if not mean > 0.0:  # NaN included
        raise InputError(
            f"GPTQ needs a Gram matrix with energy; the mean of its diagonal is {mean:g}. "
            "Calibrate with more text, or use the quantizer rtn."
        )
    while damping <= _LARGEST_DAMPING:
        turned = gram.flip(0, 1).double()
        turned /= mean
        turned.diagonal().add_(damping)
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(turned)
        del turned  # of a wide input a quarter of a gigabyte, like each that follows
        if int(failed) == 0:
            # Turned back it is upper triangular, R with H = R Rᵀ; T = R / diag(R).
            pivots = lower.diagonal().clone()
            upper = lower.float().T
            del lower
            onward = (upper / pivots.float()[:, None]).flip(0, 1)
            del upper
            return Feedback(_scaled(gram, mean), onward, pivots.flip(0).square(), damping, mean)
        damping = max(damping * 10, 1e-6)
    raise InputError(
        f"The matrix of {gram.shape[0]} inputs is no Gram matrix: it is not positive definite even with "
        f"{_LARGEST_DAMPING:g} times the mean of its diagonal added. Collect it as XᵀX."
    )


def _scaled(gram: Float[Tensor, "inputs inputs"], mean: float) -> Float32[Tensor, "inputs inputs"]:
    """A Gram over the mean of its diagonal, divided in float64, some rows at a time."""
    found = torch.empty_like(gram, dtype=torch.float32)
    for rows, into in zip(gram.split(_ROWS), found.split(_ROWS), strict=True):
        into.copy_(rows.double() / mean)
    return found


_ROWS: Final = 512
