from __future__ import annotations

from itertools import product

import pytest

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.storage import PaperStorage
from compot_deploy.errors import RecipeError
from compot_deploy.planning.sizing import MatrixSize, Precision, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS, spectral, uniform

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
STORAGE = PaperStorage()
INT4 = Precision(Grid(4, 32), Grid(4, 32), Grid(4, 32))


def spectrum(size: int, decay: float) -> tuple[float, ...]:
    values = [decay**position for position in range(size)]
    norm = sum(value**2 for value in values) ** 0.5
    return tuple(value / norm for value in values)


MODEL = (
    MatrixSize("q", 256, 256, spectrum(256, 0.97)),
    MatrixSize("k", 256, 64, spectrum(64, 0.9)),
    MatrixSize("up", 256, 1024, spectrum(256, 0.995)),
    MatrixSize("down", 1024, 256, spectrum(256, 0.99)),
)


@pytest.mark.parametrize("rule", sorted(ALLOCATIONS))
@pytest.mark.parametrize("precision", [Precision(), INT4])
def test_the_plan_is_within_its_budget_and_monotone_in_it(rule: str, precision: Precision) -> None:
    totals = []
    for ratio in RATIOS:
        plan = ALLOCATIONS[rule](MODEL, ratio=ratio, storage=STORAGE, precision=precision)
        assert plan.bytes <= plan.budget
        assert list(plan.choices) == [matrix.name for matrix in MODEL]
        if all(choice.factorized for choice in plan.choices.values()):
            assert plan.ratio >= ratio - 1e-9
        totals.append(plan.bytes)
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


@pytest.mark.parametrize("rule", sorted(ALLOCATIONS))
def test_the_budget_is_nearly_spent(rule: str) -> None:
    for ratio in (0.2, 0.3, 0.4):
        plan = ALLOCATIONS[rule](MODEL, ratio=ratio, storage=STORAGE)
        assert plan.bytes > plan.budget * 0.97


def test_the_bytes_are_those_of_the_storage() -> None:
    for rule in ALLOCATIONS.values():
        for choice, matrix in zip(
            rule(MODEL, ratio=0.3, storage=STORAGE, precision=INT4).choices.values(), MODEL, strict=True
        ):
            expected = (
                STORAGE.leaf_bytes(matrix.inputs, choice.atoms, Grid(4, 32))
                + STORAGE.leaf_bytes(choice.atoms, matrix.outputs, Grid(4, 32), choice.pattern)
                if choice.factorized
                else STORAGE.leaf_bytes(matrix.inputs, matrix.outputs, Grid(4, 32))
            )
            assert choice.bytes == expected


def test_uniform_takes_the_atoms_of_the_papers_formula() -> None:
    # k = 16 (1 - CR) m n / (16 m + 9 n) at k = 2 s
    for m, n in ((4096, 4096), (4096, 11008), (768, 768)):
        choice = uniform([MatrixSize("w", m, n)], ratio=0.2, storage=STORAGE).choices["w"]
        formula = 16 * 0.8 * m * n / (16 * m + 9 * n)
        assert formula - 3 < choice.atoms <= formula + 1
        assert choice.pattern == Pattern(choice.atoms // 2, choice.atoms)


def test_uniform_cannot_take_one_step_more() -> None:
    for precision in (Precision(), INT4):
        step = 32 if precision.codes else 1
        plan = uniform(MODEL, ratio=0.4, storage=STORAGE, precision=precision)
        for choice, matrix in zip(plan.choices.values(), MODEL, strict=True):
            if not choice.factorized or choice.atoms + step > min(matrix.inputs, matrix.outputs):
                continue
            more = choice.atoms + step
            need = STORAGE.leaf_bytes(matrix.inputs, more, precision.dictionary) + STORAGE.leaf_bytes(
                more, matrix.outputs, precision.codes, Pattern(more // 2, more)
            )
            assert need > 0.6 * choice.plain_bytes


def test_atoms_beyond_the_rank_are_spent_on_codes_instead() -> None:
    choice = uniform([MatrixSize("wide", 64, 4096)], ratio=0.1, storage=STORAGE).choices["wide"]
    assert choice.atoms == 64
    assert choice.pattern.kept > 32
    assert choice.bytes <= 0.9 * choice.plain_bytes
    more = STORAGE.leaf_bytes(64, 64, None) + STORAGE.leaf_bytes(
        64, 4096, None, Pattern(choice.pattern.kept + 1, 64)
    )
    assert more > 0.9 * choice.plain_bytes


def test_atoms_are_tied_to_the_smaller_side() -> None:
    for rule in ALLOCATIONS.values():
        for choice, matrix in zip(
            rule(MODEL, ratio=0.05, storage=STORAGE).choices.values(), MODEL, strict=True
        ):
            assert choice.atoms <= min(matrix.inputs, matrix.outputs)


@pytest.mark.parametrize("rule", sorted(ALLOCATIONS))
def test_atoms_come_in_whole_groups(rule: str) -> None:
    plan = ALLOCATIONS[rule](
        MODEL, ratio=0.2, storage=STORAGE, precision=INT4, sparsity=Sparsity(pattern=Pattern(2, 4))
    )
    assert any(choice.factorized for choice in plan.choices.values())
    for choice in plan.choices.values():
        assert choice.atoms % 32 == 0
        assert choice.pattern == (Pattern(2, 4) if choice.factorized else DENSE)


@pytest.mark.parametrize("rule", sorted(ALLOCATIONS))
def test_a_matrix_too_small_for_a_group_stays_plain_and_says_why(rule: str) -> None:
    tiny = MatrixSize("tiny", 256, 16, spectrum(16, 0.9))
    plan = ALLOCATIONS[rule]([*MODEL, tiny], ratio=0.2, storage=STORAGE, precision=INT4)
    choice = plan.choices["tiny"]
    assert not choice.factorized
    assert choice.bytes == choice.plain_bytes
    assert "256 x 16 is too small for one group of 32 atoms" in choice.reason
    assert all(not other.reason for other in plan.choices.values() if other.factorized)


def test_spectral_gives_atoms_to_flat_spectra() -> None:
    steep = MatrixSize("steep", 256, 256, spectrum(256, 0.9))
    flat = MatrixSize("flat", 256, 256, spectrum(256, 0.998))
    plan = spectral([steep, flat], ratio=0.3, storage=STORAGE)
    even = uniform([steep, flat], ratio=0.3, storage=STORAGE)
    assert plan.choices["flat"].atoms > even.choices["flat"].atoms or not plan.choices["flat"].factorized
    assert plan.choices["steep"].atoms < even.choices["steep"].atoms
    assert plan.choices["steep"].atoms >= even.choices["steep"].atoms * 0.5 - 1


def test_spectral_leaves_a_matrix_plain_that_would_not_shrink() -> None:
    steep = [MatrixSize(f"steep{i}", 256, 256, spectrum(256, 0.9)) for i in range(3)]
    flat = MatrixSize("flat", 256, 256, (1 / 16,) * 256)
    plan = spectral([*steep, flat], ratio=0.3, storage=STORAGE)
    assert not plan.choices["flat"].factorized
    assert "its spectrum asks for" in plan.choices["flat"].reason
    assert plan.bytes <= plan.budget


@pytest.mark.parametrize("per_byte", [True, False])
@pytest.mark.parametrize("precision", [Precision(), INT4])
def test_a_larger_budget_never_takes_an_atom_from_any_matrix(precision: Precision, per_byte: bool) -> None:
    taken = {matrix.name: 0 for matrix in MODEL}
    gained = 0
    for ratio in (0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.01):
        plan = spectral(MODEL, ratio=ratio, storage=STORAGE, precision=precision, per_byte=per_byte)
        for matrix in MODEL:
            choice = plan.choices[matrix.name]
            # The plain scheme is all of a matrix, more than any number of atoms.
            atoms = choice.atoms if choice.factorized else max(matrix.inputs, matrix.outputs)
            assert atoms >= taken[matrix.name]
            gained += atoms > taken[matrix.name]
            taken[matrix.name] = atoms
    assert gained > 2 * len(MODEL)


SMALL = (
    MatrixSize("square", 40, 40, spectrum(40, 0.9)),
    MatrixSize("narrow", 40, 10, spectrum(10, 0.7)),
    MatrixSize("wide", 40, 160, spectrum(40, 0.92)),
)


def kept(atoms: tuple[int, ...]) -> float:
    """What is left of the squared norms, each relative to its own, over all weights."""
    return sum(
        matrix.inputs * matrix.outputs * sum(value**2 for value in matrix.spectrum[:count])
        for matrix, count in zip(SMALL, atoms, strict=True)
    )


def test_no_truncation_of_the_same_bytes_leaves_less_error() -> None:
    # Dense codes of 16 bits: an atom weighs 2 (m + n) bytes, the first as much as the last.
    dense = Sparsity(pattern=DENSE)
    counts = [range(1, m.inputs * m.outputs // (m.inputs + m.outputs) + 1) for m in SMALL]
    every = [
        (sum(2 * k * (m.inputs + m.outputs) for k, m in zip(atoms, SMALL, strict=True)), kept(atoms))
        for atoms in product(*counts)
    ]
    worse = 0
    for ratio in (0.3, 0.34, 0.38, 0.42, 0.46, 0.5, 0.54, 0.58, 0.62, 0.66, 0.7):
        plans = [
            spectral(SMALL, ratio=ratio, storage=STORAGE, sparsity=dense, per_byte=per_byte)
            for per_byte in (True, False)
        ]
        ours, by_value = (tuple(choice.atoms for choice in plan.choices.values()) for plan in plans)
        assert min(ours) > 0
        assert kept(ours) >= max(value for size, value in every if size <= plans[0].bytes) - 1e-9
        worse += kept(by_value) < max(value for size, value in every if size <= plans[1].bytes) - 1e-9
    assert worse


def test_a_narrow_matrix_does_not_stay_plain_at_the_cost_of_the_others() -> None:
    # Spectra of one shape, over 192 values and over 64 as in grouped attention.
    square = MatrixSize("square", 192, 192, spectrum(192, 0.995))
    narrow = MatrixSize("narrow", 192, 64, spectrum(64, 0.985))
    plan = spectral([square, narrow], ratio=0.4, storage=STORAGE)
    by_value = spectral([square, narrow], ratio=0.4, storage=STORAGE, per_byte=False)
    assert plan.choices["narrow"].factorized
    assert not by_value.choices["narrow"].factorized
    assert plan.choices["square"].atoms > by_value.choices["square"].atoms


def test_between_matrices_of_one_shape_bytes_do_not_matter() -> None:
    alike = [MatrixSize(f"w{decay}", 64, 96, spectrum(64, decay)) for decay in (0.85, 0.9, 0.95, 0.98)]
    for ratio in (0.1, 0.3, 0.5):
        assert spectral(alike, ratio=ratio, storage=STORAGE) == spectral(
            alike, ratio=ratio, storage=STORAGE, per_byte=False
        )


def test_impossible_ratios_name_what_is_possible() -> None:
    for ratio in (0.0, 1.0, -0.1, float("nan")):
        for rule in ALLOCATIONS.values():
            with pytest.raises(RecipeError, match="between 0 and 1"):
                rule(MODEL, ratio=ratio, storage=STORAGE)
    with pytest.raises(RecipeError, match=r"largest ratio of a single matrix is 0\.8"):
        uniform(MODEL, ratio=0.97, storage=STORAGE, precision=INT4)
    largest = 0.853
    uniform(MODEL, ratio=largest, storage=STORAGE, precision=INT4)
    with pytest.raises(RecipeError, match="no ratio can"):
        uniform([MatrixSize("tiny", 16, 16)], ratio=0.1, storage=STORAGE, precision=INT4)
    with pytest.raises(RecipeError, match="cannot be met by the spectral"):
        tiny = MatrixSize("tiny", 4096, 16, spectrum(16, 0.9))
        spectral([*MODEL, tiny], ratio=0.85, storage=STORAGE, precision=INT4)
    with pytest.raises(RecipeError, match="no matrix"):
        uniform([], ratio=0.2, storage=STORAGE)
    with pytest.raises(RecipeError, match="singular values"):
        spectral([MatrixSize("w", 64, 64)], ratio=0.2, storage=STORAGE)
    with pytest.raises(RecipeError, match="use 1 or more"):
        Sparsity(0.5)
