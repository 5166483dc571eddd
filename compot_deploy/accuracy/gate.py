"""The gate: limits on the losses, and the verdict that says yes or no."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final, Literal

from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import Comparison, Estimate
from compot_deploy.errors import InputError, RecipeError


@dataclass(frozen=True)
class Gate:
    """Limits that a model must keep to be deployed. Those on the total loss are off unless they are set.

    Attributes:
        max_perplexity_ratio: total: candidate over reference perplexity; 1.05 allows 5 % more.
        max_kl: total: mean KL divergence in nats per token.
        min_top1: total: fraction of positions with the same most likely token or class.
        min_cosine: total: mean cosine between embeddings.
        max_wer_increase: total: word errors per word that the deployed model adds; 0.01 is one point.
        min_recovery: share of the original's score in every task that the deployed model keeps; see
            `compot_deploy.accuracy.harness`, which measures it.
        max_export_nmse: NMSE of compressed → float32 reference. Always on: a faithful export adds rounding, about
            1e-12, and the first wrong scale, permutation or mask adds far more than 1e-4.
    """

    max_perplexity_ratio: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None
    max_wer_increase: float | None = None
    min_recovery: float | None = None
    max_export_nmse: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("max_perplexity_ratio", "max_kl", "max_wer_increase", "max_export_nmse"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit < math.inf:
                raise RecipeError(f"{name} = {limit}: a limit is a number from 0 on; leave it out for none.")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise RecipeError(f"min_top1 = {self.min_top1}: give a fraction between 0 and 1.")
        if self.min_recovery is not None and not 0 <= self.min_recovery < math.inf:
            raise RecipeError(f"min_recovery = {self.min_recovery}: give a share from 0 on, 0.95 for 95 %.")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise RecipeError(f"min_cosine = {self.min_cosine}: give a number between -1 and 1.")

    @property
    def needs_reference(self) -> bool:
        """Whether a limit on the total loss is set."""
        return any(getattr(self, name) is not None for name in LOSS_LIMITS if name not in _OF_OTHERS)


_OF_OTHERS: Final = ("max_export_nmse", "min_recovery")
"""Limits on something else than the total loss."""


LOSS_LIMITS: Final = tuple(entry.name for entry in fields(Gate))
"""Options of a recipe, and keys of a gate file, that limit a loss."""


@dataclass(frozen=True)
class Criterion:
    """One condition of the gate and how it went.

    Attributes:
        name: ``max_kl`` and so on, as in `Gate`; ``nonfinite_logits``.
        value: measured; NaN where nothing could be measured, which fails.
        threshold: the limit.
        relation: what the value must be to the threshold.
        passed: whether it is.
        sentence: the same in words.
    """

    name: str
    value: float
    threshold: float
    relation: Literal["at most", "at least"]
    passed: bool
    sentence: str


@dataclass(frozen=True)
class GateResult:
    """All criteria, in a fixed order, and the verdict: passed when every one of them is."""

    criteria: tuple[Criterion, ...]
    passed: bool


def apply_gate(
    gate: Gate, export_reference: Loss, export_deployed: Loss, method: Loss | None, total: Loss | None
) -> GateResult:
    """Compare measured losses with the limits. Widening a limit never turns a pass into a failure.

    Raises:
        InputError: a limit on the total loss is set, but there is no total loss.
    """
    bad = sum(loss.comparison.nonfinite_candidate for loss in (export_reference, export_deployed))
    bad += export_reference.comparison.nonfinite_reference
    bad += 0 if method is None else method.comparison.nonfinite_reference
    criteria = [
        criterion(
            "nonfinite_logits", float(bad), 0.0, "at most", "logits of any model that are NaN or infinite"
        ),
        criterion(
            "max_export_nmse",
            export_reference.comparison.nmse,
            gate.max_export_nmse,
            "at most",
            "NMSE that the file adds, computed exactly",
        ),
    ]
    if gate.needs_reference:
        if total is None:
            raise InputError("Limits on the total loss need the original model. Give it with --reference.")
        criteria += _total_criteria(gate, total.comparison)
    return GateResult(tuple(criteria), all(one.passed for one in criteria))


def _total_criteria(gate: Gate, figures: Comparison) -> Iterator[Criterion]:
    """The total loss against each limit that is set. What was not measured is NaN, which no limit lets pass."""

    def value(estimate: Estimate | None) -> float:
        return math.nan if estimate is None else estimate.value

    if gate.max_perplexity_ratio is not None:
        ratio, limit = value(figures.perplexity_ratio), gate.max_perplexity_ratio
        yield criterion("max_perplexity_ratio", ratio, limit, "at most", "perplexity over the original's")
    if gate.max_kl is not None:
        mean = value(None if figures.divergence is None else figures.divergence.mean)
        what = "mean KL divergence from the original in nats"
        yield criterion("max_kl", mean, gate.max_kl, "at most", what)
    if gate.min_top1 is not None:
        what = "share of positions with the original's most likely token"
        yield criterion("min_top1", value(figures.top1_agreement), gate.min_top1, "at least", what)
    if gate.min_cosine is not None:
        what = "mean cosine to the original's embeddings"
        yield criterion("min_cosine", value(figures.cosine), gate.min_cosine, "at least", what)
    if gate.max_wer_increase is not None:
        added = figures.word_error_increase
        what = "word errors per word more than the original makes"
        yield criterion(
            "max_wer_increase", math.nan if added is None else added, gate.max_wer_increase, "at most", what
        )


def criterion(
    name: str, value: float, threshold: float, relation: Literal["at most", "at least"], what: str
) -> Criterion:
    """A value held against a limit. NaN, what could not be measured, fails."""
    # NaN compares as False either way.
    passed = value <= threshold if relation == "at most" else value >= threshold
    verdict = "passed" if passed else "failed"
    return Criterion(
        name,
        value,
        threshold,
        relation,
        passed,
        f"{what}: {shown(value)}, {relation} {shown(threshold)}: {verdict}",
    )


def shown(value: float) -> str:
    """A figure of the gate: counts of a thousand and more with every digit, others with four."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value.is_integer() else f"{value:.4g}"
