"""Laws of mending: the answer of least squares, from sums alone, and nothing where nothing is known."""

from __future__ import annotations

import pytest
import torch

from compot_deploy.numerics.mending import mended


def test_weights_are_those_of_least_squares_on_the_disturbed_input() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    disturbed = x + 0.3 * torch.randn(200, 12, generator=generator, dtype=torch.float64)
    weights = {name: torch.randn(12, 5, generator=generator) for name in "ab"}
    found = mended(weights, disturbed.T @ disturbed, disturbed.T @ x, None, damping=1e-9)
    for name, weight in weights.items():
        wanted = torch.linalg.lstsq(disturbed, x @ weight.double()).solution
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-4)
    # What is asked for besides is added to the outputs.
    besides = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    asked = x @ weights["a"].double() + besides
    lacking = disturbed.T @ (asked - disturbed @ weights["a"].double())
    (one,) = mended({"a": weights["a"]}, disturbed.T @ disturbed, None, lacking, damping=1e-9).values()
    wanted = torch.linalg.lstsq(disturbed, asked).solution
    torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)


def test_an_input_that_nobody_disturbed_leaves_weights_as_they_are() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram, weights = x.T @ x, {"a": torch.randn(6, 3)}
    assert torch.equal(mended(weights, gram, gram, None, 0.01)["a"], weights["a"])


@pytest.mark.parametrize("size", [0.0, float("nan")])
def test_an_input_that_says_nothing_leaves_weights_as_they_are(size: float) -> None:
    gram, weights = torch.full((6, 6), size, dtype=torch.float64), {"a": torch.randn(6, 3)}
    assert torch.equal(mended(weights, gram, gram, None, 0.01)["a"], weights["a"])
    assert torch.equal(mended(weights, gram, None, None, 0.01)["a"], weights["a"])
