"""Who gets how many atoms: sizes, spectra and one ratio in, a number of atoms and non-zeros per matrix out.

Numbers only, no tensors. A byte is whatever the target's `Storage` says it is, scales, masks and padding
included; `PaperStorage` is the accounting of COMPOT (arXiv 2602.15200): 16 bits per value that may be
non-zero, one mask bit per entry of sparse codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.storage import SCALE_BITS, Storage
from compot_deploy.errors import RecipeError


@dataclass(frozen=True)
class PaperStorage:
    """Bytes as the paper counts them, extended to grids: values, scales and a mask, no padding.

    Attributes:
        float_bits: bits of a value that is on no grid.
    """

    float_bits: int = 16

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of a leaf; see `compot_deploy.core.storage.Storage`."""
        stored = rows // pattern.of * pattern.kept * columns
        stored += min(rows % pattern.of, pattern.kept) * columns
        bits = stored * (self.float_bits if grid is None else grid.bits)
        if grid is not None:
            bits += SCALE_BITS * grid.groups(rows) * columns
        if not pattern.is_dense:
            bits += rows * columns
        return math.ceil(bits / 8)


@dataclass(frozen=True)
class MatrixSize:
    """A matrix to be allocated.

    Attributes:
        name: for the plan and for messages.
        inputs: m.
        outputs: n; of all matrices together where they share a dictionary.
        spectrum: singular values of ``W / ‖W‖_F``, largest first; only `spectral` needs them.
    """

    name: str
    inputs: int
    outputs: int
    spectrum: tuple[float, ...] = ()


@dataclass(frozen=True)
class Precision:
    """On which grids a matrix is stored; None is floating point.

    Attributes:
        plain: a matrix that is not factorised, which is also what a ratio is measured against.
        dictionary: A.
        codes: S. Its group is the step in which atoms are counted.
    """

    plain: Grid | None = None
    dictionary: Grid | None = None
    codes: Grid | None = None


@dataclass(frozen=True)
class Sparsity:
    """How many of the codes are kept.

    Attributes:
        atoms_per_kept: k/s, the paper's knob; 2 is its best. 1 makes the codes dense.
        pattern: a fixed pattern of neighbours such as 2:4, instead of k/s; DENSE for dense codes.
    """

    atoms_per_kept: float = 2.0
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if not self.atoms_per_kept >= 1.0:
            raise RecipeError(f"{self.atoms_per_kept} atoms per kept code are impossible: use 1 or more.")

    def of(self, atoms: int) -> Pattern:
        """The pattern of codes with so many atoms."""
        if self.pattern is not None:
            return self.pattern
        kept = max(1, min(atoms, int(atoms / self.atoms_per_kept)))
        return DENSE if kept == atoms else Pattern(kept, atoms)


@dataclass(frozen=True)
class Choice:
    """What one matrix gets.

    Attributes:
        name: of the matrix.
        atoms: k, or 0 for a matrix that stays in its plain form.
        pattern: of the codes.
        bytes: as stored.
        plain_bytes: of the plain form.
        reason: why it is not factorised; empty if it is.
    """

    name: str
    atoms: int
    pattern: Pattern
    bytes: int
    plain_bytes: int
    reason: str = ""

    @property
    def factorized(self) -> bool:
        """Whether the matrix becomes a dictionary and codes."""
        return self.atoms > 0


@dataclass(frozen=True)
class Allocation:
    """The plan for all matrices.

    Attributes:
        choices: by name, in the order of the matrices.
        budget: bytes that were allowed. Under `uniform` a matrix that cannot be factorised is allowed its
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
        """Bytes of all matrices in their plain form."""
        return sum(choice.plain_bytes for choice in self.choices.values())

    @property
    def ratio(self) -> float:
        """How much smaller than the plain form, 0 to 1."""
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
        precision: grids of the plain form, dictionary and codes.
        sparsity: of the codes.

    Raises:
        RecipeError: a ratio outside (0, 1), or one at which no matrix can be factorised at all.
    """
    sizing = _Sizing(storage, precision, sparsity)
    _check(matrices, ratio)
    choices: dict[str, Choice] = {}
    for matrix in matrices:
        allowed = _allowed(sizing.plain(matrix), ratio)
        atoms = sizing.most_atoms(matrix, allowed)
        choices[matrix.name] = (
            sizing.spend(matrix, atoms, allowed)
            if atoms
            else sizing.stay(matrix, sizing.why_not(matrix, allowed))
        )
    if not any(choice.factorized for choice in choices.values()):
        raise RecipeError(
            f"At a ratio of {ratio:g} not one of {len(matrices)} matrices can be factorised; "
            f"{sizing.range_of_ratios(matrices)}"
        )
    budget = sum(
        _allowed(choice.plain_bytes, ratio) if choice.factorized else choice.plain_bytes
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
    threshold whose total fits is taken. A matrix whose atoms would cost more than its plain form stays plain.

    The paper pools the singular values of ``W / ‖W‖_F`` as they are. A matrix of few outputs has fewer of them
    to share one norm, so they are larger, and the keys and values of grouped attention stay plain at the cost
    of everything else. Here a value stands for its square, times the weights of the matrix, per byte of an
    atom: the relative error that is left, summed over all weights, is then the least that truncation within
    the guards can have for its bytes. Between matrices of one shape the two are the same.

    Args:
        matrices: sizes and spectra.
        ratio: how much smaller all matrices together are, between 0 and 1.
        storage: what a leaf costs in the target format.
        precision: grids of the plain form, dictionary and codes.
        sparsity: of the codes.
        least: guard, fewest atoms as a part of those at which a matrix costs as much as its plain form.
        most: guard, most atoms likewise. The paper has guards but does not publish them; these do not
            depend on the ratio, so a larger budget never takes an atom from any matrix.
        per_byte: False pools the values as they are, as the paper does.

    Raises:
        RecipeError: a ratio outside (0, 1), a matrix without its spectrum, or a budget that cannot be met.
    """
    sizing = _Sizing(storage, precision, sparsity)
    _check(matrices, ratio)
    for matrix in matrices:
        if len(matrix.spectrum) != min(matrix.inputs, matrix.outputs):
            raise RecipeError(
                f"{matrix.name}: spectral allocation needs {min(matrix.inputs, matrix.outputs)} singular "
                f"values, not {len(matrix.spectrum)}."
            )
    budget = _allowed(sum(sizing.plain(matrix) for matrix in matrices), ratio)
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


@dataclass(frozen=True)
class _Guard:
    """Fewest and most atoms; 0 and 0 for a matrix that stays plain, with the reason."""

    least: int
    most: int
    reason: str = ""


def _guard(sizing: _Sizing, matrix: MatrixSize, least: float, most: float) -> _Guard:
    plain = sizing.plain(matrix)
    even = sizing.most_atoms(matrix, plain)
    if not even:
        return _Guard(0, 0, sizing.why_not(matrix, plain))
    step = sizing.step
    fewest = max(step, int(even * least) // step * step)
    return _Guard(fewest, max(fewest, int(even * most) // step * step))


@dataclass(frozen=True)
class _Sizing:
    """Bytes and atoms of one matrix under one storage, precision and sparsity."""

    storage: Storage
    precision: Precision
    sparsity: Sparsity

    @property
    def step(self) -> int:
        """Atoms come in multiples of this: whole groups of the code grid, whole groups of the pattern."""
        group = 1 if self.precision.codes is None else self.precision.codes.group
        return math.lcm(group, 1 if self.sparsity.pattern is None else self.sparsity.pattern.of)

    def cap(self, matrix: MatrixSize) -> int:
        """Most atoms that can be of use: the rank, in whole steps."""
        return min(matrix.inputs, matrix.outputs) // self.step * self.step

    def plain(self, matrix: MatrixSize) -> int:
        return self.storage.leaf_bytes(matrix.inputs, matrix.outputs, self.precision.plain)

    def factorized(self, matrix: MatrixSize, atoms: int, pattern: Pattern) -> int:
        dictionary = self.storage.leaf_bytes(matrix.inputs, atoms, self.precision.dictionary)
        return dictionary + self.storage.leaf_bytes(atoms, matrix.outputs, self.precision.codes, pattern)

    def weight(self, matrix: MatrixSize) -> float:
        """Root of the weights of a matrix per byte of one of its atoms, on average over all it can have."""
        atoms = self.cap(matrix)
        if not atoms:
            return 1.0  # it stays plain whatever its spectrum says
        each = self.factorized(matrix, atoms, self.sparsity.of(atoms)) / atoms
        return math.sqrt(matrix.inputs * matrix.outputs / each)

    def most_atoms(self, matrix: MatrixSize, allowed: int) -> int:
        """Most atoms within `allowed` bytes, 0 if not even one step fits."""

        def fits(steps: int) -> bool:
            atoms = steps * self.step
            return self.factorized(matrix, atoms, self.sparsity.of(atoms)) <= allowed

        return _largest(fits, self.cap(matrix) // self.step) * self.step

    def spend(self, matrix: MatrixSize, atoms: int, allowed: int) -> Choice:
        """`atoms` atoms; when they are all there can be, what is left goes into the non-zeros per column."""
        pattern = self.sparsity.of(atoms)
        if atoms == self.cap(matrix) and self.sparsity.pattern is None and not pattern.is_dense:
            more = _largest(
                lambda kept: self.factorized(matrix, atoms, Pattern(kept, atoms)) <= allowed, atoms
            )
            if more > pattern.kept:
                pattern = DENSE if more == atoms else Pattern(more, atoms)
        return self._choice(matrix, atoms, pattern)

    def by_rank(self, matrix: MatrixSize, rank: int, guard: _Guard) -> Choice:
        """Atoms for so many singular values, within its guard, or the plain form if that is smaller."""
        if guard.reason:
            return self.stay(matrix, guard.reason)
        wanted = max(guard.least, rank // self.step * self.step)
        choice = self._choice(matrix, wanted, self.sparsity.of(wanted))
        if choice.bytes >= choice.plain_bytes:
            return self.stay(
                matrix,
                f"its spectrum asks for {wanted} atoms, which need {choice.bytes} bytes "
                f"against {choice.plain_bytes} in plain form",
            )
        atoms = min(guard.most, wanted)
        return self._choice(matrix, atoms, self.sparsity.of(atoms))

    def stay(self, matrix: MatrixSize, reason: str) -> Choice:
        plain = self.plain(matrix)
        return Choice(matrix.name, 0, DENSE, plain, plain, reason)

    def why_not(self, matrix: MatrixSize, allowed: int) -> str:
        if not self.cap(matrix):
            return f"{matrix.inputs} x {matrix.outputs} is too small for one group of {self.step} atoms"
        need = self.factorized(matrix, self.step, self.sparsity.of(self.step))
        return f"one group of {self.step} atoms needs {need} bytes, {allowed} are allowed"

    def range_of_ratios(self, matrices: Sequence[MatrixSize]) -> str:
        """What could be reached, as the end of a sentence."""
        smallest = [
            self.factorized(matrix, self.step, self.sparsity.of(self.step))
            if self.cap(matrix)
            else self.plain(matrix)
            for matrix in matrices
        ]
        plain = [self.plain(matrix) for matrix in matrices]
        total = sum(min(pair) for pair in zip(smallest, plain, strict=True))
        best = 1.0 - min(small / full for small, full in zip(smallest, plain, strict=True))
        if best <= 0.0:
            return f"with groups of {self.step} atoms no ratio can: use a smaller group for the codes."
        return (
            f"the largest ratio of a single matrix is {_floor(best)}, "
            f"of all together {_floor(1.0 - total / sum(plain))}."
        )

    def _choice(self, matrix: MatrixSize, atoms: int, pattern: Pattern) -> Choice:
        size = self.factorized(matrix, atoms, pattern)
        return Choice(matrix.name, atoms, pattern, size, self.plain(matrix))


def _check(matrices: Sequence[MatrixSize], ratio: float) -> None:
    if not 0.0 < ratio < 1.0:
        raise RecipeError(
            f"A ratio of {ratio:g} is impossible: use a number between 0 and 1, 0.2 for example."
        )
    if not matrices:
        raise RecipeError("There is no matrix to allocate: the model has no linear layer that is factorised.")


def _allowed(plain: int, ratio: float) -> int:
    # The epsilon keeps 0.8 · 10 from becoming 7.999….
    return math.floor((1.0 - ratio) * plain + 1e-9)


def _floor(ratio: float) -> str:
    return f"{math.floor(ratio * 1000) / 1000:g}"


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 if none does; what fits must fit below as well."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
