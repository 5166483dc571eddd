"""A part that is switched off costs nothing, and numbers that float16 cannot hold are refused by name."""

from __future__ import annotations

import pytest
import torch

from compot_deploy.core.grid import Grid
from compot_deploy.errors import InputError
from compot_deploy.numerics.whiten import whiten
from compot_deploy.quant import gptq, rtn
from compot_deploy.quant.scales import check_scales


def test_a_matrix_whose_input_is_always_zero_is_rounded_to_nearest() -> None:
    weight = torch.randn(64, 24)
    nothing = whiten(torch.zeros(64, 64, dtype=torch.float64))
    assert nothing.empty and not nothing.escalated
    for grid in (Grid(4, 32), Grid(8, 64)):
        made, nearest = gptq(weight, nothing.feedback, grid, sweeps=0), rtn(weight, None, grid)
        assert torch.equal(made.integers, nearest.integers) and torch.equal(made.scales, nearest.scales)
    assert 0 < nothing.error(weight, nearest.dequantize()) < 0.02
    assert not whiten(torch.eye(8, dtype=torch.float64)).empty


def test_a_matrix_that_is_no_gram_is_still_refused() -> None:
    with pytest.raises(InputError, match="no Gram matrix"):
        whiten(-torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_scale_that_float16_cannot_hold_is_refused_and_one_that_it_holds_is_not(bits: int) -> None:
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    weight /= weight.abs().max()
    grid = Grid(bits, 32)
    for factor in (1e-3, 1.0, 1e4):
        scaled = weight * factor
        check_scales("m", scaled, grid)
        found, wanted = rtn(scaled, None, grid).dequantize(), rtn(weight, None, grid).dequantize() * factor
        assert float((found - scaled).norm()) < 1.1 * float((wanted - scaled).norm())
    for factor, side in ((1e-8, "small"), (1e9, "large")):
        with pytest.raises(InputError, match=rf"^m: its largest weight .* too {side} for float16"):
            check_scales("m", weight * factor, grid)
    check_scales("m", torch.zeros(64, 24), grid)
