from __future__ import annotations

import pytest
import torch
from reference_numerics import correlated_gram

from compot_deploy.errors import InputError
from compot_deploy.numerics.whiten import FIRST_RIDGE, whiten


def test_the_factor_multiplies_back_to_the_gram() -> None:
    gram = correlated_gram(12)
    whitening = whiten(gram)
    ridge = FIRST_RIDGE * gram.diagonal().mean() * torch.eye(12)
    assert torch.allclose(whitening.factor @ whitening.factor.T, gram + ridge, rtol=1e-12)
    assert torch.equal(whitening.factor, whitening.factor.tril())
    assert (whitening.ridge, whitening.attempts, whitening.escalated) == (FIRST_RIDGE, 1, False)


def test_the_whitened_error_is_the_error_of_the_outputs() -> None:
    activations = torch.randn(200, 8, dtype=torch.float64)
    weight, other = torch.randn(8, 5), torch.randn(8, 5)
    outputs = activations @ weight.double()
    expected = (outputs - activations @ other.double()).norm() / outputs.norm()
    found = whiten(activations.T @ activations, ridge=0.0).error(weight, other)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_unapply_is_the_inverse_of_apply() -> None:
    whitening = whiten(correlated_gram(10))
    weight = torch.randn(10, 3, dtype=torch.float64)
    assert torch.allclose(whitening.unapply(whitening.apply(weight)), weight, rtol=1e-9, atol=1e-9)


def test_an_indefinite_gram_escalates_the_ridge_and_says_so() -> None:
    gram = correlated_gram(8, tokens=4)  # singular
    gram -= 1e-4 * gram.diagonal().mean() * torch.eye(8)
    whitening = whiten(gram)
    assert whitening.escalated
    assert whitening.ridge == pytest.approx(1e-3)
    assert whitening.attempts == 4


def test_a_singular_gram_without_a_first_ridge_gets_one() -> None:
    whitening = whiten(torch.ones(6, 6), ridge=0.0)
    assert whitening.escalated
    assert 0 < whitening.ridge <= 1e-3


def test_dead_inputs_are_whitened_by_the_ridge_alone() -> None:
    gram = correlated_gram(6)
    gram[2], gram[:, 2] = 0.0, 0.0
    whitening = whiten(gram)
    assert not whitening.escalated
    weight = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(whitening.unapply(whitening.apply(weight)), weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.full((4, 4), float("nan")), "NaN"),
        (torch.diag(torch.tensor([1.0, float("inf")])), "infinite"),
        (torch.diag(torch.tensor([1e3, -1e5, 1e5])), "no Gram"),
    ],
)
def test_what_is_no_gram_is_refused_with_a_reason(gram: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        whiten(gram)


def test_a_zero_weight_has_no_error_if_it_is_met() -> None:
    whitening, zero = whiten(torch.eye(3)), torch.zeros(3, 2)
    assert whitening.error(zero, zero) == 0.0
    assert whitening.error(zero, zero + 1) == float("inf")


def test_whitening_leaves_its_input_alone_and_repeats_bit_for_bit() -> None:
    gram = correlated_gram(9)
    before = gram.clone()
    first, second = whiten(gram), whiten(gram)
    assert torch.equal(gram, before)
    assert torch.equal(first.factor, second.factor)
