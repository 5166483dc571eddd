"""Who gets how many atoms: sizes, spectra and one ratio in, a number of atoms and non-zeros per matrix out.

Numbers only, no tensors. A byte is whatever the target's `Storage` says it is, scales, masks and padding
included; `compot_deploy.core.storage.PaperStorage` is the accounting of COMPOT (arXiv 2602.15200).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

from compot_deploy.core.storage import Storage
from compot_deploy.errors import RecipeError
from compot_deploy.planning.sizing import (
    Choice,
    Guard,
    MatrixSize,
    Precision,
    Sizing,
    Sparsity,
    allowed_bytes,
)


@dataclass(frozen=True)
class Allocation:
    """The plan for all matrices.

    Attributes:
        choices: by name, in the order of the matrices.
        budget: bytes that were allowed. Under `uniform` a matrix that cannot be factorized is allowed its
            plain bytes, since no other matrix pays for it.
    """

    choices: Mapping[str, Choice]
    budget: int

    @property
    def bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def plain_bytes(self) -> int:
        """Bytes of all matrices in their plain scheme."""
        return sum(choice.plain_bytes for choice in self.choices.values())

    @property
    def ratio(self) -> float:
        """How much smaller than the plain scheme, 0 to 1."""
        return 1.0 - self.bytes / self.plain_bytes


Allocator = Callable[..., Allocation]


def uniform(
    matrices: Sequence[MatrixSize],
    *,
    ratio: float,
    storage: Storage,
    precision: Precision = Precision(),
    sparsity: Sparsity = Sparsity(),
) -> Allocation:
    """Every matrix on its own: as many atoms as fit into ``(1 − ratio)`` of its plain bytes.

    Atoms are capped at min(in, out), beyond which a dictionary buys nothing; bytes that are left go into
    more non-zeros per column, as in the paper. Where even one group of atoms does not fit, the matrix stays
    plain, with the reason.

    Args:
        matrices: sizes; the spectra are not looked at.
        ratio: how much smaller, between 0 and 1.
        storage: what a leaf costs in the target format.
        precision: grids of the plain scheme, dictionary and codes.
        sparsity: of the codes.

    Raises:
        RecipeError: a ratio outside (0, 1), or one at which no matrix can be factorized at all.
    """
    sizing = Sizing(storage, precision, sparsity)
    _check(matrices, ratio)
    choices: dict[str, Choice] = {}
    for matrix in matrices:
        allowed = allowed_bytes(sizing.plain(matrix), ratio)
        atoms = sizing.most_atoms(matrix, allowed)
        choices[matrix.name] = (
            sizing.spend(matrix, atoms, allowed)
            if atoms
            else sizing.stay(matrix, sizing.why_not(matrix, allowed))
        )
    if not any(choice.factorized for choice in choices.values()):
        raise RecipeError(
            f"At a ratio of {ratio:g} not one of {len(matrices)} matrices can be factorized; "
            f"{sizing.range_of_ratios(matrices)}"
        )
    budget = sum(
        allowed_bytes(choice.plain_bytes, ratio) if choice.factorized else choice.plain_bytes
        for choice in choices.values()
    )
    return Allocation(MappingProxyType(choices), budget)


def spectral(
    matrices: Sequence[MatrixSize],
    *,
    ratio: float,
    storage: Storage,
    precision: Precision = Precision(),
    sparsity: Sparsity = Sparsity(),
    least: float = 0.1,
    most: float = 1.0,
    per_byte: bool = True,
) -> Allocation:
    """One threshold for the singular values of all matrices, the one that meets the whole budget.

    A matrix gets as many atoms as it has singular values above the threshold, within guards; the lowest
    threshold whose total fits is taken. A matrix whose atoms would cost more than its plain scheme stays plain.

    The paper pools the singular values of ``W / ‖W‖_F`` as they are. A matrix of few outputs has fewer of them
    to share one norm, so they are larger, and the keys and values of grouped attention stay plain at the cost
    of everything else. Here a value stands for its square, times the weights of the matrix, per byte of an
    atom: the relative error that is left, summed over all weights, is then the least that truncation within
    the guards can have for its bytes. Between matrices of one shape the two are the same.

    Args:
        matrices: sizes and spectra.
        ratio: how much smaller all matrices together are, between 0 and 1.
        storage: what a leaf costs in the target format.
        precision: grids of the plain scheme, dictionary and codes.
        sparsity: of the codes.
        least: guard, fewest atoms as a part of those at which a matrix costs as much as its plain scheme.
        most: guard, most atoms likewise. The paper has guards but does not publish them; these do not
            depend on the ratio, so a larger budget never takes an atom from any matrix.
        per_byte: False pools the values as they are, as the paper does.

    Raises:
        RecipeError: a ratio outside (0, 1), a matrix without its spectrum, or a budget that cannot be met.
    """
    sizing = Sizing(storage, precision, sparsity)
    _check(matrices, ratio)
    for matrix in matrices:
        if len(matrix.spectrum) != min(matrix.inputs, matrix.outputs):
            raise RecipeError(
                f"{matrix.name}: spectral allocation needs {min(matrix.inputs, matrix.outputs)} singular "
                f"values, not {len(matrix.spectrum)}."
            )
    budget = allowed_bytes(sum(sizing.plain(matrix) for matrix in matrices), ratio)
    guards = {matrix.name: _guard(sizing, matrix, least, most) for matrix in matrices}
    pooled = {
        matrix.name: [value * (sizing.weight(matrix) if per_byte else 1.0) for value in matrix.spectrum]
        for matrix in matrices
    }
    pool = sorted({value for values in pooled.values() for value in values} | {math.inf}, reverse=True)

    def choices_at(threshold: float) -> dict[str, Choice]:
        return {
            matrix.name: sizing.by_rank(
                matrix, sum(value >= threshold for value in pooled[matrix.name]), guards[matrix.name]
            )
            for matrix in matrices
        }

    def fits(choices: Mapping[str, Choice]) -> bool:
        return sum(choice.bytes for choice in choices.values()) <= budget

    # The total grows as the threshold falls: bisect for the lowest that fits.
    low, high = 0, len(pool) - 1
    if not fits(choices_at(pool[low])):
        raise RecipeError(
            f"A ratio of {ratio:g} cannot be met by the spectral allocation: with the fewest atoms that its "
            f"guards allow it needs more than {budget} bytes; {sizing.range_of_ratios(matrices)}"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if fits(choices_at(pool[middle])):
            low = middle
        else:
            high = middle - 1
    return Allocation(MappingProxyType(choices_at(pool[low])), budget)


ALLOCATIONS: Final[Mapping[str, Allocator]] = MappingProxyType(
    {"uniform": uniform, "spectral": spectral, "spectral by value": partial(spectral, per_byte=False)}
)
"""By name; by value is the paper's rule to the letter."""


def _guard(sizing: Sizing, matrix: MatrixSize, least: float, most: float) -> Guard:
    plain = sizing.plain(matrix)
    even = sizing.most_atoms(matrix, plain)
    if not even:
        return Guard(0, 0, sizing.why_not(matrix, plain))
    step = sizing.step
    fewest = max(step, int(even * least) // step * step)
    return Guard(fewest, max(fewest, int(even * most) // step * step))


def _check(matrices: Sequence[MatrixSize], ratio: float) -> None:
    if not 0.0 < ratio < 1.0:
        raise RecipeError(
            f"A ratio of {ratio:g} is impossible: use a number between 0 and 1, 0.2 for example."
        )
    if not matrices:
        raise RecipeError("There is no matrix to allocate: the model has no linear layer that is factorized.")
