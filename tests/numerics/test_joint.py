"""Laws of joint quantization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import same_matrix

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, Quantized
from compot_deploy.core.storage import PaperStorage, matrix_bytes
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.numerics import joint as joint_module
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.joint import Tier, joint, split
from compot_deploy.numerics.quantize_factors import quantize_factors
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.schemes import Joint

INPUTS, OUTPUTS = 48, 80


def problem(seed: int = 0, outputs: int = OUTPUTS) -> tuple[torch.Tensor, Whitening]:
    """A weight with a decaying spectrum behind correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    tokens = torch.randn(400, INPUTS, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    weight = weight * torch.logspace(0, -2, INPUTS, dtype=torch.float64)
    weight = weight @ torch.randn(INPUTS, outputs, generator=generator, dtype=torch.float64)
    return weight, whiten(tokens.T @ tokens)


def dense_tiers() -> tuple[Tier, ...]:
    return (
        Tier(8, Grid(8, 16), Grid(8, 16)),
        Tier(16, Grid(4, 16), Grid(4, 16)),
        Tier(8, Grid(4, 16), Grid(2, 16)),
    )


HALF = Pattern(8, 16)


def sparse_tiers(pattern: Pattern = HALF) -> tuple[Tier, ...]:
    return (Tier(8, Grid(8, 16), Grid(8, 16)), Tier(16, Grid(4, 16), Grid(4, 16), pattern))


@pytest.mark.parametrize("tiers", [dense_tiers(), sparse_tiers(), sparse_tiers(Pattern(2, 4))])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kept_objective_never_rises_and_is_the_error(tiers: tuple[Tier, ...], seed: int) -> None:
    weight, whitening = problem(seed)
    result = joint(weight, whitening, tiers, rounds=5)
    assert len(result.objective) == 5
    assert list(result.objective) == sorted(result.objective, reverse=True)
    measured = whitening.error(weight, result.dequantize())
    assert result.error == pytest.approx(measured, rel=1e-6)
    assert result.objective[-1] == pytest.approx(measured**2, rel=1e-6)


def test_more_rounds_help() -> None:
    weight, whitening = problem()
    one = joint(weight, whitening, dense_tiers(), rounds=1).error
    assert joint(weight, whitening, dense_tiers(), rounds=4).error < 0.99 * one


def test_a_round_that_is_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are spoilt from the second on: the result is that of the first, bit for bit."""
    weight, whitening = problem()
    first = joint(weight, whitening, sparse_tiers(), rounds=1)
    quantize, calls = joint_module._quantize_dictionary, [0]

    def spoilt(*arguments: Any) -> Any:
        dictionaries, codes = quantize(*arguments)
        calls[0] += 1
        if calls[0] > 1:
            dictionaries = tuple(Dense(torch.ones(leaf.shape)) for leaf in dictionaries)
        return dictionaries, codes

    monkeypatch.setattr(joint_module, "_quantize_dictionary", spoilt)
    result = joint(weight, whitening, sparse_tiers(), rounds=3)
    assert calls == [3]
    assert result.objective == (first.objective[0],) * 3
    assert result.error == first.error
    for one, two in zip(
        (*first.dictionaries, *first.codes), (*result.dictionaries, *result.codes), strict=True
    ):
        assert same_matrix(one, two)


@pytest.mark.parametrize("pattern", [Pattern(8, 16), Pattern(2, 4), Pattern(4, 8)])
def test_codes_outside_the_pattern_are_zero(pattern: Pattern) -> None:
    weight, whitening = problem()
    codes = joint(weight, whitening, sparse_tiers(pattern), rounds=3).codes[1]
    assert isinstance(codes, Quantized)
    groups = codes.integers.reshape(-1, pattern.of, OUTPUTS)
    assert int((groups != 0).sum(1).max()) <= pattern.kept


@pytest.mark.parametrize("tiers", [(Tier(16, Grid(2, 16), None),), (Tier(16, Grid(2, 16), None, HALF),)])
def test_codes_are_the_best_for_the_quantized_dictionary(tiers: tuple[Tier, ...]) -> None:
    """Where nothing rounds them: ``ÂᵀG(W − ÂS) = 0`` on the support."""
    weight, whitening = problem()
    result = joint(weight, whitening, tiers)
    dictionary = result.dictionaries[0].dequantize().double()
    codes = result.codes[0].dequantize().double()
    gradient = dictionary.T @ whitening.gram @ (weight - dictionary @ codes)
    start = dictionary.T @ whitening.gram @ weight
    support = codes != 0
    kept = tiers[0].pattern
    assert int(support.sum()) == codes.numel() * kept.kept / kept.of
    assert float(gradient[support].norm()) < 1e-4 * float(start.norm())


def test_the_dictionary_is_the_best_for_the_integer_codes() -> None:
    """Where nothing rounds it: ``A = WŜᵀ(ŜŜᵀ)⁻¹`` with the codes of the round before, but for scale and order."""
    weight, whitening = problem()
    tiers = (Tier(16, None, Grid(2, 16)),)
    before, after = (joint(weight, whitening, tiers, rounds=rounds) for rounds in (1, 2))
    assert after.objective[1] < after.objective[0]
    codes = before.codes[0].dequantize().double()
    expected = torch.linalg.lstsq(codes.T, weight.T).solution.T
    found = after.dictionaries[0].dequantize().double()
    likeness = (expected / expected.norm(dim=0)).T @ (found / found.norm(dim=0))
    assert float(likeness.amax(1).min()) > 1 - 1e-6


def lost_by(tiers: tuple[Tier, ...]) -> float:
    """What quantized codes lose of what the best ones reach, over a few dictionaries of atoms that are alike."""
    total = 0.0
    atoms = sum(tier.atoms for tier in tiers)
    for seed in range(4):
        weight, whitening = problem(seed)
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(INPUTS, 1, generator=generator, dtype=torch.float64)
        dictionary = torch.randn(INPUTS, atoms, generator=generator, dtype=torch.float64) + common
        seen = joint_module._Seen.through(
            (Dense(dictionary.float()),), joint_module._Problem(weight, whitening)
        )
        best = torch.linalg.solve(seen.gram, seen.correlation)
        codes = joint_module._Codes(best, torch.ones_like(best, dtype=torch.bool))
        made = joint_module._quantize_codes(seen, tiers, codes, 1)
        stacked = joint_module._stack(made)
        total += (seen.lost(stacked) - seen.lost(best)) / (seen.energy - seen.lost(best))
    return total


COARSE_AND_FINE = (Tier(12, None, Grid(2, 4)), Tier(12, None, Grid(4, 4)))


def test_codes_are_rounded_for_the_gram_that_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = (Tier(24, None, Grid(4, 8)),)
    with_gram = lost_by(tiers)
    round_with = joint_module.gptq

    def blind(codes: Any, gram: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return round_with(codes, torch.eye(len(gram), dtype=gram.dtype), *arguments, **options)

    monkeypatch.setattr(joint_module, "gptq", blind)
    assert with_gram < 0.8 * lost_by(tiers)


def test_a_tier_is_fitted_to_what_the_ones_before_it_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_module, "descend", lambda leaf, *arguments, **options: leaf)
    fitted = lost_by(COARSE_AND_FINE)
    monkeypatch.setattr(joint_module, "refit_codes", lambda gram, wanted, codes, *arguments, **options: codes)
    assert fitted < 0.8 * lost_by(COARSE_AND_FINE)


def test_a_tier_is_rounded_knowing_what_those_behind_it_will_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_module, "descend", lambda leaf, *arguments, **options: leaf)
    knowing = lost_by(COARSE_AND_FINE)
    monkeypatch.setattr(joint_module, "_schur", lambda gram, place: gram[place, place])
    assert knowing < 0.8 * lost_by(COARSE_AND_FINE)


def test_a_last_turn_over_all_tiers_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = lost_by(COARSE_AND_FINE)
    monkeypatch.setattr(joint_module, "descend", lambda leaf, *arguments, **options: leaf)
    assert turned < 0.99 * lost_by(COARSE_AND_FINE)


def test_quantizing_jointly_beats_one_after_the_other() -> None:
    weight, whitening = problem()
    grid, pattern = Grid(4, 16), Pattern(8, 16)
    factors = compot(weight, whitening, 16, pattern)
    apart = quantize_factors(factors, weight, whitening, dictionary_grid=grid, code_grid=grid)
    together = joint(weight, whitening, (Tier(16, grid, grid, pattern),), rounds=4)
    assert together.error < apart.error


def test_a_head_of_strong_atoms_helps_where_one_direction_dominates() -> None:
    weight, whitening = problem()
    whitened = whitening.apply(weight)
    left, sizes, right = torch.linalg.svd(whitened, full_matrices=False)
    sizes[0] *= 20
    weight = whitening.unapply(left * sizes @ right)
    storage, grid = PaperStorage(), Grid(4, 16)
    head = (Tier(1, Grid(8, 16), Grid(8, 16)), Tier(15, grid, grid))
    without = (Tier(18, grid, grid),)
    assert Joint(head).bytes(*weight.shape, storage) <= Joint(without).bytes(*weight.shape, storage)
    assert joint(weight, whitening, head).error < 0.7 * joint(weight, whitening, without).error


def test_matrices_side_by_side_share_one_dictionary_and_lose_nothing() -> None:
    weight, whitening = problem()
    tiers = sparse_tiers()
    factors = joint(weight, whitening, tiers)
    widths = {"q": 40, "k": 24, "v": 16}
    parts = split(factors, widths, "attention")
    whole = torch.cat([part.dequantize() for part in parts.values()], dim=1)
    torch.testing.assert_close(whole, factors.dequantize().float())
    for part in parts.values():
        for pair, first in zip(part.pairs, parts["q"].pairs, strict=True):
            assert pair.dictionary_name == "attention"
            assert same_matrix(pair.dictionary, first.dictionary)
    sizes = matrix_bytes(parts, PaperStorage())
    assert sum(sizes.values()) == Joint(tiers).bytes(INPUTS, OUTPUTS, PaperStorage())
    with pytest.raises(ValueError, match="columns"):
        split(factors, {"q": 40}, "attention")


def test_two_runs_are_equal_and_inputs_stay_as_they_are() -> None:
    weight, whitening = problem()
    before, gram = weight.clone(), whitening.gram.clone()
    one, two = (split(joint(weight, whitening, dense_tiers()), {"w": OUTPUTS}, "w")["w"] for _ in range(2))
    assert isinstance(one, Factorized)
    assert same_matrix(one, two)
    assert torch.equal(weight, before)
    assert torch.equal(whitening.gram, gram)


def test_a_tier_may_stay_in_floating_point() -> None:
    weight, whitening = problem()
    exact = joint(weight, whitening, (Tier(INPUTS, None, None),))
    assert exact.error < 1e-6
    half = joint(weight, whitening, (Tier(8, None, None), Tier(16, Grid(4, 16), Grid(4, 16))))
    assert half.error < joint(weight, whitening, (Tier(24, Grid(4, 16), Grid(4, 16)),)).error


def test_a_zero_weight_is_met_exactly() -> None:
    _, whitening = problem()
    result = joint(torch.zeros(INPUTS, 4, dtype=torch.float64), whitening, sparse_tiers())
    assert result.error == 0.0
    assert not bool(result.dequantize().any())


def test_refuses_what_cannot_be() -> None:
    weight, whitening = problem()
    with pytest.raises(RecipeError, match="1 to 48"):
        joint(weight, whitening, (Tier(49, None, None),))
    with pytest.raises(RecipeError, match="come last"):
        joint(weight, whitening, tuple(reversed(sparse_tiers())))
    with pytest.raises(RecipeError, match="groups of 4"):
        Tier(6, None, None, Pattern(2, 4))
    with pytest.raises(InputError, match="NaN"):
        joint(weight * torch.nan, whitening, dense_tiers())
