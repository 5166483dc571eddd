"""Laws of kept answers: what they tell of a candidate is what whole distributions tell, within what chance allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from compot_deploy.accuracy.answers import DRAWN, KEPT, Distributions, compare_with, joined, shorten
from compot_deploy.accuracy.listening import Comparing, Heard, Shortening, positions_of
from compot_deploy.accuracy.metrics import compare, predict, summarize
from compot_deploy.accuracy.reading import batches_of
from compot_deploy.models.tasks import GENERATION


def logits(positions: int, vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(positions, vocabulary, generator=generator)


def both(vocabulary: int, apart: float, positions: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """A model, one that differs from it, and the tokens that came next."""
    one = logits(positions, vocabulary, 0)
    targets = torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(2))
    return one, one + apart * logits(positions, vocabulary, 1, 1.0), targets


def answers(values: Tensor, targets: Tensor, seed: int = 0) -> Distributions:
    return shorten(values, targets, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [5, KEPT, KEPT + 1, 500])
@pytest.mark.parametrize("apart", [0.0, 0.01, 0.3, 2.0])
def test_figures_are_those_of_whole_distributions(vocabulary: int, apart: float) -> None:
    one, other, targets = both(vocabulary, apart)
    truth = summarize(compare(predict(one, targets), predict(other, targets)))
    found = summarize(compare_with(answers(one, targets), other, targets))
    assert found.perplexity_ratio is not None and truth.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(truth.perplexity_ratio.value, rel=1e-6)
    assert found.top1_agreement == truth.top1_agreement
    assert found.divergence is not None and truth.divergence is not None
    # Of 500 tokens a tenth of the probability is not kept; draws tell what becomes of it.
    assert found.divergence.mean.value == pytest.approx(
        truth.divergence.mean.value, rel=0.02 if vocabulary > KEPT else 1e-5, abs=1e-9
    )
    assert math.isnan(found.nmse)


def test_the_estimate_has_no_bias_where_most_of_the_mass_is_drawn() -> None:
    one, other, targets = logits(4, 2000, 0, 0.5), logits(4, 2000, 1, 0.5), torch.zeros(4).long()
    truth = compare(predict(one, targets), predict(other, targets)).divergence
    kept = [answers(one, targets, seed) for seed in range(400)]
    assert float(kept[0].rest.min()) > 0.8
    found = torch.stack([compare_with(part, other, targets).divergence for part in kept])
    error = found.std(0) / math.sqrt(len(kept))
    assert bool(((found.mean(0) - truth).abs() < 4 * error).all())
    # Without the draws a large part of it would be missing.
    assert bool((truth > 4 * error).all())


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    one, other, targets = both(100, 0.1, 10)
    other[3, 5], other[7, 0] = math.nan, math.inf
    found = compare_with(answers(one, targets), other, targets)
    assert (found.skipped, found.nonfinite_candidate, len(found.divergence)) == (2, 2, 8)


def test_the_first_of_equal_tokens_is_the_choice() -> None:
    flat = torch.zeros(3, 100)
    assert answers(flat, torch.zeros(3).long()).choice.tolist() == [0, 0, 0]
    assert answers(flat, torch.zeros(3).long()).drawn.shape == (3, DRAWN)


class Fixed:
    """A runner whose logits follow from the token and its position alone."""

    name, vocabulary, context = "fixed", 50, None

    def __init__(self, apart: float) -> None:
        self._table = logits(50 * 64, 50, 0) + apart * logits(50 * 64, 50, 1)

    def logits(self, tokens: Tensor, chunk: int) -> Iterator[Tensor]:
        places = torch.arange(tokens.shape[1])
        for start in range(0, tokens.shape[1], chunk):
            here = slice(start, start + chunk)
            yield self._table[tokens[:, here] * 64 + places[here]]

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        return (0,) * new_tokens


@pytest.mark.parametrize("chunks", [(64, 64), (7, 3)])
def test_what_is_heard_does_not_depend_on_how_the_text_was_cut(chunks: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(50, (length,), generator=generator) for length in (20, 20, 1, 33, 2, 20)]
    count = positions_of(GENERATION, windows)
    assert count == 19 + 19 + 32 + 1 + 19
    kept = Shortening(GENERATION, count)
    for runner, listener, chunk in ((Fixed(0.0), kept, chunks[0]), (Fixed(0.2), None, chunks[1])):
        if listener is None:
            listener = Comparing(GENERATION, Distributions(**kept.tensors))
        heard = Heard(runner, windows, listener)
        for batch in batches_of(windows, 2):
            assert sum(piece.shape[1] for piece in heard.logits(batch, chunk)) == batch.shape[1]
        list(heard.logits(torch.zeros(2, 9).long(), 4))  # what is read afterwards is not heard
    targets = torch.cat([window[1:] for window in windows])
    whole = [
        torch.cat([next(iter(Fixed(apart).logits(window[None], 64)))[0, :-1] for window in windows])
        for apart in (0.0, 0.2)
    ]
    truth = summarize(compare(*(predict(values, targets) for values in whole)))
    assert isinstance(listener, Comparing)
    found = listener.comparison()
    assert found.positions == truth.positions == count
    assert found.top1_agreement is not None and truth.top1_agreement is not None
    assert found.top1_agreement.value == pytest.approx(truth.top1_agreement.value)
    assert found.perplexity_ratio is not None and truth.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(truth.perplexity_ratio.value, rel=1e-6)


def test_parts_are_the_whole() -> None:
    one, _, targets = both(100, 0.1, 10)
    whole = answers(one, targets)
    again = joined([whole.part(0, 4), whole.part(4, 10)])
    assert all(torch.equal(getattr(whole, name), getattr(again, name)) for name in vars(whole))
