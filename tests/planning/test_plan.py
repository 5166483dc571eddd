"""Laws of the planner: bytes, errors and one budget."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.storage import InMemory, PaperStorage
from compot_deploy.errors import RecipeError
from compot_deploy.numerics.joint import Tier
from compot_deploy.planning.knapsack import frontier, knapsack, smallest_bytes
from compot_deploy.planning.rate_points import Candidate, RatePoints
from compot_deploy.planning.schemes import GridChoice, Joint, Plain, Scheme
from compot_deploy.planning.water_filling import water_filling

GRIDS = GridChoice(dict.fromkeys((2, 4, 8), (32, 64, 128)))
FACTORIZED = Joint((Tier(8, Grid(4, 32), Grid(4, 32)),))

# Plain numbers: types are checked with a random sample, which a strategy may not draw.
entries_ = st.lists(st.tuples(st.integers(1, 60), st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=5)
numbers_ = st.lists(st.tuples(entries_, entries_), min_size=1, max_size=3)
Numbers = list[tuple[list[tuple[int, float, bool]], list[tuple[int, float, bool]]]]


def rate_points_of(numbers: Numbers) -> list[RatePoints]:
    """Two matrices each, that can also share a scheme."""

    def candidates(entries: list[tuple[int, float, bool]]) -> tuple[Candidate, ...]:
        plain = Plain(Grid(4, 32))
        return tuple(
            Candidate(FACTORIZED if joint else plain, size, (error,)) for size, error, joint in entries
        )

    return [
        RatePoints(
            (f"{number}a", f"{number}b"),
            (candidates(one), candidates(two)),
            tuple(Candidate(FACTORIZED, size, (error, error)) for size, error, _ in one[:2]),
        )
        for number, (one, two) in enumerate(numbers)
    ]


def brute(rate_points: list[RatePoints], budget: int, weights: dict[str, float]) -> float:
    """The least loss of all combinations there are."""
    options = []
    for points in rate_points:
        separate = [
            (
                sum(entry.bytes for entry in entries),
                sum(weights[n] * e.errors[0] for n, e in zip(points.names, entries, strict=True)),
            )
            for entries in itertools.product(*points.per_matrix)
        ]
        shared = [
            (entry.bytes, sum(weights[n] * e for n, e in zip(points.names, entry.errors, strict=True)))
            for entry in points.shared
        ]
        options.append(separate + shared)
    fitting = [
        sum(loss for _, loss in combination)
        for combination in itertools.product(*options)
        if sum(size for size, _ in combination) <= budget
    ]
    return min(fitting, default=math.inf)


def weights_of(rate_points: list[RatePoints]) -> dict[str, float]:
    names = [name for points in rate_points for name in points.names]
    return {name: 1.0 + 0.5 * number for number, name in enumerate(names)}


@settings(max_examples=60, deadline=None)
@given(numbers=numbers_, budget=st.integers(1, 400))
def test_the_plan_is_the_best_within_its_budget(numbers: Numbers, budget: int) -> None:
    rate_points = rate_points_of(numbers)
    weights = weights_of(rate_points)
    if budget < smallest_bytes(rate_points):
        with pytest.raises(RecipeError, match=str(smallest_bytes(rate_points))):
            knapsack(rate_points, budget, weights)
        return
    plan = knapsack(rate_points, budget, weights)
    assert plan.bytes <= budget
    assert plan.loss == pytest.approx(brute(rate_points, budget, weights))
    names = [name for entry in plan.chosen for name in entry.names]
    assert sorted(names) == sorted(weights)
    again = sum(
        weights[name] * error
        for entry in plan.chosen
        for name, error in zip(entry.names, entry.candidate.errors, strict=True)
    )
    assert plan.loss == pytest.approx(again)
    assert knapsack(rate_points, budget, weights) == plan


@settings(max_examples=40, deadline=None)
@given(numbers=numbers_)
def test_more_budget_never_gives_more_error(numbers: Numbers) -> None:
    rate_points = rate_points_of(numbers)
    losses = [plan.loss for plan in frontier(rate_points, None, range(1, 500, 7))]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("part", [0.3, 0.8])
def test_large_models_keep_their_budget_too(part: float) -> None:
    """Many matrices whose bytes are no multiples of the solver's unit."""
    rate_points = [
        RatePoints(
            (str(number),),
            (
                tuple(
                    Candidate(Plain(Grid(4, 32)), 10**7 + number * 12_347 + step * 20_011, (1 / (1 + step),))
                    for step in range(40)
                ),
            ),
        )
        for number in range(60)
    ]
    low = smallest_bytes(rate_points)
    budget = low + int(part * 60 * 39 * 20_011)
    plan = knapsack(rate_points, budget)
    assert 0.995 * budget < plan.bytes <= budget


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_more_budget_never_gives_more_error_in_models_of_any_size(seed: int) -> None:
    """Bytes far beyond the solver's resolution, budgets close to each other."""
    generator = random.Random(seed)

    def candidates() -> tuple[Candidate, ...]:
        sizes = sorted(generator.randrange(10**6, 4 * 10**7) for _ in range(8))
        errors = sorted((generator.random() for _ in sizes), reverse=True)
        pairs = zip(sizes, errors, strict=True)
        return tuple(Candidate(Plain(Grid(4, 32)), size, (error,)) for size, error in pairs)

    rate_points = [RatePoints((str(number),), (candidates(),)) for number in range(12)]
    low = smallest_bytes(rate_points)
    plans = [knapsack(rate_points, low + 10**7 + step * 1003) for step in range(12)]
    plans += frontier(rate_points, None, [low + step * 1_000_003 for step in range(12, 200)])
    losses = [plan.loss for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert all(plan.bytes <= plan.budget for plan in plans)


@settings(max_examples=40, deadline=None)
@given(numbers=numbers_, budget=st.integers(1, 400))
def test_without_factorized_candidates_it_is_plain_mixed_precision(numbers: Numbers, budget: int) -> None:
    rate_points = rate_points_of(numbers)
    plain = [points.only(lambda scheme: isinstance(scheme, Plain)) for points in rate_points]
    if not all(all(points.per_matrix) for points in plain) or budget < smallest_bytes(plain):
        return
    plan = knapsack(plain, budget)
    assert all(isinstance(entry.candidate.scheme, Plain) and len(entry.names) == 1 for entry in plan.chosen)
    assert plan.loss == pytest.approx(brute(plain, budget, dict.fromkeys(weights_of(plain), 1.0)))
    # and with them it is never worse
    assert knapsack(rate_points, budget).loss <= plan.loss + 1e-12


def test_rate_points_of_only_some_schemes_have_those_and_no_other() -> None:
    plain, factorized = Candidate(Plain(Grid(4, 32)), 9, (0.1,)), Candidate(FACTORIZED, 5, (0.2,))
    shared = Candidate(FACTORIZED, 7, (0.2, 0.2))
    points = RatePoints(("q", "k"), ((plain, factorized), (factorized, plain)), (shared,))
    assert points.only(lambda scheme: isinstance(scheme, Plain)) == RatePoints(
        ("q", "k"), ((plain,), (plain,))
    )
    assert points.only(lambda scheme: isinstance(scheme, Joint)) == RatePoints(
        ("q", "k"), ((factorized,), (factorized,)), (shared,)
    )
    assert points.only(lambda scheme: True) == points


def test_sharing_is_chosen_only_where_it_is_better() -> None:
    per_matrix = (Candidate(FACTORIZED, 10, (0.2,)),)
    for shared_error, share in ((0.1, True), (0.3, False)):
        shared = (Candidate(FACTORIZED, 20, (shared_error, shared_error)),)
        plan = knapsack([RatePoints(("q", "k"), (per_matrix, per_matrix), shared)], 20)
        assert (len(plan.chosen) == 1) is share


def test_weights_send_bytes_where_they_matter() -> None:
    entries = (Candidate(Plain(Grid(2, 32)), 10, (0.2,)), Candidate(Plain(Grid(4, 32)), 20, (0.01,)))
    rate_points = [RatePoints(("a",), (entries,)), RatePoints(("b",), (entries,))]
    for important, other in (("a", "b"), ("b", "a")):
        plan = knapsack(rate_points, 30, {important: 5.0, other: 1.0})
        chosen = {entry.names[0]: entry.candidate.bytes for entry in plan.chosen}
        assert chosen == {important: 20, other: 10}


def test_a_budget_beyond_need_says_so() -> None:
    entries = (Candidate(Plain(Grid(2, 32)), 10, (0.2,)), Candidate(Plain(None), 80, (0.0,)))
    rate_points = [RatePoints(("a",), (entries,))]
    plan = knapsack(rate_points, 1000)
    assert plan.chosen[0].candidate.scheme == Plain(None)
    assert "1000" in plan.notes[0]
    assert "80" in plan.notes[0]
    assert knapsack(rate_points, 79).notes == ()


@settings(max_examples=30, deadline=None)
@given(
    decay=st.floats(0.01, 0.3),
    rate=st.floats(0.1, 4.0),
    inputs=st.sampled_from([64, 96, 256]),
    outputs=st.sampled_from([64, 200, 512]),
)
def test_precision_follows_energy_within_the_budget(
    decay: float, rate: float, inputs: int, outputs: int
) -> None:
    energies = [math.exp(-decay * atom) for atom in range(min(inputs, outputs))]
    budget = int(rate * inputs * outputs / 8)
    tiers = water_filling(energies, inputs, outputs, budget=budget, storage=PaperStorage(), grids=GRIDS)
    assert sum(tier.atoms for tier in tiers) <= min(inputs, outputs)
    assert Joint(tiers).bytes(inputs, outputs, PaperStorage()) <= budget
    bits = [
        (tier.dictionary.bits, tier.codes.bits)
        for tier in tiers
        if tier.dictionary is not None and tier.codes is not None
    ]
    assert bits == sorted(bits, reverse=True)
    assert all(tier.atoms % GRIDS.step == 0 for tier in tiers)


def test_strong_atoms_get_the_bits_that_their_energy_asks_for() -> None:
    """One direction with almost all of the energy: eight bits for it, few or none for the noise."""
    energies = [1e6, *[1.0] * 63]
    tiers = water_filling(energies, 64, 64, budget=1200, storage=PaperStorage(), grids=GRIDS)
    first = tiers[0]
    assert first.dictionary is not None and first.codes is not None
    assert (first.dictionary.bits, first.codes.bits) == (8, 8)
    assert first.atoms == GRIDS.step
    # all alike: nobody is preferred
    (only,) = water_filling([1.0] * 64, 64, 64, budget=3000, storage=PaperStorage(), grids=GRIDS)
    assert only.atoms == 64


def test_more_bytes_go_to_more_atoms_or_more_bits() -> None:
    energies = [math.exp(-0.05 * atom) for atom in range(256)]

    def spent(rate: float) -> int:
        tiers = water_filling(
            energies, 256, 512, budget=int(rate * 16384), storage=PaperStorage(), grids=GRIDS
        )
        return Joint(tiers).bytes(256, 512, PaperStorage())

    sizes = [spent(rate) for rate in (0.5, 1.0, 1.5, 2.0)]
    assert sizes == sorted(set(sizes))
    assert all(size > 0.8 * rate * 16384 for size, rate in zip(sizes, (0.5, 1.0, 1.5, 2.0), strict=True))


def test_nothing_fits_into_nothing() -> None:
    assert water_filling([1.0], 64, 64, budget=10, storage=PaperStorage(), grids=GRIDS) == ()
    assert water_filling([0.0] * 64, 64, 64, budget=9999, storage=PaperStorage(), grids=GRIDS) == ()


def test_in_memory_codes_lie_dense() -> None:
    grid, pattern = Grid(4, 32), Pattern(8, 64)
    file = PaperStorage().leaf_bytes(64, 100, grid, pattern)
    memory = InMemory(PaperStorage()).leaf_bytes(64, 100, grid, pattern)
    assert memory == PaperStorage().leaf_bytes(64, 100, grid) > file


def test_schemes_tell_their_bytes() -> None:
    scheme: Scheme = Joint(
        (Tier(8, Grid(8, 64), Grid(8, 8)), Tier(64, Grid(4, 64), Grid(4, 64), Pattern(32, 64)))
    )
    bits = 8 * (64 * 8 + 16) + 100 * (8 * 8 + 16) + 64 * (64 * 4 + 16) + 100 * (32 * 4 + 16 + 64)
    assert scheme.bytes(64, 100, PaperStorage()) == bits // 8
    assert Plain(Grid(4, 32)).bytes(64, 100, PaperStorage()) == 64 * 100 * 4.5 / 8
