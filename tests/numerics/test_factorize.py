from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from reference_numerics import best_codes, correlated_gram, fitted_codes
from torch import Tensor

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.numerics.coding import threshold
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation, alternation_of
from compot_deploy.numerics.least_squares import least_squares_dictionary, refine, refit_codes
from compot_deploy.numerics.methods import METHODS
from compot_deploy.numerics.procrustes import newton_schulz, orthonormalize, polar
from compot_deploy.numerics.spectrum import principal_directions, singular_spectrum
from compot_deploy.numerics.svd_llm import svd_llm
from compot_deploy.numerics.whiten import Whitening, whiten

PAPER = Alternation(paper_exact=True)
NEWTON = Alternation(rounds=8, newton=8)


def problem(inputs: int, outputs: int) -> tuple[Tensor, Whitening]:
    return torch.randn(inputs, outputs), whiten(correlated_gram(inputs))


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


@pytest.mark.parametrize("pattern", [Pattern(6, 16), Pattern(2, 4), Pattern(4, 8)])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 60), (60, 24)])
@pytest.mark.parametrize("how", [Alternation(), PAPER, NEWTON])
def test_the_objective_never_rises(pattern: Pattern, inputs: int, outputs: int, how: Alternation) -> None:
    weight, whitening = problem(inputs, outputs)
    factors = compot(weight, whitening, 16, pattern, how)
    history = factors.objective
    assert len(history) > 3
    assert all(later < earlier for earlier, later in pairwise(history))
    if how.paper_exact:
        assert factors.error**2 == pytest.approx(history[-1], rel=1e-4)
    else:
        assert factors.error**2 < history[-1]


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 60), (60, 24)])
def test_the_published_method_keeps_the_dictionary_orthonormal(inputs: int, outputs: int) -> None:
    weight, whitening = problem(inputs, outputs)
    whitened = whitening.apply(compot(weight, whitening, 12, Pattern(6, 12), PAPER).dictionary)
    assert torch.allclose(whitened.T @ whitened, torch.eye(12, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("pattern", [Pattern(2, 6), Pattern(1, 3), Pattern(2, 3), Pattern(5, 6)])
def test_coding_is_optimal_over_all_supports(pattern: Pattern) -> None:
    dictionary = orthonormal(10, 6)
    target = torch.randn(10, 4, dtype=torch.float64)
    codes, _ = threshold(dictionary.T @ target, pattern)
    for column in range(4):
        found = float((target - dictionary @ codes)[:, column].square().sum())
        assert found == pytest.approx(best_codes(target[:, column : column + 1], dictionary, pattern))


@pytest.mark.parametrize("pattern", [Pattern(3, 8), Pattern(2, 4), Pattern(1, 2)])
def test_ties_are_broken_by_order_and_the_count_is_exact(pattern: Pattern) -> None:
    equal = torch.ones(8, 5) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    for coefficients in (equal, torch.zeros(8, 5), torch.randint(-2, 3, (8, 5)).float()):
        codes, support = threshold(coefficients, pattern)
        counts = support.reshape(8 // pattern.of, pattern.of, 5).sum(1)
        assert (counts == pattern.kept).all()
        assert torch.equal(codes, torch.where(support, coefficients, 0.0))
    _, support = threshold(equal, pattern)
    assert support.reshape(-1, pattern.of, 5)[:, : pattern.kept].all()


@pytest.mark.parametrize("decades", [0, 3, 6, 9])
def test_polar_is_the_product_of_the_singular_vectors(decades: int) -> None:
    spectrum = torch.logspace(0, -decades, 12, dtype=torch.float64)
    matrix = orthonormal(30, 12) * spectrum @ orthonormal(12, 12)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(orthonormalize(polar(matrix)), u @ vt, atol=1e-14 * 10 ** (decades + 1))


@pytest.mark.parametrize("rank", [0, 1, 5, 11])
def test_polar_of_a_deficient_matrix_is_still_orthonormal_and_optimal(rank: int) -> None:
    matrix = torch.randn(20, rank, dtype=torch.float64) @ torch.randn(rank, 12, dtype=torch.float64)
    found = orthonormalize(polar(matrix))
    assert torch.allclose(found.T @ found, torch.eye(12, dtype=torch.float64), atol=1e-10)
    nuclear = float(torch.linalg.svdvals(matrix).sum())
    assert float((found * matrix).sum()) == pytest.approx(nuclear, abs=1e-9)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_is_left_as_it_was(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        polar(torch.randn(20, 12, dtype=torch.float64))
        assert torch.get_num_threads() == threads
        with pytest.raises(torch.linalg.LinAlgError):
            polar(torch.full((20, 12), float("nan"), dtype=torch.float64))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_polar_factor_by_products_alone_is_the_same_or_none() -> None:
    matrix = torch.randn(30, 8, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix)
    assert found is not None
    assert torch.allclose(found, u @ vt, atol=1e-9)
    assert newton_schulz(torch.zeros(30, 8, dtype=torch.float64)) is None
    assert newton_schulz(matrix @ torch.diag(torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64))) is None


@pytest.mark.parametrize(("rows", "columns", "count"), [(8, 20, 5), (20, 8, 5), (20, 8, 12), (8, 8, 8)])
def test_principal_directions_capture_as_much_as_singular_vectors(
    rows: int, columns: int, count: int
) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    found = principal_directions(matrix, count)
    assert torch.allclose(found.T @ found, torch.eye(count, dtype=torch.float64), atol=1e-10)
    expected = torch.linalg.svdvals(matrix)[:count].square().sum()
    assert torch.allclose((found.T @ matrix).square().sum(), expected)


def test_svd_llm_is_the_truncated_svd_of_the_whitened_weight() -> None:
    weight, whitening = problem(14, 20)
    factors = svd_llm(weight, whitening, 6)
    values = torch.linalg.svdvals(whitening.apply(weight)).square()
    assert factors.error**2 == pytest.approx(float(values[6:].sum() / values.sum()), rel=1e-9)
    assert whitening.error(weight, factors.dictionary @ factors.codes) == pytest.approx(factors.error)


def test_dense_codes_are_the_truncated_svd() -> None:
    weight, whitening = problem(14, 20)
    assert compot(weight, whitening, 6, DENSE).error == pytest.approx(svd_llm(weight, whitening, 6).error)


def test_refitted_codes_equal_least_squares_in_every_column() -> None:
    dictionary = torch.randn(20, 9, dtype=torch.float64)
    target = torch.randn(20, 7, dtype=torch.float64)
    _, support = threshold(dictionary.T @ target, Pattern(4, 9))
    start = torch.randn(9, 7, dtype=torch.float64)
    found = refit_codes(dictionary.T @ dictionary, dictionary.T @ target, start, support)
    assert torch.allclose(found, fitted_codes(target, dictionary, support), atol=1e-8)
    assert not found[~support].any()


def test_refitting_needs_no_more_steps_than_there_are_codes() -> None:
    """Conjugate directions: as many steps as unknowns, however uneven the atoms."""
    dictionary = torch.randn(20, 9, dtype=torch.float64) * torch.logspace(0, -3, 9, dtype=torch.float64)
    target = torch.randn(20, 7, dtype=torch.float64)
    _, support = threshold(torch.randn(9, 7), Pattern(4, 9))
    start = torch.zeros(9, 7, dtype=torch.float64)
    found = refit_codes(
        dictionary.T @ dictionary, dictionary.T @ target, start, support, steps=4, tolerance=0.0
    )
    assert torch.allclose(found, fitted_codes(target, dictionary, support), rtol=1e-7)


def test_refitting_an_inconsistent_system_stays_finite() -> None:
    gram = torch.ones(2, 2, dtype=torch.float64)
    correlation = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    support = torch.ones(2, 1, dtype=torch.bool)
    found = refit_codes(gram, correlation, torch.zeros(2, 1, dtype=torch.float64), support)
    assert torch.equal(found, torch.zeros(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_refitting_is_never_worse_however_early_it_stops(steps: int) -> None:
    dictionary = torch.randn(20, 9, dtype=torch.float64) * torch.logspace(0, -4, 9, dtype=torch.float64)
    dictionary[:, 5] = dictionary[:, 4]  # singular
    dictionary[:, 6] = 0.0
    target = torch.randn(20, 7, dtype=torch.float64)
    codes, support = threshold(dictionary.T @ target, Pattern(4, 9))
    found = refit_codes(dictionary.T @ dictionary, dictionary.T @ target, codes, support, steps=steps)
    assert torch.isfinite(found).all()
    before = (target - dictionary @ codes).square().sum(0)
    assert ((target - dictionary @ found).square().sum(0) <= before + 1e-12).all()


def test_the_least_squares_dictionary_is_the_least_squares_solution() -> None:
    target = torch.randn(12, 30, dtype=torch.float64)
    codes, _ = threshold(torch.randn(8, 30, dtype=torch.float64), Pattern(4, 8))
    expected = torch.linalg.lstsq(codes.T, target.T).solution.T
    assert torch.allclose(least_squares_dictionary(target, codes), expected, atol=1e-7)


def test_refinement_never_adds_error() -> None:
    target = torch.randn(16, 40, dtype=torch.float64)
    dictionary = orthonormal(16, 8)
    codes, support = threshold(dictionary.T @ target, Pattern(4, 8))
    errors = []
    for turns in range(4):
        better, fitted = refine(target, dictionary, codes, support, turns)
        errors.append(float((target - better @ fitted).norm()))
        assert not fitted[~support].any()
    best = least_squares_dictionary(target, codes)
    assert errors[0] == float((target - best @ codes).norm()) < float((target - dictionary @ codes).norm())
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("pattern", [Pattern(6, 12), Pattern(2, 4)])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 60), (60, 24)])
def test_the_default_is_better_than_the_published_method(pattern: Pattern, inputs: int, outputs: int) -> None:
    weight, whitening = problem(inputs, outputs)
    default, published = (compot(weight, whitening, 12, pattern, how) for how in (Alternation(), PAPER))
    assert default.error < published.error


def test_momentum_reaches_in_ten_rounds_what_plain_rounds_do_in_twenty() -> None:
    plain, pushed = 0.0, 0.0
    for _ in range(3):
        weight, whitening = problem(32, 100)
        plain += compot(weight, whitening, 16, Pattern(8, 16), PAPER).objective[-1]
        pushed += compot(weight, whitening, 16, Pattern(8, 16), Alternation(rounds=10)).objective[-1]
    assert pushed < plain


def test_five_newton_steps_reach_what_twenty_plain_rounds_do() -> None:
    plain, short = 0.0, 0.0
    for _ in range(3):
        weight, whitening = problem(48, 200)
        plain += compot(weight, whitening, 24, Pattern(12, 24), PAPER).objective[-1]
        short += compot(weight, whitening, 24, Pattern(12, 24), alternation_of(5)).objective[-1]
    assert short < plain


def test_newton_steps_leave_the_dictionary_orthonormal() -> None:
    weight, whitening = problem(24, 60)
    factors = compot(weight, whitening, 12, Pattern(6, 12), Alternation(rounds=6, newton=6, refinements=0))
    whitened = whitening.apply(factors.dictionary)
    assert torch.allclose(whitened.T @ whitened, torch.eye(12, dtype=torch.float64), atol=1e-10)
    assert factors.error**2 == pytest.approx(factors.objective[-1], rel=1e-4)


def test_a_round_that_overshoots_is_taken_back() -> None:
    weight, whitening = problem(32, 100)
    history = compot(weight, whitening, 16, Pattern(8, 16), Alternation(momentum=50.0)).objective
    assert all(later < earlier for earlier, later in pairwise(history))
    assert len(history) > 8


@pytest.mark.parametrize(
    ("inputs", "outputs", "atoms", "pattern"),
    [
        (12, 30, 12, Pattern(6, 12)),  # as many atoms as inputs
        (30, 12, 30, Pattern(6, 30)),  # more atoms than outputs
        (12, 30, 1, Pattern(1, 1)),
        (12, 30, 8, Pattern(8, 8)),  # every code kept
        (12, 30, 8, Pattern(1, 8)),
        (12, 1, 4, Pattern(2, 4)),
        (1, 5, 1, DENSE),
    ],
)
@pytest.mark.parametrize("how", [Alternation(), PAPER, NEWTON])
def test_every_shape_is_factorized_as_its_pattern_says(
    inputs: int, outputs: int, atoms: int, pattern: Pattern, how: Alternation
) -> None:
    weight, whitening = problem(inputs, outputs)
    factors = compot(weight, whitening, atoms, pattern, how)
    assert factors.dictionary.shape == (inputs, atoms)
    assert factors.codes.shape == (atoms, outputs)
    assert (factors.support.reshape(-1, pattern.of, outputs).sum(1) == pattern.kept).all()
    assert not factors.codes[~factors.support].any()
    measured = whitening.error(weight, factors.dictionary @ factors.codes)
    assert measured == pytest.approx(factors.error, rel=1e-6, abs=1e-9)
    assert factors.error < 1.0


def test_a_weight_of_low_rank_is_met_exactly() -> None:
    whitening = whiten(correlated_gram(16))
    weight = torch.randn(16, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
    assert compot(weight, whitening, 8, Pattern(4, 8)).error < 1e-6


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_zero_weight_has_zero_codes_and_no_error(method: str) -> None:
    factors = METHODS[method](torch.zeros(6, 9), whiten(torch.eye(6)), 4, DENSE)
    assert factors.error == 0.0
    assert not factors.codes.any()
    assert torch.isfinite(factors.dictionary).all()


def test_a_shared_dictionary_is_a_wider_weight() -> None:
    """Two matrices of one input side by side cost no more error than their parts with half the atoms each."""
    common = torch.randn(16, 8)
    first, second = common @ torch.randn(8, 20), common @ torch.randn(8, 20)
    whitening = whiten(correlated_gram(16))
    shared = compot(torch.cat([first, second], 1), whitening, 8, Pattern(4, 8))
    apart = [compot(weight, whitening, 4, Pattern(2, 4)) for weight in (first, second)]
    assert shared.error < min(factors.error for factors in apart)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_factorizing_leaves_its_inputs_alone_and_repeats_bit_for_bit(method: str) -> None:
    weight, whitening = problem(20, 30)
    before = weight.clone(), whitening.factor.clone()
    pattern = DENSE if method == "svd-llm" else Pattern(5, 10)
    first, second = (METHODS[method](weight, whitening, 10, pattern) for _ in range(2))
    assert torch.equal(weight, before[0])
    assert torch.equal(whitening.factor, before[1])
    assert torch.equal(first.dictionary, second.dictionary)
    assert torch.equal(first.codes, second.codes)
    assert first.objective == second.objective


def test_the_spectrum_is_that_of_the_normalised_weight() -> None:
    for shape in ((6, 9), (9, 6)):
        weight = torch.randn(shape)
        expected = torch.linalg.svdvals(weight.double() / weight.double().norm())
        assert torch.allclose(torch.tensor(singular_spectrum(weight), dtype=torch.float64), expected)
    assert singular_spectrum(torch.zeros(2, 3)) == (0.0, 0.0)


def test_impossible_requests_say_what_is_wrong() -> None:
    weight, whitening = problem(6, 9)
    with pytest.raises(RecipeError, match="cannot have 7 atoms"):
        compot(weight, whitening, 7, DENSE)
    with pytest.raises(RecipeError, match="groups of 4"):
        compot(weight, whitening, 6, Pattern(2, 4))
    with pytest.raises(RecipeError, match="svd-llm"):
        svd_llm(weight, whitening, 4, Pattern(2, 4))
    with pytest.raises(InputError, match="different layers"):
        compot(weight, whiten(torch.eye(5)), 4, DENSE)
    with pytest.raises(InputError, match="NaN"):
        compot(weight * float("nan"), whitening, 4, DENSE)
    with pytest.raises(RecipeError, match="negative"):
        Alternation(rounds=-1)
