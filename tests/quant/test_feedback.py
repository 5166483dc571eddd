"""Laws of what GPTQ knows of an input, and of the arithmetic that follows from it."""

from __future__ import annotations

import sys

import pytest
import torch
from matrices import same_matrix
from reference_gptq import reference_gptq
from reference_numerics import column_losses, correlated_gram, gram_loss
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.errors import InputError
from compot_deploy.quant import feedback_of, gptq, gptq_side_by_side, rtn
from compot_deploy.quant.descent import descend

GPTQ = sys.modules["compot_deploy.quant.gptq"]
BITS = (2, 3, 4, 8)


def trained_like(inputs: int, outputs: int) -> Tensor:
    """Normal weights of outputs of different sizes, a few of them large."""
    weight = torch.randn(inputs, outputs) * torch.logspace(-1, 0, outputs)
    weight[torch.rand_like(weight) < 0.01] *= 4
    return weight


def test_the_factors_multiply_to_the_damped_gram() -> None:
    gram = correlated_gram(40)
    feedback = feedback_of(gram)
    triangle = feedback.onward.double().T
    assert torch.equal(triangle, triangle.triu())
    assert torch.equal(triangle.diagonal(), torch.ones(40, dtype=torch.float64))
    product = feedback.unit * (triangle * feedback.cost) @ triangle.T
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(product, damped, rtol=1e-5, atol=1e-6 * float(damped.abs().max()))


def test_the_loss_is_the_sum_of_what_every_input_was_rounded_by_times_its_cost() -> None:
    weight, gram = trained_like(40, 12), correlated_gram(40)
    feedback = feedback_of(gram)
    error = weight.double() - gptq(weight, feedback, Grid(3, 16)).dequantize().double()
    felt = feedback.onward.double() @ error
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    expected = (error * (damped @ error)).sum(0)
    torch.testing.assert_close(feedback.unit * feedback.cost @ felt.square(), expected, rtol=1e-5, atol=0.0)


def test_factors_that_were_made_before_change_nothing() -> None:
    weight, gram = trained_like(48, 20), correlated_gram(48)
    feedback = feedback_of(gram)
    assert feedback_of(feedback, damping=1.0) is feedback
    for bits in BITS:
        assert same_matrix(gptq(weight, feedback, Grid(bits, 16)), gptq(weight, gram, Grid(bits, 16)))


def test_a_gram_of_another_size_of_activations_gives_the_same_matrix() -> None:
    weight, gram = trained_like(48, 20), correlated_gram(48)
    first = gptq(weight, gram, Grid(3, 16))
    for factor in (2.0**-80, 2.0**80):
        assert same_matrix(gptq(weight, gram * factor, Grid(3, 16)), first)


@pytest.mark.parametrize("group", [16, 40, 96])
def test_no_worse_than_the_slow_one_in_float64(group: int) -> None:
    """Mean over all bits; measured 0.98 to 0.99 of the slow one's loss."""
    ratios = []
    weight, gram = torch.randn(96, 150), correlated_gram(96)
    for bits in BITS:
        grid = Grid(bits, group)
        losses = [
            gram_loss(weight, quantize(weight, gram, grid).dequantize(), gram)
            for quantize in (gptq, reference_gptq)
        ]
        ratios.append(losses[0] / losses[1])
    assert sum(ratios) / len(ratios) <= 1.001


def test_descent_over_blocks_while_later_inputs_can_still_mend_earns_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_blocks, without = 0.0, 0.0
    problems = [(trained_like(128, 16), correlated_gram(128)) for _ in range(3)]
    monkeypatch.setattr(GPTQ, "_MENDED", 32)
    for weight, gram in problems:
        with_blocks += gram_loss(weight, gptq(weight, gram, Grid(3, 16)).dequantize(), gram)
    monkeypatch.setattr(GPTQ._Pass, "_descend_block", lambda *_: None)
    for weight, gram in problems:
        without += gram_loss(weight, gptq(weight, gram, Grid(3, 16)).dequantize(), gram)
    assert with_blocks < 0.99 * without


def test_side_by_side_every_matrix_is_as_good_as_alone() -> None:
    gram = correlated_gram(64)
    matrices = [
        (trained_like(64, 12), Grid(2, 16)),
        (trained_like(64, 9), Grid(4, 16)),
        (trained_like(64, 5), Grid(2, 32)),
        (trained_like(64, 7), Grid(8, 16)),
    ]
    together = gptq_side_by_side(matrices, gram)
    for (weight, grid), made in zip(matrices, together, strict=True):
        assert made.grid == grid
        alone = gptq(weight, gram, grid)
        assert made.shape == alone.shape
        losses = [gram_loss(weight, matrix.dequantize(), gram) for matrix in (made, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
        assert int(made.integers.min()) >= grid.lowest
        assert int(made.integers.max()) <= grid.highest


def test_outputs_may_be_done_in_any_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, grid = trained_like(64, 50), correlated_gram(64), Grid(3, 16)
    whole = column_losses(weight, gptq(weight, gram, grid).dequantize(), gram)
    monkeypatch.setattr(GPTQ, "_COLUMNS", 16)
    portions = gptq(weight, gram, grid)
    assert portions.shape == weight.shape
    torch.testing.assert_close(
        column_losses(weight, portions.dequantize(), gram).sum(), whole.sum(), rtol=0.02, atol=0.0
    )


@pytest.mark.parametrize("bits", BITS)
def test_one_block_is_gptq_as_published_and_then_descent(bits: int) -> None:
    weight, gram, grid = trained_like(40, 30), correlated_gram(40), Grid(bits, 40)
    published = gptq(weight, gram, grid, sweeps=0)
    for sweeps in (1, 2):
        expected = descend(published, weight, gram, sweeps=sweeps + 1)
        assert same_matrix(gptq(weight, gram, grid, sweeps=sweeps), expected)


def test_two_threads_give_the_bits_of_one() -> None:
    weight, gram = trained_like(700, 40), correlated_gram(700, 720)
    made = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            feedback = feedback_of(gram)
            made.append((feedback, gptq(weight, feedback, Grid(3, 64))))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0][0].cost, made[1][0].cost)
    assert torch.equal(made[0][0].onward, made[1][0].onward)
    assert same_matrix(made[0][1], made[1][1])


def test_inputs_that_were_always_zero_cost_nothing_and_disturb_nothing() -> None:
    weight, gram = trained_like(48, 10), correlated_gram(48)
    dead = [0, 17, 47]
    gram[dead] = 0.0
    gram[:, dead] = 0.0
    for bits in BITS:
        result = gptq(weight, gram, Grid(bits, 16))
        assert torch.isfinite(result.dequantize()).all()
        nearest = rtn(weight, None, Grid(bits, 16))
        assert gram_loss(weight, result.dequantize(), gram) < gram_loss(weight, nearest.dequantize(), gram)


def test_what_is_no_gram_is_refused() -> None:
    with pytest.raises(InputError, match="energy"):
        feedback_of(torch.zeros(4, 4))
    with pytest.raises(InputError, match="no Gram"):
        feedback_of(torch.diag(torch.tensor([1600.0] + [-100.0] * 15)))
    assert feedback_of(torch.ones(16, 16), damping=0.0).damping > 0
