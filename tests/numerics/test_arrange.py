"""Laws of the order of atoms under patterns of neighbours."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf.storage import GgufStorage
from compot_deploy.models.source import open_source
from compot_deploy.numerics import arrange as arranging
from compot_deploy.numerics.arrange import _best_swaps, arrange
from compot_deploy.numerics.coding import threshold
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation
from compot_deploy.numerics.joint import Tier, joint
from compot_deploy.numerics.whiten import whiten
from compot_deploy.planning.knapsack import knapsack
from compot_deploy.planning.rate_points import Candidate, RatePoints
from compot_deploy.planning.schemes import Joint, Plain
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe

PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)]


def kept(coefficients: torch.Tensor, pattern: Pattern) -> float:
    return float(threshold(coefficients, pattern)[0].square().sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    groups=st.integers(1, 6),
    outputs=st.integers(1, 60),
    pattern=st.sampled_from(PATTERNS),
    decay=st.floats(0.5, 1.0),
)
def test_the_order_that_is_found_never_keeps_less(
    seed: int, groups: int, outputs: int, pattern: Pattern, decay: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    atoms = groups * pattern.of
    coefficients = torch.randn(atoms, outputs, generator=generator).double()
    coefficients *= decay ** torch.arange(atoms)[:, None]
    before = coefficients.clone()
    order = arrange(coefficients, pattern)
    assert sorted(order.tolist()) == list(range(atoms))
    assert kept(coefficients[order], pattern) >= kept(coefficients, pattern) * (1 - 1e-12)
    assert torch.equal(order, arrange(coefficients, pattern))
    assert torch.equal(coefficients, before)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_swaps_that_pay_on_some_outputs_only_are_not_taken(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swaps are looked for on a part of the outputs and evaluated on all; here the part often misleads."""
    monkeypatch.setattr(arranging, "_ARRANGED_OUTPUTS", 2)
    proposed = worse = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        coefficients = torch.randn(4 * pattern.of, 9, generator=generator).double()
        looked_at = coefficients[:, :: 9 // 2].square().float()
        swapped = torch.arange(len(coefficients))
        for first, second in _best_swaps(looked_at, pattern):
            swapped[[first, second]] = swapped[[second, first]]
            proposed += 1
        worse += kept(coefficients[swapped], pattern) < kept(coefficients, pattern)
        order = arrange(coefficients, pattern)
        assert kept(coefficients[order], pattern) >= kept(coefficients, pattern)
    assert proposed > 20 and worse > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_value_of_a_swap_is_what_it_changes(pattern: Pattern) -> None:
    """All swaps by trying them: the first that is proposed is the best, and all together add up."""
    squares = torch.rand(4 * pattern.of, 30, generator=torch.Generator().manual_seed(1)) ** 4

    def energy(order: list[int]) -> float:
        return kept(squares[order].double().sqrt(), pattern)

    order = list(range(len(squares)))
    gains = {}
    for first, second in itertools.combinations(order, 2):
        swapped = order.copy()
        swapped[first], swapped[second] = second, first
        gains[first, second] = energy(swapped) - energy(order)
    found = _best_swaps(squares, pattern)
    assert found and found[0] == max(gains, key=gains.__getitem__)
    together = order.copy()
    for first, second in found:
        together[first], together[second] = together[second], together[first]
    assert energy(together) - energy(order) == pytest.approx(sum(gains[pair] for pair in found), rel=1e-4)


def test_atoms_that_are_large_in_the_same_outputs_are_parted() -> None:
    """Four atoms of one group are the only ones that matter for a block of outputs: two of them would be lost."""
    pattern = Pattern(2, 4)
    coefficients = torch.zeros(16, 16)
    for block in range(4):
        coefficients[4 * block : 4 * block + 4, 4 * block : 4 * block + 4] = 1.0 + torch.rand(4, 4)
    assert kept(coefficients, pattern) < 0.7 * float(coefficients.square().sum())
    order = arrange(coefficients, pattern)
    assert kept(coefficients[order], pattern) == pytest.approx(float(coefficients.square().sum()))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_arranging_atoms_never_raises_the_objective(pattern: Pattern, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = (
        torch.randn(300, 48, generator=generator).double() @ torch.randn(48, 48, generator=generator).double()
    )
    weight = torch.randn(48, 90, generator=generator).double()
    whitening = whiten(tokens.T @ tokens)
    plain, arranged, longer = (
        compot(weight, whitening, 24, pattern, Alternation(arrangements=number)) for number in (0, 1, 3)
    )
    assert arranged.objective[-1] <= plain.objective[-1]
    assert longer.objective[-1] <= arranged.objective[-1]
    assert arranged.objective[-1] < plain.objective[-1]  # here it does find something
    assert list(longer.objective) == sorted(longer.objective, reverse=True)
    # a pattern over whole columns has no neighbours, and nothing changes
    column = Pattern(12, 24)
    one, two = (compot(weight, whitening, 24, column, Alternation(arrangements=number)) for number in (0, 1))
    assert torch.equal(one.codes, two.codes)


@pytest.mark.parametrize(
    ("recipe_options", "patterns"),
    [
        ({"format": ("gguf",), "gguf_layout": "sparse", "code_pattern": "2:4"}, (Pattern(2, 4),)),
        ({"format": ("gguf",), "gguf_layout": "sparse", "code_pattern": "4:8"}, (Pattern(4, 8),)),
        ({"format": ("gguf",), "gguf_layout": "factorized", "code_pattern": "4:8"}, ()),
        ({"format": ("onnx",), "onnx_codes": "packed", "code_pattern": "2:4"}, (Pattern(2, 4),)),
        ({"format": ("onnx",), "code_pattern": "2:4"}, ()),
        ({"format": ("gguf",), "gguf_layout": "sparse"}, ()),
    ],
)
def test_patterns_are_tried_where_the_format_stores_them_in_fewer_bytes(
    tmp_path: Path, recipe_options: dict[str, Any], patterns: tuple[Pattern, ...]
) -> None:
    model = tiny.save(tmp_path / "model", num_hidden_layers=1)
    recipe = Recipe(model=str(model), bits=2.0, **recipe_options)
    search = resolve(recipe, open_source(str(model))).search
    assert search.patterns == patterns
    exporter = EXPORTERS[recipe.format[0]]
    assert exporter.options(asdict(recipe)) is not None


@pytest.mark.parametrize(
    ("recipe_options", "tried"),
    [
        ({"format": ("gguf",), "gguf_layout": "sparse"}, {2: True, 3: True, 4: False}),
        ({"format": ("onnx",), "onnx_codes": "packed"}, {2: False, 3: True, 4: False}),
    ],
)
def test_groups_of_256_are_tried_at_few_bits_where_the_format_takes_them(
    tmp_path: Path, recipe_options: dict[str, Any], tried: dict[int, bool]
) -> None:
    model = tiny.save(tmp_path / "model", num_hidden_layers=1)
    search = resolve(Recipe(model=str(model), bits=2.0, **recipe_options), open_source(str(model))).search
    assert {bits: 256 in search.grids.groups[bits] for bits in tried} == tried


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)])
def test_the_knapsack_pays_for_patterns_what_gguf_planes_take(pattern: Pattern) -> None:
    """Of two schemes that differ in the pattern alone, each costs its payload, and a budget between them decides."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 192, generator=generator).double()
    whitening = whiten(torch.eye(128).double())
    storage = GgufStorage("sparse")
    candidates = []
    for one in (pattern, Pattern()):
        scheme = Joint((Tier(64, Grid(4, 64), Grid(4, 64), one),))
        made = joint(weight, whitening, scheme.tiers, rounds=1)
        payload = 0
        for leaf, kind in ((made.dictionaries[0], Pattern()), (made.codes[0], one)):
            assert isinstance(leaf, Quantized)
            plane = gguf_planes.PlaneFormat.of(leaf.shape[0], leaf.grid, kind)
            payload += gguf_planes.pack(leaf.integers.numpy(), leaf.scales.numpy(), plane).nbytes
        assert payload == scheme.bytes(128, 192, storage)
        candidates.append(Candidate(scheme, payload, (made.error**2,)))
    sparse, dense = candidates
    per_entry = {2: 3.0, 4: 3.5}[pattern.kept] + 16 / 64
    assert sparse.bytes == dense.bytes - 64 * 192 * (4.25 - per_entry) / 8
    coarse = Candidate(Plain(Grid(2, 64)), 1000, (0.9,))
    rate_points = [RatePoints(("w",), ((coarse, sparse, dense),))]
    assert knapsack(rate_points, dense.bytes).chosen[0].candidate == dense
    assert knapsack(rate_points, dense.bytes - 1).chosen[0].candidate == sparse
    assert knapsack(rate_points, sparse.bytes - 1).chosen[0].candidate == coarse
