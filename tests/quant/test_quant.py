from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matrices import same_matrix
from reference_numerics import column_losses, correlated_gram, gram_loss, textbook_gptq
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Quantized
from compot_deploy.errors import InputError
from compot_deploy.numerics.coding import threshold
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation
from compot_deploy.numerics.quantize_factors import quantize_factors
from compot_deploy.numerics.whiten import whiten
from compot_deploy.quant import QUANTIZERS, gptq, rtn
from compot_deploy.quant.descent import descend
from compot_deploy.quant.scales import round_to_grid, search_scales

BITS = (2, 3, 4, 8)


def on_grid(grid: Grid, inputs: int, outputs: int) -> Quantized:
    integers = torch.randint(grid.lowest, grid.highest + 1, (inputs, outputs), dtype=torch.int8)
    integers[:: grid.group] = grid.lowest  # pins the scale: the largest magnitude is the grid's end
    scales = (torch.rand(grid.groups(inputs), outputs) * 0.1 + 0.01).half()
    return Quantized(integers, scales, grid)


# bitsandbytes has tables and one grid of integers; its laws are in test_bnb.py.
ON_INTEGERS = sorted(set(QUANTIZERS) - {"bnb"})


@pytest.mark.parametrize("quantizer", ON_INTEGERS)
@pytest.mark.parametrize("bits", BITS)
def test_integers_are_on_the_grid_and_scales_are_finite(quantizer: str, bits: int) -> None:
    grid = Grid(bits, 8)
    weight = torch.randn(20, 6) * torch.logspace(-6, 3, 6)
    result = QUANTIZERS[quantizer](weight, correlated_gram(20), grid)
    assert grid.lowest <= int(result.integers.min()) <= int(result.integers.max()) <= grid.highest
    assert torch.isfinite(result.scales).all()
    assert (result.scales != 0).all()
    assert result.scales.shape == (3, 6)  # a last group of 4


@pytest.mark.parametrize("bits", BITS)
def test_the_searched_scale_is_no_worse_than_the_full_range(bits: int) -> None:
    grid = Grid(bits, 32)
    group = torch.randn(32, 200, dtype=torch.float64)
    found = search_scales(group, grid)
    assert torch.equal(found, found.half().double())
    plain = (group.abs().amax(0) / -grid.lowest).half().double()
    errors = [
        float((group - round_to_grid(group, scale, grid) * scale).square().sum()) for scale in (found, plain)
    ]
    assert errors[0] < errors[1] * (0.8 if bits == 2 else 1.0)


def test_scales_are_as_good_as_a_fine_search() -> None:
    group = torch.randn(16, 50, dtype=torch.float64)
    importance = torch.rand(16, dtype=torch.float64) + 0.1

    def error(scale: Tensor, grid: Grid) -> Tensor:
        return importance @ (group - round_to_grid(group, scale, grid) * scale).square()

    for bits in BITS:
        grid = Grid(bits, 16)
        base = group.abs().amax(0) / -grid.lowest
        fine = torch.stack(
            [
                error((base * sign * factor).half().double(), grid)
                for factor in torch.linspace(0.3, 2.2, 400).tolist()
                for sign in (1.0, -1.0)
            ]
        ).amin(0)
        found = error(search_scales(group, grid, importance), grid)
        # At 8 bits the error is a thousandth of the weight, and jagged in the scale: not worth 800 tries.
        assert float(found.mean()) <= float(fine.mean()) * (1.5 if bits == 8 else 1.05)


def test_groups_without_weight_have_scale_one_and_integers_zero() -> None:
    weight = torch.randn(16, 3)
    weight[:8, 1] = 0.0
    weight[8:, 2] = 1e-12  # below anything that float16 can scale
    for quantize in (QUANTIZERS[name] for name in ON_INTEGERS):
        result = quantize(weight, torch.eye(16), Grid(4, 8))
        assert float(result.scales[0, 1]) == 1.0
        assert float(result.scales[1, 2]) == 1.0
        assert not result.integers[:8, 1].any()
        assert not result.integers[8:, 2].any()


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(InputError, match="beyond float16"):
        rtn(torch.full((8, 2), 1e7), None, Grid(4, 8))


@pytest.mark.parametrize("quantizer", ON_INTEGERS)
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_on_the_grid_is_a_fixed_point(quantizer: str, bits: int) -> None:
    original = on_grid(Grid(bits, 8), 24, 10)
    result = QUANTIZERS[quantizer](original.dequantize(), correlated_gram(24), original.grid)
    assert torch.equal(result.dequantize(), original.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_gptq_equals_the_textbook_loop(bits: int) -> None:
    weight, gram, grid = torch.randn(21, 7), correlated_gram(21), Grid(bits, 8)
    assert same_matrix(gptq(weight, gram, grid, sweeps=0), textbook_gptq(weight, gram, grid, 0.01))


@pytest.mark.parametrize("group", [4, 7, 16, 40])
def test_the_block_size_is_irrelevant(group: int) -> None:
    weight, gram = torch.randn(40, 6), correlated_gram(40)
    whole = gptq(weight, gram, Grid(4, group), block=1000)
    for block in (1, 3, 8, 17, 40):
        assert same_matrix(gptq(weight, gram, Grid(4, group), block=block), whole)


@pytest.mark.parametrize("bits", BITS)
def test_a_diagonal_gram_gives_round_to_nearest(bits: int) -> None:
    weight = torch.randn(24, 6)
    gram = torch.eye(24, dtype=torch.float64)
    assert same_matrix(gptq(weight, gram, Grid(bits, 8), sweeps=0), rtn(weight, gram, Grid(bits, 8)))


@pytest.mark.parametrize("bits", BITS)
def test_gptq_and_descent_keep_their_gain_over_round_to_nearest(bits: int) -> None:
    nearest, published, descended = 0.0, 0.0, 0.0
    for _ in range(3):
        weight, gram, grid = torch.randn(64, 16), correlated_gram(64), Grid(bits, 16)
        nearest += gram_loss(weight, rtn(weight, gram, grid).dequantize(), gram)
        published += gram_loss(weight, gptq(weight, gram, grid, sweeps=0).dequantize(), gram)
        descended += gram_loss(weight, gptq(weight, gram, grid).dequantize(), gram)
    # Measured 0.28 to 0.36 and 0.19 to 0.23; with half of the feedback lost it is above 0.5.
    assert published < 0.42 * nearest
    assert descended < 0.75 * published


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pattern", [DENSE, Pattern(2, 4)])
def test_descent_lowers_the_loss_of_every_column_in_every_sweep(bits: int, pattern: Pattern) -> None:
    weight, gram, grid = torch.randn(40, 12), correlated_gram(40), Grid(bits, 16)
    support = threshold(weight, pattern)[1]
    result = rtn(weight, gram, grid, support=support)
    losses = [column_losses(weight * support, result.dequantize(), gram)]
    for _ in range(4):
        result = descend(result, weight, gram, support=support, sweeps=1)
        losses.append(column_losses(weight * support, result.dequantize(), gram))
        assert not result.integers[~support].any()
    for earlier, later in pairwise(losses):
        assert (later <= earlier * (1 + 1e-9)).all()
    assert losses[-1].sum() < 0.7 * losses[0].sum()


def test_descent_leaves_no_single_integer_to_improve() -> None:
    weight, gram, grid = torch.randn(12, 5), correlated_gram(12), Grid(3, 12)
    result = descend(rtn(weight, gram, grid), weight, gram, sweeps=100)
    least = column_losses(weight, result.dequantize(), gram)
    for row in range(12):
        for step in (-1, 1):
            integers = result.integers.clone()
            integers[row] = (integers[row] + step).clamp(grid.lowest, grid.highest)
            other = Quantized(integers, result.scales, grid)
            assert (column_losses(weight, other.dequantize(), gram) >= least * (1 - 1e-9)).all()


@pytest.mark.parametrize("group", [8, 40])
def test_the_block_size_of_descent_is_irrelevant(group: int) -> None:
    weight, gram = torch.randn(40, 6), correlated_gram(40)
    start = rtn(weight, gram, Grid(4, group))
    whole = descend(start, weight, gram, block=1000)
    for block in (1, 7, 40):
        assert same_matrix(descend(start, weight, gram, block=block), whole)


@pytest.mark.parametrize("bits", BITS)
def test_on_a_support_gptq_is_never_worse_than_round_to_nearest(bits: int) -> None:
    weight, gram, grid = torch.randn(64, 16), correlated_gram(64), Grid(bits, 16)
    support = threshold(weight, Pattern(32, 64))[1]
    losses = [
        column_losses(weight * support, quantize(weight, gram, grid, support=support).dequantize(), gram)
        for quantize in (gptq, rtn)
    ]
    assert (losses[0] <= losses[1]).all()
    assert losses[0].sum() < 0.7 * losses[1].sum()


@pytest.mark.parametrize("quantizer", ON_INTEGERS)
def test_entries_outside_the_support_are_exactly_zero(quantizer: str) -> None:
    weight = torch.randn(32, 12)
    support = threshold(weight, Pattern(2, 4))[1]
    result = QUANTIZERS[quantizer](weight, correlated_gram(32), Grid(4, 16), support=support)
    assert not result.integers[~support].any()
    assert result.integers[support].any()


def test_a_singular_gram_is_damped_until_it_can_be_inverted() -> None:
    weight = torch.randn(16, 4)
    result = gptq(weight, torch.ones(16, 16), Grid(4, 8), damping=0.0)
    assert torch.isfinite(result.dequantize()).all()
    for gram in (torch.zeros(16, 16), torch.full((16, 16), float("nan"))):
        with pytest.raises(InputError, match="energy"):
            gptq(weight, gram, Grid(4, 8))
    with pytest.raises(InputError, match="no Gram"):
        gptq(weight, torch.diag(torch.tensor([1600.0] + [-100.0] * 15)), Grid(4, 8))


@pytest.mark.parametrize("quantizer", ON_INTEGERS)
def test_quantizing_leaves_its_inputs_alone_and_repeats_bit_for_bit(quantizer: str) -> None:
    weight, gram = torch.randn(32, 12), correlated_gram(32)
    support = threshold(weight, Pattern(2, 4))[1]
    before = weight.clone(), gram.clone(), support.clone()
    first, second = (QUANTIZERS[quantizer](weight, gram, Grid(4, 16), support=support) for _ in range(2))
    assert same_matrix(first, second)
    assert all(torch.equal(*pair) for pair in zip(before, (weight, gram, support), strict=True))


PATTERNS = (Pattern(8, 16), Pattern(2, 4))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("quantizer", ON_INTEGERS)
def test_quantized_factors_keep_their_pattern_and_report_their_error(
    pattern: Pattern, quantizer: str
) -> None:
    weight, whitening = torch.randn(24, 60), whiten(correlated_gram(24))
    factors = compot(weight, whitening, 16, pattern)
    result = quantize_factors(
        factors,
        weight,
        whitening,
        dictionary_grid=Grid(4, 8),
        code_grid=Grid(4, 8),
        quantizer=QUANTIZERS[quantizer],
    )
    assert isinstance(result.dictionary, Quantized)
    assert isinstance(result.codes, Quantized)
    kept = (result.codes.integers != 0).reshape(-1, pattern.of, 60).sum(1)
    assert int(kept.max()) <= pattern.kept
    product = result.dictionary.dequantize().double() @ result.codes.dequantize().double()
    assert result.error == pytest.approx(whitening.error(weight, product), rel=1e-6)
    assert result.unquantized_error == factors.error


def test_each_step_of_quantizing_factors_earns_its_place() -> None:
    errors = torch.zeros(3)
    grid = Grid(4, 8)
    for _ in range(3):
        weight, whitening = torch.randn(32, 80), whiten(correlated_gram(32))
        factors = compot(weight, whitening, 16, Pattern(8, 16), Alternation(rounds=5))
        for position, (quantizer, paper_exact) in enumerate(((gptq, False), (gptq, True), (rtn, True))):
            errors[position] += quantize_factors(
                factors,
                weight,
                whitening,
                dictionary_grid=grid,
                code_grid=grid,
                quantizer=quantizer,
                paper_exact=paper_exact,
            ).error
    assert errors[0] < errors[1] < errors[2]


def test_factors_without_a_grid_keep_their_precision() -> None:
    weight, whitening = torch.randn(12, 20), whiten(correlated_gram(12))
    factors = compot(weight, whitening, 8, Pattern(4, 8))
    result = quantize_factors(factors, weight, whitening, dictionary_grid=None, code_grid=None)
    assert isinstance(result.dictionary, Dense)
    assert isinstance(result.codes, Dense)
    assert result.error == pytest.approx(factors.error, rel=1e-4)
    assert (result.codes.weight != 0).sum(0).max() <= 4


def test_a_zero_weight_quantizes_to_zero_factors() -> None:
    whitening = whiten(torch.eye(8))
    factors = compot(torch.zeros(8, 12), whitening, 4, Pattern(2, 4))
    result = quantize_factors(
        factors, torch.zeros(8, 12), whitening, dictionary_grid=Grid(4, 4), code_grid=Grid(4, 4)
    )
    assert result.error == 0.0
    assert not result.codes.dequantize().any()


def test_quantizing_factors_leaves_them_alone_and_repeats_bit_for_bit() -> None:
    weight, whitening = torch.randn(16, 40), whiten(correlated_gram(16))
    factors = compot(weight, whitening, 8, Pattern(4, 8))
    before = factors.dictionary.clone(), factors.codes.clone()
    grid = Grid(4, 8)
    first, second = (
        quantize_factors(factors, weight, whitening, dictionary_grid=grid, code_grid=grid) for _ in range(2)
    )
    assert torch.equal(factors.dictionary, before[0])
    assert torch.equal(factors.codes, before[1])
    assert same_matrix(first.dictionary, second.dictionary)
    assert same_matrix(first.codes, second.codes)
    assert first.error == second.error
