"""Atoms and bytes of one matrix: how many fit, what they take, and why a matrix stays plain.

Numbers only, no tensors. A byte is whatever the target's `Storage` says it is, scales, masks and padding included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.storage import Storage
from compot_deploy.errors import RecipeError


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
        plain: a matrix that is not factorized, which is also what a ratio is measured against.
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
        atoms_per_kept: k/s, the paper's option; 2 is its best. 1 makes the codes dense.
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
        atoms: k, or 0 for a matrix that stays in its plain scheme.
        pattern: of the codes.
        bytes: as stored.
        plain_bytes: of the plain scheme.
        reason: why it is not factorized; empty if it is.
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
class Sizing:
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
        """Bytes of the matrix in its plain scheme."""
        return self.storage.leaf_bytes(matrix.inputs, matrix.outputs, self.precision.plain)

    def factorized(self, matrix: MatrixSize, atoms: int, pattern: Pattern) -> int:
        """Bytes of its dictionary and codes."""
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

    def by_rank(self, matrix: MatrixSize, rank: int, guard: Guard) -> Choice:
        """Atoms for so many singular values, within its guard, or the plain scheme if that is smaller."""
        if guard.reason:
            return self.stay(matrix, guard.reason)
        wanted = max(guard.least, rank // self.step * self.step)
        choice = self._choice(matrix, wanted, self.sparsity.of(wanted))
        if choice.bytes >= choice.plain_bytes:
            return self.stay(
                matrix,
                f"its spectrum asks for {wanted} atoms, which need {choice.bytes} bytes "
                f"against {choice.plain_bytes} of a plain matrix",
            )
        atoms = min(guard.most, wanted)
        return self._choice(matrix, atoms, self.sparsity.of(atoms))

    def stay(self, matrix: MatrixSize, reason: str) -> Choice:
        """The plain scheme, with the reason for it."""
        plain = self.plain(matrix)
        return Choice(matrix.name, 0, DENSE, plain, plain, reason)

    def why_not(self, matrix: MatrixSize, allowed: int) -> str:
        """Why not one step of atoms fits into `allowed` bytes."""
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


@dataclass(frozen=True)
class Guard:
    """Fewest and most atoms; 0 and 0 for a matrix that stays plain, with the reason."""

    least: int
    most: int
    reason: str = ""


def allowed_bytes(plain: int, ratio: float) -> int:
    """What a ratio leaves of the bytes of the plain scheme."""
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
