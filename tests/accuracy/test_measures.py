from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import reference_accuracy as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compot_deploy.accuracy.metrics import (
    KL_EDGES,
    Comparison,
    Positions,
    common_prefix,
    compare,
    concatenate,
    predict,
    summarize,
)


def positions_of(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> Positions:
    return compare(predict(reference, targets), predict(candidate, targets))


def figures(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> Comparison:
    return summarize(positions_of(reference, candidate, targets))


def pair(
    positions: int = 200, vocabulary: int = 23, noise: float = 0.3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 2 * torch.randn(positions, vocabulary, generator=generator)
    candidate = reference + noise * torch.randn(positions, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return reference, candidate, targets


def test_identical_logits_have_no_loss_at_all() -> None:
    reference, _, targets = pair()
    result = figures(reference, reference.clone(), targets)
    assert result.divergence.mean.value == 0 and result.divergence.maximum == 0
    assert result.top1_agreement.value == 1 and result.top1_agreement.standard_error == 0
    assert result.perplexity_ratio.value == 1 and result.perplexity_ratio.standard_error == 0
    assert result.nmse == 0 and result.largest_difference == 0
    assert result.reference_perplexity == result.candidate_perplexity
    assert result.positions == 200 and result.skipped == 0


def test_every_figure_equals_the_slow_reference() -> None:
    reference, candidate, targets = pair()
    result = figures(reference, candidate, targets)
    rows = list(zip(reference.double().tolist(), candidate.double().tolist(), targets.tolist(), strict=True))
    kl = [slow.kl(r, c) for r, c, _ in rows]
    surprise_r = [slow.surprise(r, t) for r, _, t in rows]
    surprise_c = [slow.surprise(c, t) for _, c, t in rows]
    close = {"rel": 1e-12, "abs": 0.0}
    assert result.divergence.mean.value == pytest.approx(np.mean(kl), **close)
    assert result.divergence.maximum == pytest.approx(max(kl), **close)
    assert result.reference_perplexity.value == pytest.approx(np.exp(np.mean(surprise_r)), **close)
    assert result.candidate_perplexity.value == pytest.approx(np.exp(np.mean(surprise_c)), **close)
    ratio = np.exp(np.mean(surprise_c) - np.mean(surprise_r))
    assert result.perplexity_ratio.value == pytest.approx(ratio, **close)
    agreement = [np.argmax(r) == np.argmax(c) for r, c, _ in rows]
    assert result.top1_agreement.value == pytest.approx(np.mean(agreement), **close)
    assert result.nmse == pytest.approx(slow.nmse(reference.tolist(), candidate.tolist()), rel=1e-6)
    assert result.largest_difference == float((candidate.double() - reference.double()).abs().max())


@pytest.mark.parametrize("fraction, name", [(0.5, "median"), (0.9, "p90"), (0.99, "p99")])
@pytest.mark.parametrize("positions", [1, 2, 7, 100, 101])
def test_quantiles_equal_numpys(fraction: float, name: str, positions: int) -> None:
    part = positions_of(*pair(positions))
    expected = np.quantile(part.divergence.numpy(), fraction)
    assert getattr(summarize(part).divergence, name) == pytest.approx(expected, rel=1e-14)


def test_chunking_is_irrelevant() -> None:
    reference, candidate, targets = pair()
    whole = figures(reference, candidate, targets)
    for chunk in (1, 3, 64, 199, 500):
        parts = [
            positions_of(r, c, t)
            for r, c, t in zip(
                reference.split(chunk), candidate.split(chunk), targets.split(chunk), strict=True
            )
        ]
        joined = summarize(concatenate(parts))
        assert joined.divergence.histogram == whole.divergence.histogram
        for name in ("nmse", "largest_difference"):
            assert getattr(joined, name) == pytest.approx(getattr(whole, name), rel=1e-12)
        for name in ("reference_perplexity", "candidate_perplexity", "perplexity_ratio", "top1_agreement"):
            one, other = getattr(joined, name), getattr(whole, name)
            assert one.value == pytest.approx(other.value, rel=1e-12)
            assert one.standard_error == pytest.approx(other.standard_error, rel=1e-12)
        for name in ("median", "p90", "p99", "maximum"):
            one, other = getattr(joined.divergence, name), getattr(whole.divergence, name)
            assert one == pytest.approx(other, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0, 5),
    st.floats(1e-8, 1e4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_divergence_is_never_negative(seed: int, noise: float, scale: float, dtype: torch.dtype) -> None:
    reference, candidate, targets = pair(20, 11, noise, seed)
    part = positions_of((scale * reference).to(dtype), (scale * candidate).to(dtype), targets)
    assert bool((part.divergence >= 0).all()) and bool(torch.isfinite(part.divergence).all())


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7])
def test_tiny_divergences_are_resolved(noise: float) -> None:
    # For a small change ε of the logits KL is half the variance of ε under p, which needs no subtraction.
    reference, _, targets = pair()
    reference = reference.double()
    change = noise * torch.randn(reference.shape, dtype=torch.float64)
    p = torch.softmax(reference, -1)
    mean = (p * change).sum(-1, keepdim=True)
    expected = 0.5 * (p * (change - mean) ** 2).sum(-1)
    part = positions_of(reference, reference + change, targets)
    torch.testing.assert_close(part.divergence.sum(), expected.sum(), rtol=max(10 * noise, 1e-3), atol=0)


def test_a_constant_offset_is_invisible_to_softmax_but_not_to_nmse() -> None:
    reference, _, targets = pair()
    shifted = figures(reference.double(), reference.double() + 3.0, targets)
    assert shifted.divergence.maximum < 1e-15
    assert shifted.perplexity_ratio.value == pytest.approx(1, abs=1e-14)
    assert shifted.top1_agreement.value == 1
    assert shifted.nmse > 0.1 and shifted.largest_difference == pytest.approx(3)


def test_a_common_offset_does_not_hide_an_error_from_nmse() -> None:
    reference, candidate, targets = pair()
    plain = figures(reference.double(), candidate.double(), targets)
    offset = figures(reference.double() + 1e3, candidate.double() + 1e3, targets)
    assert offset.nmse == pytest.approx(plain.nmse, rel=1e-9)


def test_logits_without_any_spread() -> None:
    flat, targets = torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64)
    assert figures(flat, flat, targets).nmse == 0
    assert figures(flat, flat + torch.arange(7), targets).nmse == math.inf


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_nonfinite_logits_are_counted_and_do_not_spread(poison: float, side: str) -> None:
    reference, candidate, targets = pair()
    clean = torch.ones(len(targets), dtype=torch.bool)
    clean[[3, 150]] = False
    expected = figures(reference[clean], candidate[clean], targets[clean])
    damaged = reference if side == "reference" else candidate
    damaged[3, 2] = damaged[3, 5] = damaged[150, 0] = poison
    result = figures(reference, candidate, targets)
    assert result.positions == 198 and result.skipped == 2
    assert result.nonfinite_reference == (3 if side == "reference" else 0)
    assert result.nonfinite_candidate == (3 if side == "candidate" else 0)
    assert result.divergence.mean.value == pytest.approx(expected.divergence.mean.value, rel=1e-12)
    assert result.perplexity_ratio.value == pytest.approx(expected.perplexity_ratio.value, rel=1e-12)
    assert result.nmse == pytest.approx(expected.nmse, rel=1e-12)


def test_nothing_left_to_compare_is_not_a_perfect_score() -> None:
    reference, candidate, targets = pair(5)
    candidate[:, 0] = math.nan
    result = figures(reference, candidate, targets)
    assert result.positions == 0 and result.skipped == 5
    for value in (
        result.nmse,
        result.divergence.mean.value,
        result.divergence.p99,
        result.top1_agreement.value,
    ):
        assert math.isnan(value)
    assert math.isnan(result.perplexity_ratio.value) and sum(result.divergence.histogram) == 0


def test_an_impossible_prediction_overflows_to_infinity_not_to_an_error() -> None:
    reference = torch.tensor([[0.0, 0.0]])
    candidate = torch.tensor([[0.0, 1e6]])
    result = figures(reference, candidate, torch.tensor([0]))
    assert result.perplexity_ratio.value == math.inf and result.divergence.mean.value > 1e5


def test_the_histogram_counts_every_position_once() -> None:
    part = positions_of(*pair(500, noise=1.0))
    histogram = summarize(part).divergence.histogram
    assert len(histogram) == len(KL_EDGES) + 1 and sum(histogram) == 500
    counts, _ = np.histogram(part.divergence.numpy(), bins=[-math.inf, *KL_EDGES, math.inf])
    assert histogram == tuple(counts)


def test_a_divergence_on_an_edge_belongs_to_the_bin_above() -> None:
    part = positions_of(*pair(len(KL_EDGES)))
    on_edges = replace(part, divergence=torch.tensor(KL_EDGES, dtype=torch.float64))
    assert summarize(on_edges).divergence.histogram == (0,) + (1,) * len(KL_EDGES)


def test_standard_errors_are_the_spread_over_repeated_samples() -> None:
    # 400 texts of 300 tokens from one source: the spread of a figure over them is its standard error.
    repeats = [figures(*pair(300, 7, noise=0.8, seed=seed)) for seed in range(400)]
    for name in ("reference_perplexity", "candidate_perplexity", "perplexity_ratio", "top1_agreement"):
        estimates = [getattr(result, name) for result in repeats]
        claimed = np.mean([estimate.standard_error for estimate in estimates])
        assert np.std([estimate.value for estimate in estimates]) == pytest.approx(claimed, rel=0.12)
    estimates = [result.divergence.mean for result in repeats]
    claimed = np.mean([estimate.standard_error for estimate in estimates])
    assert np.std([estimate.value for estimate in estimates]) == pytest.approx(claimed, rel=0.12)


def test_the_paired_ratio_is_sharper_than_the_two_perplexities() -> None:
    result = figures(*pair(noise=0.05))
    assert result.perplexity_ratio.standard_error < 0.2 * (
        result.reference_perplexity.standard_error / result.reference_perplexity.value
    )


def test_inputs_are_unchanged() -> None:
    reference, candidate, targets = pair()
    candidate[0, 0] = math.inf
    before = reference.clone(), candidate.clone(), targets.clone()
    figures(reference, candidate, targets)
    assert all(torch.equal(a, b) for a, b in zip(before, (reference, candidate, targets), strict=True))


def test_different_vocabularies_are_refused() -> None:
    reference, candidate, targets = pair()
    with pytest.raises(ValueError, match=r"\(200, 23\) and \(200, 22\)"):
        positions_of(reference, candidate[:, :22], targets.clamp(max=21))


def test_joining_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="No position"):
        concatenate([])


@pytest.mark.parametrize(
    "first, second, shared",
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 9, 3], 1)],
)
def test_common_prefix(first: list[int], second: list[int], shared: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == shared
