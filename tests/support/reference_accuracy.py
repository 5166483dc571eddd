"""Slow, obvious versions of the accuracy figures: one position, one vocabulary entry at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def kl(reference: Sequence[float], candidate: Sequence[float]) -> float:
    p, q = softmax(reference), softmax(candidate)
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def surprise(logits: Sequence[float], target: int) -> float:
    return -math.log(softmax(logits)[target])


def nmse(reference: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> float:
    error = power = 0.0
    for r, c in zip(reference, candidate, strict=True):
        mean = math.fsum(r) / len(r)
        error += math.fsum((b - a) ** 2 for a, b in zip(r, c, strict=True))
        power += math.fsum((a - mean) ** 2 for a in r)
    return error / power
