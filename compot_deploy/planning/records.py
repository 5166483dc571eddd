"""What happened to every matrix, for reports."""

from __future__ import annotations

from dataclasses import dataclass

from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.candidates import Realized
from compot_deploy.planning.knapsack import Chosen
from compot_deploy.planning.making import MadeInput
from compot_deploy.planning.schemes import Plain, describe


@dataclass(frozen=True)
class LinearRecord:
    """What happened to one matrix, for reports.

    Attributes:
        name: module path.
        error: relative whitened error ``‖X(W − Ŵ)‖ / ‖X W‖`` of the final matrix.
        unquantized_error: the same before quantization; 0 for a matrix that stays plain, None where the
            factors were made on their grids and never existed without.
        ridge: what whitening added to the Gram's diagonal, relative to its mean.
        ridge_escalated: the Gram was singular at the first ridge.
        reason: why the matrix stays plain; empty if it is factorized.
        unused: its input was zero on all calibration text.
    """

    name: str
    error: float
    unquantized_error: float | None
    ridge: float
    ridge_escalated: bool
    reason: str = ""
    unused: bool = False


def linear_record(name: str, entry: Chosen, made: Realized, whitening: Whitening | MadeInput) -> LinearRecord:
    """What happened to one matrix of an entry of a plan."""
    scheme = entry.candidate.scheme
    unquantized = made.unquantized_errors.get(name)
    if isinstance(scheme, Plain) and not entry.candidate.errors:
        unquantized = 0.0  # nothing was factorized, so nothing was lost by it
    reason = entry.reason
    if isinstance(scheme, Plain) and not reason and entry.candidate.errors:
        reason = f"the plan chose {describe(scheme)}"
    return LinearRecord(
        name=name,
        error=made.errors[name] ** 0.5,
        unquantized_error=None if unquantized is None else unquantized**0.5,
        ridge=whitening.ridge,
        ridge_escalated=whitening.escalated,
        reason=reason,
        unused=whitening.empty,
    )
