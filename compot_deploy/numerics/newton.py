"""Newton steps for an orthonormal dictionary: the first rounds of an alternation in fewer of them.

Letters as in `factorize`: W~ (m × n) with ``‖W~‖ = 1``, D (m × k) orthonormal, ``C = DᵀW~`` the coefficients, S
those of them that are kept. What rises is ``f(D) = ‖S‖²``. Turning atom i towards atom j by the angle θ changes
it, while the support stays, by

    ``f(θ) = f + 2θ (G_ij − G_ji) − θ² H_ij + …``,   ``G = C Sᵀ``,   ``H_ij = Σ_c (σ_ic − σ_jc)(C_ic² − C_jc²)``

with σ = 1 where a coefficient is kept. Procrustes' step, ``polar(W~Sᵀ)``, is what comes out when the whole
energy ``‖S_i‖² + ‖S_j‖²`` is put in the place of ``H_ij``. But a column that keeps both coefficients, or neither,
loses nothing by the turn, so the truth is far flatter and Procrustes' steps are too short. Out of the span of
D an atom moves by ``(I − DDᵀ) W~S_jᵀ / ‖S_j‖²``, which is Procrustes' step. The sum is taken back to orthonormal
columns by Newton–Schulz iterations: its singular values are at least 1 and hardly more, so a few products in
float32 do what otherwise takes eigenvectors in float64.

The formulas are ours; the preconditioner is the one that relative Newton methods of independent component
analysis use (arXiv 1706.08171), for another contrast.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

_STEP: Final = 1.2
"""How far to go along a Newton step: supports follow the turn, so the surface is flatter than H says."""
_MOMENTUM: Final = (0.0, 0.3, 0.3, 0.5)
"""How much of the last step is added, by steps since the last start; the last value stays."""
_FLATTEST: Final = 0.1
"""H is taken as no less than this part of Procrustes' curvature."""
_FRESH: Final = 2
"""Steps for which H is computed again; after them it hardly changes."""
_LONGEST: Final = 0.7
"""No atom turns by more than this, in radians."""
_INDEPENDENT: Final = 0.1
"""Columns that keep less of their length, beside the others, are not orthonormalized in float32."""


class Newton:
    """Steps from one dictionary to the next, with a memory of the last step that was kept."""

    def __init__(self) -> None:
        self._kept = 0
        self._crossed: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._now: tuple[Tensor, Tensor] | None = None

    def step(
        self,
        dictionary: Float32[Tensor, "rows atoms"],
        coefficients: Float32[Tensor, "outputs atoms"],
        codes: Float32[Tensor, "outputs atoms"],
        product: Float32[Tensor, "rows atoms"],
    ) -> Float32[Tensor, "rows atoms"] | None:
        """A dictionary that should lose less; None where none with orthonormal columns was found.

        Args:
            dictionary: D.
            coefficients: ``Cᵀ``.
            codes: ``Sᵀ``.
            product: ``W~Sᵀ``.
        """
        within = dictionary.T @ product
        energy = codes.square().sum(0)
        procrustes = energy[:, None] + energy
        if self._crossed is None or self._kept < _FRESH:
            self._crossed = coefficients.square().T @ (codes != 0).to(codes.dtype)
        curvature = torch.maximum(procrustes - self._crossed - self._crossed.T, _FLATTEST * procrustes)
        turn = _STEP * (within - within.T) / curvature.clamp_min(_TINY)
        leave = _STEP * (product - dictionary @ within) / energy.clamp_min(_TINY)
        if self._last is not None:
            momentum = _MOMENTUM[min(self._kept, len(_MOMENTUM) - 1)]
            turn, leave = turn + momentum * self._last[0], leave + momentum * self._last[1]
        length = (turn.square().sum(0) + leave.square().sum(0)).sqrt()
        shorter = (_LONGEST / length.clamp_min(_TINY)).clamp_max(1.0)
        # Both atoms of a turn go equally far, or it would not be a turn.
        self._now = turn * torch.minimum(shorter[:, None], shorter), leave * shorter
        return orthonormalized(dictionary + dictionary @ self._now[0] + self._now[1])

    def keep(self) -> None:
        """The last step was good: the next one remembers it."""
        self._last = self._now
        self._kept += 1

    def forget(self) -> bool:
        """The last step was bad: the next one is taken without memory; False if this one already was."""
        remembered = self._last is not None
        self._last, self._kept = None, 0
        return remembered


_TINY: Final = 1e-20
"""Below every energy that matters, above what float32 calls zero."""


def orthonormalized(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"] | None:
    """Orthonormal columns with the span of nearly orthonormal ones, ``X R⁻¹`` with ``XᵀX = RᵀR``.

    The polar factor would be the nearest, but the two differ only by the square of the step that led to X, and
    a triangular solve costs a tenth.

    Args:
        matrix: X.

    Returns:
        Orthonormal to the precision of the type; None where the columns are far from independent.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.T @ matrix)
    strength = lower.diagonal()
    if int(failed) or not float(strength.amin()) > _INDEPENDENT * float(strength.amax()):
        return None
    identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    return matrix @ torch.linalg.solve_triangular(lower, identity, upper=False).T
