"""How many steps take no longer than the rest of a run: counted in products, so that it is the same on every machine.

On a decoder of 106 million weights in its linears, calibration on 32,768 tokens took 235 of 781 processor seconds of a
planned run, and making, tables and check of a plain one another 330: products are what takes time there. A step takes a
fifth longer than its products would, so the factors below are as much smaller than those figures say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from compot_deploy.healing.texts import TOKENS_PER_STEP, Texts, tokens_of
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Batch

PLANNED: Final = 2.6
"""What a planned run takes, in times of its calibration."""

UNPLANNED: Final = 1.9
"""The same without a plan."""

EVERY: Final = 10
"""Steps between two looks at the held-out text; a look takes as long as half a step."""

LEAST: Final = 10
"""Fewer steps are not worth a look at the held-out text."""

_PER_WEIGHT: Final = 8
"""Operations of a step for each weight and token: forwards 2, once more 2, and 4 for gradients at both factors."""

_PER_TABLE_WEIGHT: Final = 6
"""Of the head: forwards, the original's, and gradients at its input."""


def affordable_steps(source: ModelSource, texts: Texts, planned: bool) -> int:
    """Steps that take no longer than the rest of a run; 0 for so few that they would be of no use."""
    tokens = _tokens(texts.batches)
    weights = sum(math.prod(site.shape) for site in source.layout.sites)
    head = 0 if source.layout.head is None else math.prod(source.shape(source.layout.head))
    grams = sum(group.sites[0].inputs ** 2 for group in source.layout.groups)
    calibration = tokens * (2 * weights + grams)
    rest = calibration * (PLANNED if planned else UNPLANNED)
    # What a head reads is known from calibration; outputs of a model without one are asked for.
    asked = tokens * 2 * weights if source.layout.head is None else 0
    per_token = _PER_WEIGHT * weights + _PER_TABLE_WEIGHT * head
    held_out = _tokens(texts.batches[texts.learned :]) * (2 * weights + 4 * head) / EVERY
    steps = int((rest - asked) / (TOKENS_PER_STEP * per_token + held_out))
    return steps if steps >= LEAST else 0


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(map(tokens_of, batches))
