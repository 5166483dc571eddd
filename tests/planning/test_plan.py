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
from compot_deploy.numerics.joint import Level
from compot_deploy.planning.curves import Candidate, Curve
from compot_deploy.planning.knapsack import frontier, knapsack, smallest_bytes
from compot_deploy.planning.schemes import Form, GridChoice, Joint, Plain
from compot_deploy.planning.water_levels import water_levels

GRIDS = GridChoice(dict.fromkeys((2, 4, 8), (32, 64, 128)))
FACTORIZED = Joint((Level(8, Grid(4, 32), Grid(4, 32)),))

# Plain numbers: types are checked with a random sample, which a strategy may not draw.
entries_ = st.lists(st.tuples(st.integers(1, 60), st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=5)
numbers_ = st.lists(st.tuples(entries_, entries_), min_size=1, max_size=3)
Numbers = list[tuple[list[tuple[int, float, bool]], list[tuple[int, float, bool]]]]


def curves_of(numbers: Numbers) -> list[Curve]:
    """Two matrices each, that can also share a form."""

    def candidates(entries: list[tuple[int, float, bool]]) -> tuple[Candidate, ...]:
        plain = Plain(Grid(4, 32))
        return tuple(
            Candidate(FACTORIZED if joint else plain, size, (error,)) for size, error, joint in entries
        )

    return [
        Curve(
            (f"{number}a", f"{number}b"),
            (candidates(one), candidates(two)),
            tuple(Candidate(FACTORIZED, size, (error, error)) for size, error, _ in one[:2]),
        )
        for number, (one, two) in enumerate(numbers)
    ]


def brute(curves: list[Curve], budget: int, weights: dict[str, float]) -> float:
    """The least loss of all combinations there are."""
    options = []
    for curve in curves:
        separate = [
            (
                sum(entry.bytes for entry in entries),
                sum(weights[n] * e.errors[0] for n, e in zip(curve.names, entries, strict=True)),
            )
            for entries in itertools.product(*curve.alone)
        ]
        together = [
            (entry.bytes, sum(weights[n] * e for n, e in zip(curve.names, entry.errors, strict=True)))
            for entry in curve.together
        ]
        options.append(separate + together)
    fitting = [
        sum(loss for _, loss in combination)
        for combination in itertools.product(*options)
        if sum(size for size, _ in combination) <= budget
    ]
    return min(fitting, default=math.inf)


def weights_of(curves: list[Curve]) -> dict[str, float]:
    names = [name for curve in curves for name in curve.names]
    return {name: 1.0 + 0.5 * number for number, name in enumerate(names)}


@settings(max_examples=60, deadline=None)
@given(numbers=numbers_, budget=st.integers(1, 400))
def test_the_plan_is_the_best_within_its_budget(numbers: Numbers, budget: int) -> None:
    curves = curves_of(numbers)
    weights = weights_of(curves)
    if budget < smallest_bytes(curves):
        with pytest.raises(RecipeError, match=str(smallest_bytes(curves))):
            knapsack(curves, budget, weights)
        return
    plan = knapsack(curves, budget, weights)
    assert plan.bytes <= budget
    assert plan.loss == pytest.approx(brute(curves, budget, weights))
    names = [name for entry in plan.chosen for name in entry.names]
    assert sorted(names) == sorted(weights)
    again = sum(
        weights[name] * error
        for entry in plan.chosen
        for name, error in zip(entry.names, entry.candidate.errors, strict=True)
    )
    assert plan.loss == pytest.approx(again)
    assert knapsack(curves, budget, weights) == plan


@settings(max_examples=40, deadline=None)
@given(numbers=numbers_)
def test_more_budget_never_gives_more_error(numbers: Numbers) -> None:
    curves = curves_of(numbers)
    losses = [plan.loss for plan in frontier(curves, None, range(1, 500, 7))]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("part", [0.3, 0.8])
def test_large_models_keep_their_budget_too(part: float) -> None:
    """Many matrices whose bytes are no multiples of the solver's unit."""
    curves = [
        Curve(
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
    low = smallest_bytes(curves)
    budget = low + int(part * 60 * 39 * 20_011)
    plan = knapsack(curves, budget)
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

    curves = [Curve((str(number),), (candidates(),)) for number in range(12)]
    low = smallest_bytes(curves)
    plans = [knapsack(curves, low + 10**7 + step * 1003) for step in range(12)]
    plans += frontier(curves, None, [low + step * 1_000_003 for step in range(12, 200)])
    losses = [plan.loss for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert all(plan.bytes <= plan.budget for plan in plans)


@settings(max_examples=40, deadline=None)
@given(numbers=numbers_, budget=st.integers(1, 400))
def test_without_factorised_candidates_it_is_plain_mixed_precision(numbers: Numbers, budget: int) -> None:
    curves = curves_of(numbers)
    plain = [curve.only(lambda form: isinstance(form, Plain)) for curve in curves]
    if not all(all(curve.alone) for curve in plain) or budget < smallest_bytes(plain):
        return
    plan = knapsack(plain, budget)
    assert all(isinstance(entry.candidate.form, Plain) and len(entry.names) == 1 for entry in plan.chosen)
    assert plan.loss == pytest.approx(brute(plain, budget, dict.fromkeys(weights_of(plain), 1.0)))
    # and with them it is never worse
    assert knapsack(curves, budget).loss <= plan.loss + 1e-12


def test_a_curve_of_only_some_forms_has_those_and_no_other() -> None:
    plain, factorized = Candidate(Plain(Grid(4, 32)), 9, (0.1,)), Candidate(FACTORIZED, 5, (0.2,))
    shared = Candidate(FACTORIZED, 7, (0.2, 0.2))
    curve = Curve(("q", "k"), ((plain, factorized), (factorized, plain)), (shared,))
    assert curve.only(lambda form: isinstance(form, Plain)) == Curve(("q", "k"), ((plain,), (plain,)))
    assert curve.only(lambda form: isinstance(form, Joint)) == Curve(
        ("q", "k"), ((factorized,), (factorized,)), (shared,)
    )
    assert curve.only(lambda form: True) == curve


def test_sharing_is_chosen_only_where_it_is_better() -> None:
    alone = (Candidate(FACTORIZED, 10, (0.2,)),)
    for shared_error, share in ((0.1, True), (0.3, False)):
        together = (Candidate(FACTORIZED, 20, (shared_error, shared_error)),)
        plan = knapsack([Curve(("q", "k"), (alone, alone), together)], 20)
        assert (len(plan.chosen) == 1) is share


def test_weights_send_bytes_where_they_matter() -> None:
    entries = (Candidate(Plain(Grid(2, 32)), 10, (0.2,)), Candidate(Plain(Grid(4, 32)), 20, (0.01,)))
    curves = [Curve(("a",), (entries,)), Curve(("b",), (entries,))]
    for important, other in (("a", "b"), ("b", "a")):
        plan = knapsack(curves, 30, {important: 5.0, other: 1.0})
        chosen = {entry.names[0]: entry.candidate.bytes for entry in plan.chosen}
        assert chosen == {important: 20, other: 10}


def test_a_budget_beyond_need_says_so() -> None:
    entries = (Candidate(Plain(Grid(2, 32)), 10, (0.2,)), Candidate(Plain(None), 80, (0.0,)))
    curves = [Curve(("a",), (entries,))]
    plan = knapsack(curves, 1000)
    assert plan.chosen[0].candidate.form == Plain(None)
    assert "1000" in plan.notes[0]
    assert "80" in plan.notes[0]
    assert knapsack(curves, 79).notes == ()


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
    levels = water_levels(energies, inputs, outputs, budget=budget, storage=PaperStorage(), grids=GRIDS)
    assert sum(level.atoms for level in levels) <= min(inputs, outputs)
    assert Joint(levels).bytes(inputs, outputs, PaperStorage()) <= budget
    bits = [
        (level.dictionary.bits, level.codes.bits)
        for level in levels
        if level.dictionary is not None and level.codes is not None
    ]
    assert bits == sorted(bits, reverse=True)
    assert all(level.atoms % GRIDS.step == 0 for level in levels)


def test_strong_atoms_get_the_bits_that_their_energy_asks_for() -> None:
    """One direction with almost all of the energy: eight bits for it, few or none for the noise."""
    energies = [1e6, *[1.0] * 63]
    levels = water_levels(energies, 64, 64, budget=1200, storage=PaperStorage(), grids=GRIDS)
    first = levels[0]
    assert first.dictionary is not None and first.codes is not None
    assert (first.dictionary.bits, first.codes.bits) == (8, 8)
    assert first.atoms == GRIDS.step
    # all alike: nobody is preferred
    (only,) = water_levels([1.0] * 64, 64, 64, budget=3000, storage=PaperStorage(), grids=GRIDS)
    assert only.atoms == 64


def test_more_bytes_go_to_more_atoms_or_more_bits() -> None:
    energies = [math.exp(-0.05 * atom) for atom in range(256)]

    def spent(rate: float) -> int:
        levels = water_levels(
            energies, 256, 512, budget=int(rate * 16384), storage=PaperStorage(), grids=GRIDS
        )
        return Joint(levels).bytes(256, 512, PaperStorage())

    sizes = [spent(rate) for rate in (0.5, 1.0, 1.5, 2.0)]
    assert sizes == sorted(set(sizes))
    assert all(size > 0.8 * rate * 16384 for size, rate in zip(sizes, (0.5, 1.0, 1.5, 2.0), strict=True))


def test_nothing_fits_into_nothing() -> None:
    assert water_levels([1.0], 64, 64, budget=10, storage=PaperStorage(), grids=GRIDS) == ()
    assert water_levels([0.0] * 64, 64, 64, budget=9999, storage=PaperStorage(), grids=GRIDS) == ()


def test_in_memory_codes_lie_dense() -> None:
    grid, pattern = Grid(4, 32), Pattern(8, 64)
    file = PaperStorage().leaf_bytes(64, 100, grid, pattern)
    memory = InMemory(PaperStorage()).leaf_bytes(64, 100, grid, pattern)
    assert memory == PaperStorage().leaf_bytes(64, 100, grid) > file


def test_forms_tell_their_bytes() -> None:
    form: Form = Joint(
        (Level(8, Grid(8, 64), Grid(8, 8)), Level(64, Grid(4, 64), Grid(4, 64), Pattern(32, 64)))
    )
    bits = 8 * (64 * 8 + 16) + 100 * (8 * 8 + 16) + 64 * (64 * 4 + 16) + 100 * (32 * 4 + 16 + 64)
    assert form.bytes(64, 100, PaperStorage()) == bits // 8
    assert Plain(Grid(4, 32)).bytes(64, 100, PaperStorage()) == 64 * 100 * 4.5 / 8
