"""One model against another: the figures over a text, and how long their greedy continuations agree."""

from __future__ import annotations

from dataclasses import dataclass

from compot_deploy.accuracy.metrics import Comparison


@dataclass(frozen=True)
class GreedyMatch:
    """How long two models continue a prompt with the same tokens.

    Attributes:
        common_prefix: tokens from the start that are the same.
        length: tokens of the longer continuation; end-of-text included, what follows it not.
        equal: the continuations are the same to the end.
    """

    common_prefix: int
    length: int
    equal: bool


@dataclass(frozen=True)
class Loss:
    """One model against another.

    Attributes:
        reference: name of the runner that is taken as right.
        candidate: name of the runner that is evaluated.
        comparison: figures over the evaluation text.
        greedy: one entry per prompt.
    """

    reference: str
    candidate: str
    comparison: Comparison
    greedy: tuple[GreedyMatch, ...]
