"""The baselines are what they say they are, and every byte of theirs is counted."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from baselines import (
    LLAMA_FALLBACK,
    LLAMA_TYPES,
    baselines,
    llama,
    nf4,
    nf4_bytes,
    paper_row,
    textbook,
    then_int4,
)
from cospadi import cospadi, ksvd, pursue, update_atoms
from frontier import (
    MIXED,
    PLANNED,
    Point,
    Score,
    compare,
    compare_at_sizes,
    distinct,
    next_larger,
    replace_between,
    unmatched,
)
from reference_baselines import slow_atom, slow_pursuit, slow_round_to_range
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation
from compot_deploy.numerics.whiten import Whitening, whiten

COSINE = Score("cosine", "cosine")


def unit_columns(rows: int, columns: int, seed: int) -> Tensor:
    made = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made / made.norm(dim=0)


def random(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def a_whitening(inputs: int, seed: int = 3) -> Whitening:
    samples = random(4 * inputs, inputs, seed) @ random(inputs, inputs, seed + 1)
    return whiten(samples.T @ samples)


class TwoLinears:
    """A model of two linears that read one input."""

    def __init__(self, inputs: int = 64) -> None:
        self.weights: Mapping[str, Tensor] = {
            "a": random(inputs, 96, 1).float(),
            "b": random(inputs, 160, 2).float(),
        }
        self._whitening = a_whitening(inputs)

    def whitening_of(self, name: str) -> Whitening:
        return self._whitening


# -- matching pursuit and K-SVD ------------------------------------------------------------------------


@pytest.mark.parametrize(("atoms", "kept"), [(12, 1), (12, 5), (30, 7), (12, 12)])
def test_a_pursuit_of_many_columns_is_that_of_each(atoms: int, kept: int) -> None:
    dictionary, target = unit_columns(20, atoms, 1), random(20, 150, 2)
    codes = pursue(dictionary, target, kept)
    for number in range(0, 150, 7):
        wanted = slow_pursuit(dictionary, target[:, number], kept)
        torch.testing.assert_close(codes[:, number], wanted, rtol=1e-6, atol=1e-7)


def test_a_pursuit_keeps_exactly_so_many_atoms() -> None:
    codes = pursue(unit_columns(20, 30, 1), random(20, 40, 2), 6)
    assert ((codes != 0).sum(0) == 6).all()


def test_a_pursuit_finds_planted_codes() -> None:
    dictionary = unit_columns(128, 100, 4)
    codes = torch.zeros(100, 50, dtype=torch.float64)
    for column in range(50):
        chosen = torch.randperm(100, generator=torch.Generator().manual_seed(column))[:4]
        codes[chosen, column] = 1.0 + random(4, 1, column)[:, 0].abs()
    torch.testing.assert_close(pursue(dictionary, dictionary @ codes, 4), codes, rtol=1e-6, atol=1e-6)


def test_a_column_that_is_met_early_stays_met() -> None:
    dictionary = unit_columns(20, 15, 1)
    codes = torch.zeros(15, 40, dtype=torch.float64)
    codes[torch.arange(40) % 15, torch.arange(40)] = 2.0
    found = pursue(dictionary, dictionary @ codes, 6)
    torch.testing.assert_close(dictionary @ found, dictionary @ codes, rtol=1e-6, atol=1e-6)


def test_more_atoms_never_leave_a_larger_error() -> None:
    dictionary, target = unit_columns(20, 15, 1), random(20, 60, 2)
    errors = [(target - dictionary @ pursue(dictionary, target, kept)).norm(dim=0) for kept in range(1, 16)]
    assert all(bool((more <= fewer + 1e-9).all()) for fewer, more in pairwise(errors))


def test_updating_atoms_never_raises_the_error_and_moves_no_code() -> None:
    dictionary, target = unit_columns(20, 15, 1), random(20, 60, 2)
    codes = pursue(dictionary, target, 4)
    better, fitted = update_atoms(target, dictionary, codes)
    assert (target - better @ fitted).norm() < (target - dictionary @ codes).norm()
    assert torch.equal(fitted != 0, codes != 0)
    torch.testing.assert_close(better.norm(dim=0), torch.ones(15, dtype=torch.float64))


def test_an_updated_atom_is_nearly_the_best_rank_one_fit() -> None:
    dictionary, target = unit_columns(20, 1, 1), random(20, 60, 2)
    codes = pursue(dictionary, target, 1)
    for _ in range(30):
        dictionary, codes = update_atoms(target, dictionary, codes)
    lost = float((target - dictionary @ codes).square().sum())
    assert lost == pytest.approx(slow_atom(target, dictionary, codes, 0), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_objective_of_k_svd_never_rises(seed: int) -> None:
    target = unit_columns(24, 20, seed) @ random(20, 80, seed + 9)
    _, _, objective = ksvd(target, random(24, 16, seed + 20), 4, 8)
    assert list(objective) == sorted(objective, reverse=True)
    assert objective[-1] < 0.9 * objective[0]


def test_k_svd_finds_a_planted_dictionary() -> None:
    planted = unit_columns(32, 24, 5)
    codes = torch.zeros(24, 600, dtype=torch.float64)
    for column in range(600):
        chosen = torch.randperm(24, generator=torch.Generator().manual_seed(column))[:2]
        codes[chosen, column] = 1.0 + random(2, 1, column)[:, 0].abs()
    start = planted + 0.15 * unit_columns(32, 24, 6)
    dictionary, _, objective = ksvd(planted @ codes, start, 2, 30)
    assert objective[-1] < 1e-3 * objective[0]
    assert ((dictionary.T @ planted).abs().amax(0) > 0.999).all()


@pytest.mark.parametrize("inputs", [24, 64])
def test_cospadi_begins_where_compot_begins_and_says_its_error(inputs: int) -> None:
    weight, whitening = random(inputs, 40, 1), a_whitening(inputs)
    found = cospadi(weight, whitening, 16, Pattern(8, 16), rounds=4)
    begun = compot(weight, whitening, 16, Pattern(8, 16), Alternation(rounds=0, paper_exact=True))
    assert found.objective[0] == pytest.approx(begun.error**2, rel=1e-6)
    assert found.error == pytest.approx(whitening.error(weight, found.dictionary @ found.codes), rel=1e-6)
    assert ((found.codes != 0).sum(0) <= 8).all()


# -- GPTQ as published ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_correlation_published_gptq_rounds_to_the_range(bits: int) -> None:
    weight = random(40, 3, 1)
    found, _ = textbook(weight, whiten(torch.eye(40, dtype=torch.float64)), grid=Grid(bits, 16))
    for column in range(3):
        for start in range(0, 40, 16):
            rows = slice(start, start + 16)
            wanted = slow_round_to_range(weight[rows, column], bits)
            torch.testing.assert_close(found[rows, column], wanted.float(), rtol=1e-5, atol=1e-6)


def test_feedback_of_published_gptq_lowers_the_error() -> None:
    weight, whitening = random(64, 48, 1), a_whitening(64)
    found, _ = textbook(weight, whitening, grid=Grid(3, 32))
    rounded, _ = textbook(weight, whiten(torch.eye(64, dtype=torch.float64)), grid=Grid(3, 32))
    assert whitening.error(weight, found) < 0.9 * whitening.error(weight, rounded)


def test_published_gptq_pays_for_scales_and_zero_points() -> None:
    _, size = textbook(random(40, 3, 1), whiten(torch.eye(40, dtype=torch.float64)), grid=Grid(3, 16))
    assert size * 8 == 3 * 40 * 3 + (16 + 3) * 3 * 3  # 40 inputs have 3 groups of 16, the last one short


# -- other people's types ---------------------------------------------------------------------------------


def test_nf4_costs_its_indices_and_scales() -> None:
    numbers = 64 * 256 * 3
    assert nf4_bytes(numbers, double=False) * 8 / numbers == 4.5
    assert nf4_bytes(numbers, double=True) == numbers / 2 + 256 * 3 + 4 * 3 + 4


@pytest.mark.parametrize("double", [False, True])
def test_nf4_bytes_are_those_of_the_tensors(double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    rows = random(96, 130, 1).float()
    packed, state = functional.quantize_4bit(rows, blocksize=64, quant_type="nf4", compress_statistics=double)
    tensors = [packed, state.absmax] + ([state.state2.absmax, state.offset] if double else [])
    assert nf4_bytes(rows.numel(), double=double) == sum(one.numel() * one.element_size() for one in tensors)


def test_nf4_blocks_run_along_the_inputs() -> None:
    pytest.importorskip("bitsandbytes")
    weight = random(64, 5, 1).float()
    whitening = whiten(torch.eye(64, dtype=torch.float64))
    alone, _ = nf4(weight[:, :1], whitening, double=False)
    beside = weight.clone()
    beside[:, 1:] *= 1000.0
    together, _ = nf4(beside, whitening, double=False)
    assert torch.equal(together[:, :1], alone)


@pytest.mark.parametrize("padded", [True, False])
def test_a_ggml_type_that_fits_costs_its_bits(padded: bool) -> None:
    pytest.importorskip("xllamacpp")
    weight = random(256, 10, 1).float()
    _, size = llama(weight, a_whitening(256), kind="Q2_K", padded=padded)
    assert size * 8 / weight.numel() == 2.625


def test_padded_rows_cost_their_share_of_a_block_and_others_the_wider_type() -> None:
    pytest.importorskip("xllamacpp")
    weight, whitening = random(384, 10, 1).float(), a_whitening(384)
    padded, size = llama(weight, whitening, kind="Q2_K", padded=True)
    assert size * 8 / weight.numel() == 2.625
    assert padded.shape == weight.shape
    wider, size = llama(weight, whitening, kind="Q2_K", padded=False)
    assert size * 8 / weight.numel() == 4.5  # IQ4_NL, blocks of 32
    assert whitening.error(weight, wider) < whitening.error(weight, padded)


# -- whole models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd-llm", "compot", "cospadi"])
def test_factorized_baselines_stay_within_their_bits(method: str) -> None:
    model = TwoLinears()
    small = then_int4(model, method=method, bits=3.5)
    numbers = sum(weight.numel() for weight in model.weights.values())
    assert small.bytes <= 3.5 * numbers / 8
    assert {name: weight.shape for name, weight in small.weights.items()} == {
        name: weight.shape for name, weight in model.weights.items()
    }
    assert all(float((small.weights[name] - weight).norm()) > 0 for name, weight in model.weights.items())


def test_no_two_baselines_have_one_name() -> None:
    names = [one.method for one in (*baselines([2.0, 3.0], [2.0, 3.0]), *paper_row([0.2, 0.4], [0.4]))]
    assert len(names) == len(set(names))
    assert set(LLAMA_FALLBACK) <= set(LLAMA_TYPES)


def test_cospadi_refuses_patterns_of_neighbours() -> None:
    with pytest.raises(ValueError, match="s of all 16 atoms"):
        cospadi(random(24, 40, 1), a_whitening(24), 16, Pattern(2, 4))
    assert cospadi(random(24, 40, 1), a_whitening(24), 16, DENSE, rounds=1).codes.all()


# -- the comparison ---------------------------------------------------------------------------------------


def point(family: str, bits: float, cosine: float) -> Point:
    return Point(family, family, bits, {"cosine": cosine})


def test_a_baseline_of_the_same_or_fewer_bytes_must_not_be_better() -> None:
    plan = point(PLANNED, 1.99, 0.9)
    larger, worse = point("larger", 2.01, 0.99), point("worse", 1.5, 0.89)
    assert all(one.holds for one in compare([plan, larger, worse], COSINE, [2.0], {}))
    for bits in (1.0, 2.0):
        found = compare([plan, larger, worse, point("better", bits, 0.91)], COSINE, [2.0], {})
        assert [one.holds for one in found] == [False]
        assert "better" in found[0].text


def test_the_nearest_larger_baseline_can_be_compared_as_well() -> None:
    points = [point(PLANNED, 2.0, 0.9), point("near", 2.1, 0.91), point("far", 2.5, 0.99)]
    assert compare(points, COSINE, [2.0], {}) == []
    assert [one.holds for one in compare(points, COSINE, [2.0], {}, beyond=True)] == [False]
    assert [one.holds for one in compare([points[0], points[2]], COSINE, [2.6], {}, beyond=True)] == [False]


def test_a_better_mix_of_plain_grids_is_reported() -> None:
    points = [point(PLANNED, 2.0, 0.9), point(MIXED, 2.0, 0.91), point("baseline", 2.0, 0.8)]
    assert [one.holds for one in compare(points, COSINE, [2.0], {})] == [True, False]


def test_a_floor_and_a_missing_plan_are_reported() -> None:
    plan = point(PLANNED, 1.99, 0.9)
    assert [one.holds for one in compare([plan], COSINE, [2.0], {2.0: 0.91})] == [False]
    assert [one.holds for one in compare([plan], COSINE, [2.0], {2.0: 0.89})] == [True]
    assert [one.holds for one in compare([plan], COSINE, [1.5], {})] == [False]


def test_at_its_own_size_a_baseline_meets_the_plan_of_no_more_bytes() -> None:
    points = [point(PLANNED, 2.0, 0.9), point(PLANNED, 3.0, 0.95), point("baseline", 2.5, 0.92)]
    assert [one.holds for one in compare_at_sizes(points, COSINE, 4.0)] == [False]
    assert not compare_at_sizes(points, COSINE, 2.4)
    points.append(point(PLANNED, 2.5, 0.93))
    assert [one.holds for one in compare_at_sizes(points, COSINE, 4.0)] == [True]


def test_plans_are_made_at_the_sizes_of_unmatched_baselines() -> None:
    plans = [point(PLANNED, 2.0, 0.9), point(PLANNED, 3.0, 0.95)]
    weak, strong, small = point("weak", 2.4, 0.89), point("strong", 2.5, 0.92), point("small", 1.0, 0.99)
    assert unmatched([*plans, weak, small], COSINE, 3.0) is None
    assert unmatched([*plans, weak, strong], COSINE, 3.0) == 2.5
    assert unmatched([*plans, weak, strong], COSINE, 2.4) is None
    assert unmatched([*plans, weak, strong], COSINE, 3.0, {2.5}) is None


def test_equal_points_of_a_family_are_one() -> None:
    twice = [point("a", 2.0, 0.9), point("a", 2.0, 0.9), point("b", 2.0, 0.9), point("a", 2.0, 0.8)]
    assert distinct(twice) == [twice[0], twice[2], twice[3]]


def test_less_divergence_is_better() -> None:
    score = Score("cosine", "KL", higher=False)
    points = [point(PLANNED, 2.0, 0.5), point("baseline", 2.0, 0.4)]
    assert [one.holds for one in compare(points, score, [2.0], {})] == [False]
    assert [one.holds for one in compare_at_sizes(points, score, 4.0)] == [False]


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize(("shift", "holds"), [(0.0, True), (0.019, True), (0.021, False), (-0.3, True)])
def test_a_difference_of_two_standard_errors_is_none(higher: bool, shift: float, holds: bool) -> None:
    """Differences by window of shift ± 0.01 have, over two windows, a standard error of 0.01."""
    score = Score("cosine", "", higher=higher, errors=2.0)
    sign = 1.0 if higher else -1.0
    mine = sampled(PLANNED, 0.1, 0.9)
    baseline = sampled("baseline", 0.1 + sign * (shift - 0.01), 0.9 + sign * (shift + 0.01))
    assert score.standard_error(mine, baseline) == pytest.approx(0.01)
    assert score.at_least(mine, baseline) == holds
    assert [one.holds for one in compare([mine, baseline], score, [2.0], {})] == [holds]
    (found,) = compare_at_sizes([mine, baseline], score, 4.0)
    assert found.holds == holds
    assert ("not told apart" in found.text) == (0 < shift < 0.02)
    assert ("behind by" in found.text) == (shift > 0)


def test_nothing_is_excused_where_windows_are_not_known() -> None:
    score = Score("cosine", "", errors=2.0)
    assert not score.at_least(point(PLANNED, 2.0, 0.5), sampled("baseline", 0.4, 0.6001))


def sampled(family: str, *values: float) -> Point:
    scores, samples = {"cosine": sum(values) / len(values)}, {"cosine": values}
    return Point(family, family, 2.0, scores, samples)


def test_the_next_larger_baseline_is_the_nearest() -> None:
    points = [point(PLANNED, 2.0, 0.9), point("a", 2.2, 0.8), point("b", 2.4, 0.99), point("c", 1.9, 0.1)]
    found = next_larger(points, COSINE, 2.0)
    assert found is not None
    assert found.family == "a"
    assert next_larger(points, COSINE, 3.0) is None


def test_a_table_is_put_between_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n", encoding="utf-8")
    replace_between(path, "x", "new\n")
    assert path.read_text(encoding="utf-8") == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    with pytest.raises(SystemExit):
        replace_between(path, "y", "new\n")
