"""What a model said to a text, short enough to travel: a file is held against it where the model is not there.

Of a distribution the `KEPT` most likely tokens are kept with their log-probabilities, the mass of the rest, and `DRAWN`
tokens of the rest, drawn in proportion to their probability. With p the model's and q a candidate's distribution, K the
kept tokens and D the drawn ones, r the mass of the rest::

    KL(p‖q)  =  Σ_{v∈K} (p log p/q + q − p)  +  r · E_{v∼p, v∉K} [log p/q + q/p − 1]
             ≈  Σ_{v∈K} (p log p/q + q − p)  +  r/|D| · Σ_{v∈D} [log p/q + q/p − 1]

The sum of q − p over all tokens is zero, so adding it changes nothing; with it no term is negative, and an estimate of
nothing is nothing. The estimate has no bias: over a text the draws average out. Perplexity and the most likely token
are exact, for the probability of the token that came next is kept as well.

Of embeddings the mean vector of each text is kept, whose cosine is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.metrics import Positions
from compot_deploy.core.memory import COMPARED_AT_ONCE

KEPT: Final = 32
DRAWN: Final = 4


@dataclass(frozen=True)
class Distributions:
    """Shortened distributions at some positions; logarithms are natural.

    Attributes:
        ids: the most likely tokens.
        logs: of their probabilities.
        rest: probability of all others together.
        drawn: tokens of the rest; none where there is no rest.
        drawn_logs: of their probabilities.
        choice: the most likely token, the first of equals.
        surprise: −log-probability of the token that came next.
    """

    ids: Int64[Tensor, "positions kept"]
    logs: Float[Tensor, "positions kept"]
    rest: Float[Tensor, " positions"]
    drawn: Int64[Tensor, "positions drawn"]
    drawn_logs: Float[Tensor, "positions drawn"]
    choice: Int64[Tensor, " positions"]
    surprise: Float[Tensor, " positions"]

    def part(self, start: int, stop: int) -> Distributions:
        """Of some of the positions."""
        return Distributions(**{entry.name: getattr(self, entry.name)[start:stop] for entry in fields(self)})


def joined(parts: list[Distributions]) -> Distributions:
    """Positions behind each other."""
    return Distributions(
        **{
            entry.name: torch.cat([getattr(part, entry.name) for part in parts])
            for entry in fields(Distributions)
        }
    )


def shorten(
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int64[Tensor, " positions"],
    generator: torch.Generator,
) -> Distributions:
    """Keep of each position what a candidate is compared with.

    Args:
        logits: finite.
        targets: the token that came next.
        generator: draws.
    """
    rows = max(1, COMPARED_AT_ONCE // logits.shape[-1])
    return joined(
        [
            _shorten(logits[start : start + rows], targets[start : start + rows], generator)
            for start in range(0, len(logits), rows)
        ]
    )


def _shorten(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Distributions:
    logs = torch.log_softmax(logits.double(), -1)
    kept = logs.topk(min(KEPT, logs.shape[-1]), dim=-1)
    rest = (1.0 - kept.values.exp().sum(-1)).clamp(min=0.0)
    if logs.shape[-1] > KEPT:
        # What is likely is out; scaled so that the rest does not vanish in float32.
        others = logs.scatter(-1, kept.indices, -math.inf)
        weights = (others - others.max(-1, keepdim=True).values).exp().float()
        drawn = torch.multinomial(weights, DRAWN, replacement=True, generator=generator)
    else:
        drawn = torch.empty(len(logs), 0, dtype=torch.int64)
    return Distributions(
        ids=kept.indices,
        logs=kept.values.float(),
        rest=rest.float(),
        drawn=drawn,
        drawn_logs=logs.gather(-1, drawn).float(),
        choice=logits.argmax(-1),
        surprise=-logs.gather(-1, targets[:, None]).squeeze(-1).float(),
    )


def compare_with(
    answers: Distributions,
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int64[Tensor, " positions"],
) -> Positions:
    """A candidate's logits against answers to the same positions; errors of single logits are not known: NaN."""
    finite = torch.isfinite(logits)
    usable = finite.all(-1)
    logs = torch.log_softmax(logits.double().masked_fill(~finite, 0.0), -1)
    p = answers.logs.double()
    q = logs.gather(-1, answers.ids)
    divergence = (p.exp() * (p - q) + q.exp() - p.exp()).sum(-1)
    if answers.drawn.shape[-1]:
        apart = answers.drawn_logs.double() - logs.gather(-1, answers.drawn)
        divergence += answers.rest.double() * (apart + (-apart).exp() - 1.0).mean(-1)
    unknown = torch.full_like(divergence[usable], math.nan)
    return Positions(
        reference_surprise=answers.surprise.double()[usable],
        candidate_surprise=-logs.gather(-1, targets[:, None]).squeeze(-1)[usable],
        divergence=divergence.clamp(min=0.0)[usable],
        agreement=(answers.choice == logits.argmax(-1))[usable],
        squared_error=unknown,
        reference_power=unknown,
        largest_difference=unknown,
        skipped=int((~usable).sum()),
        nonfinite_reference=0,
        nonfinite_candidate=int((~finite).sum()),
    )
