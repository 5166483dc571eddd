"""How far one model's next-token distributions are from another's, position by position.

Two models read the same tokens and each gives logits of shape (positions, vocabulary) and the token that
really came next. `predict` turns the logits of one model into log-probabilities once; `compare` puts two
models side by side and keeps a handful of numbers per position; `concatenate` joins what was streamed in
chunks, in any order of sizes; `summarize` makes the figures of a report. No logits are kept.

With r and c the logits of the reference and of the candidate at one position, p and q their softmax, t the
token that came next:

    negative log-likelihood   −log p[t]  and  −log q[t], natural logarithm
    KL divergence             Σ_v p (log p − log q), in nats, never below 0
    top-1 agreement           argmax r == argmax c, the first of equal maxima
    squared error             Σ_v (c − r)²
    reference power           Σ_v (r − mean_v r)²
    largest difference        max_v |c − r|

All of it in float64: the logits of two correct implementations differ by 1e-6, and the KL divergence of such
a pair is 1e-12, which float32 cannot hold.

The NMSE is Σ squared error / Σ reference power over all positions. Softmax does not see a constant added to
all logits of a position, so the *power* leaves it out (otherwise a large common offset would hide any error);
the *error* keeps it in, because a faithful export reproduces the offset too. That is the strictest of the
usual definitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

METRICS_VERSION: Final = 1
"""Raised whenever a figure of this module changes its meaning; figures of two versions do not compare."""

KL_EDGES: Final = tuple(10.0 ** (exponent / 4) for exponent in range(-40, 9))
"""Edges of the KL histogram in nats: four bins per decade, from 1e-10 to 100."""


@dataclass(frozen=True)
class Figures:
    """What is known of one model at some positions once it was looked at: 33 bytes each, whatever the vocabulary.

    Attributes:
        normalizer: log Σ_v exp(logit).
        surprise: −log-probability of the token that came next, in nats.
        choice: the most likely token, the first of equals.
        power: Σ_v (logit − mean logit)².
        finite: whether every logit of the position is finite.
        nonfinite: how many single logits are NaN or infinite.
    """

    normalizer: Float[Tensor, " positions"]
    surprise: Float[Tensor, " positions"]
    choice: Int64[Tensor, " positions"]
    power: Float[Tensor, " positions"]
    finite: Bool[Tensor, " positions"]
    nonfinite: int


@dataclass(frozen=True)
class Prediction:
    """What one model says at some positions, prepared once and compared with any number of others.

    Attributes:
        logits: in float64.
        figures: one for each position.
    """

    logits: Float[Tensor, "positions vocabulary"]
    figures: Figures

    @cached_property
    def log_probabilities(self) -> Float[Tensor, "positions vocabulary"]:
        """Log-softmax of the logits."""
        return self.logits - self.figures.normalizer[:, None]

    @cached_property
    def probabilities(self) -> Float[Tensor, "positions vocabulary"]:
        """Softmax of the logits."""
        return self.log_probabilities.exp()


def predict(
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int64[Tensor, " positions"],
    figures: Figures | None = None,
) -> Prediction:
    """Log-probabilities of one model in float64.

    Takes 24 bytes per logit, so hand it a chunk, not a whole text.

    Args:
        logits: of any floating type.
        targets: the token that came next at each position.
        figures: of these logits and targets, where they are known already.
    """
    exact = logits.double()
    finite, nonfinite = _finite(exact) if figures is None else (figures.finite, figures.nonfinite)
    # Positions with a bad logit are left out by `compare`; zeros keep NaN out of the arithmetic until then.
    safe = exact.nan_to_num(0.0, 0.0, 0.0) if nonfinite else exact
    if figures is not None:
        return Prediction(safe, figures)
    normalizer = torch.logsumexp(safe, dim=-1)
    surprise = normalizer - safe.gather(-1, targets[:, None]).squeeze(-1)
    centred = safe - safe.mean(dim=-1, keepdim=True)
    power = torch.linalg.vecdot(centred, centred)
    return Prediction(safe, Figures(normalizer, surprise, safe.argmax(dim=-1), power, finite, nonfinite))


def _finite(
    logits: Float[Tensor, "positions vocabulary"],
) -> tuple[Bool[Tensor, " positions"], int]:
    """Whether all logits of a position are finite, and how many are not; a finite sum has only finite terms."""
    sums = torch.isfinite(logits.sum(dim=-1))
    if bool(sums.all()):
        return sums, 0
    bad = ~torch.isfinite(logits)
    return ~bad.any(dim=-1), int(bad.sum())


@dataclass(frozen=True)
class Positions:
    """The comparison at every position that could be compared: 49 bytes each, whatever the vocabulary.

    Attributes:
        reference_surprise: −log p of the token that came next, in nats.
        candidate_surprise: −log q of it, in nats.
        divergence: KL(p‖q) in nats.
        agreement: both choose the same token.
        squared_error: Σ_v (c − r)².
        reference_power: Σ_v (r − mean r)².
        largest_difference: max_v |c − r|.
        skipped: positions left out because a logit of one of the two models is not finite.
        nonfinite_reference: single logits of the reference that are NaN or infinite.
        nonfinite_candidate: single logits of the candidate that are NaN or infinite.
    """

    reference_surprise: Float[Tensor, " positions"]
    candidate_surprise: Float[Tensor, " positions"]
    divergence: Float[Tensor, " positions"]
    agreement: Bool[Tensor, " positions"]
    squared_error: Float[Tensor, " positions"]
    reference_power: Float[Tensor, " positions"]
    largest_difference: Float[Tensor, " positions"]
    skipped: int
    nonfinite_reference: int
    nonfinite_candidate: int


def compare(reference: Prediction, candidate: Prediction) -> Positions:
    """Two models at the same positions.

    Raises:
        ValueError: the two differ in positions or vocabulary.
    """
    if reference.logits.shape != candidate.logits.shape:
        raise ValueError(
            f"Logits of shape {tuple(reference.logits.shape)} and {tuple(candidate.logits.shape)} "
            "(positions, vocabulary) cannot be compared."
        )
    one, other = reference.figures, candidate.figures
    usable = one.finite & other.finite
    p, q = reference.probabilities, candidate.probabilities
    # Σ (q − p) is zero, and adding it term by term cancels the rounding error of the two normalizations, so
    # each term is ≥ 0 up to the last bit: divergences down to 1e-16 are resolved, not drowned.
    terms = (reference.log_probabilities - candidate.log_probabilities).mul_(p).add_(q).sub_(p)
    difference = candidate.logits - reference.logits
    return Positions(
        reference_surprise=one.surprise[usable],
        candidate_surprise=other.surprise[usable],
        divergence=terms.sum(-1).clamp(min=0.0)[usable],
        agreement=(one.choice == other.choice)[usable],
        squared_error=torch.linalg.vecdot(difference, difference)[usable],
        reference_power=one.power[usable],
        largest_difference=difference.abs_().amax(dim=-1)[usable],
        skipped=int((~usable).sum()),
        nonfinite_reference=one.nonfinite,
        nonfinite_candidate=other.nonfinite,
    )


def concatenate(parts: Sequence[Positions]) -> Positions:
    """Chunks of positions as one. How a text was cut into chunks does not change any figure.

    Raises:
        ValueError: there is nothing to join.
    """
    if not parts:
        raise ValueError("No position was compared.")
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_POSITION
    }
    counted: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _COUNTS}
    return Positions(**joined, **counted)


class Collected:
    """Room for the comparison of a whole text, filled chunk by chunk.

    Nothing of a chunk is kept but numbers in this room. A thousand small tensors that outlive the large ones between
    them would leave the memory in pieces that no large one fits into again: gigabytes, in the end.

    Args:
        positions: how many there are, at most.
    """

    def __init__(self, positions: int) -> None:
        self._room = {name: torch.empty(positions, dtype=torch.float64) for name in _PER_POSITION}
        self._filled, self._counts = 0, dict.fromkeys(_COUNTS, 0)

    def add(self, part: Positions) -> None:
        """Take over a chunk."""
        start, self._filled = self._filled, self._filled + len(part.divergence)
        for name, room in self._room.items():
            room[start : self._filled] = getattr(part, name)
        for name in _COUNTS:
            self._counts[name] += getattr(part, name)

    def positions(self) -> Positions:
        """All that was taken over."""
        found: dict[str, Any] = {name: room[: self._filled] for name, room in self._room.items()}
        return Positions(**{**found, "agreement": found["agreement"].bool(), **self._counts})


_COUNTS: Final = ("skipped", "nonfinite_reference", "nonfinite_candidate")
_PER_POSITION: Final = tuple(entry.name for entry in fields(Positions) if entry.name not in _COUNTS)


@dataclass(frozen=True)
class Estimate:
    """A figure and how far chance alone may have moved it.

    Attributes:
        value: the figure.
        standard_error: one standard deviation of the figure over samples of as many tokens. Tokens are taken
            as independent, which neighbours in a text are not quite: read it as a lower bound.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """KL(reference‖candidate) over positions, in nats.

    Attributes:
        mean: with its standard error.
        median: half of the positions are below.
        p90: 90 % of the positions are below.
        p99: 99 % of the positions are below.
        maximum: the worst position.
        histogram: positions per bin of `KL_EDGES`; one more bin below the first edge, one above the last.
    """

    mean: Estimate
    median: float
    p90: float
    p99: float
    maximum: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """All figures of one pair of models. With no position left to compare they are NaN, never 0.

    What a task does not have is None: only text that goes on has a perplexity, only distributions diverge, only
    embeddings have a cosine.

    Attributes:
        positions: compared positions; texts, where a model gives one output for each.
        skipped: positions left out because a logit was not finite.
        nonfinite_reference: logits of the reference that are NaN or infinite.
        nonfinite_candidate: logits of the candidate that are NaN or infinite.
        reference_perplexity: exp of the mean surprise.
        candidate_perplexity: exp of the mean surprise.
        perplexity_ratio: candidate over reference, its error from the *paired* differences, which is far
            smaller than the two errors suggest.
        divergence: KL(reference‖candidate).
        top1_agreement: fraction of positions where both choose the same token.
        nmse: Σ(c − r)² / Σ(r − mean r)²; 0 only for equal logits.
        largest_difference: of any logit at any position.
        cosine: mean over texts of the cosine between pooled embeddings.
        lowest_cosine: of the worst text.
        word_errors: of what the candidate transcribes against what the reference does, per word.
        reference_word_errors: of what the reference transcribes against what was said, where that is known.
        candidate_word_errors: the same of the candidate.
    """

    positions: int
    skipped: int
    nonfinite_reference: int
    nonfinite_candidate: int
    reference_perplexity: Estimate | None
    candidate_perplexity: Estimate | None
    perplexity_ratio: Estimate | None
    divergence: Divergence | None
    top1_agreement: Estimate | None
    nmse: float
    largest_difference: float
    cosine: Estimate | None = None
    lowest_cosine: float | None = None
    word_errors: Estimate | None = None
    reference_word_errors: Estimate | None = None
    candidate_word_errors: Estimate | None = None

    @property
    def word_error_increase(self) -> float | None:
        """Word errors that the candidate adds: against what was said where that is known, else the reference's text."""
        if self.candidate_word_errors is None or self.reference_word_errors is None:
            return None if self.word_errors is None else self.word_errors.value
        return self.candidate_word_errors.value - self.reference_word_errors.value


def summarize(positions: Positions, *, goes_on: bool = True) -> Comparison:
    """The figures of a comparison.

    Standard errors: of a mean, s/√n; of an exponential of a mean, that times the exponential (delta method).

    Args:
        positions: what was compared.
        goes_on: each position predicts the next token, so that there is a perplexity.
    """
    count = len(positions.divergence)
    error, power = float(positions.squared_error.sum()), float(positions.reference_power.sum())
    return Comparison(
        positions=count,
        skipped=positions.skipped,
        nonfinite_reference=positions.nonfinite_reference,
        nonfinite_candidate=positions.nonfinite_candidate,
        reference_perplexity=_exponential(mean(positions.reference_surprise)) if goes_on else None,
        candidate_perplexity=_exponential(mean(positions.candidate_surprise)) if goes_on else None,
        perplexity_ratio=_exponential(mean(positions.candidate_surprise - positions.reference_surprise))
        if goes_on
        else None,
        divergence=_divergence(positions.divergence),
        top1_agreement=mean(positions.agreement.double()),
        nmse=_relative(error, power) if count else math.nan,
        largest_difference=float(positions.largest_difference.max()) if count else math.nan,
    )


def _relative(error: float, power: float) -> float:
    """NaN where one of them is not known."""
    if math.isnan(error) or math.isnan(power):
        return math.nan
    return error / power if power > 0 else 0.0 if error == 0 else math.inf


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens from the start that two sequences share."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def mean(values: Float[Tensor, " positions"]) -> Estimate:
    """Mean and standard error; NaN of nothing."""
    if len(values) == 0:
        return Estimate(math.nan, math.nan)
    deviation = float(values.std(correction=1)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), deviation / math.sqrt(len(values)))


def _exponential(exponent: Estimate) -> Estimate:
    try:
        value = math.exp(exponent.value)
    except OverflowError:
        return Estimate(math.inf, math.inf)
    return Estimate(value, value * exponent.standard_error)


def _divergence(values: Float[Tensor, " positions"]) -> Divergence:
    if len(values) == 0:
        return Divergence(
            Estimate(math.nan, math.nan), *(math.nan,) * 4, histogram=(0,) * (len(KL_EDGES) + 1)
        )
    ordered = values.sort().values
    bins = torch.bucketize(values, torch.tensor(KL_EDGES, dtype=torch.float64), right=True)
    return Divergence(
        mean=mean(values),
        median=_quantile(ordered, 0.5),
        p90=_quantile(ordered, 0.9),
        p99=_quantile(ordered, 0.99),
        maximum=float(ordered[-1]),
        histogram=tuple(torch.bincount(bins, minlength=len(KL_EDGES) + 1).tolist()),
    )


def _quantile(ordered: Float[Tensor, " positions"], fraction: float) -> float:
    """Linear interpolation between neighbours, as numpy's default; torch.quantile stops at 16M values."""
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))
