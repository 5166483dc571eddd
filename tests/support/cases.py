"""Cases of a law that run every night only, because others show it already and each takes long."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def nightly(*values: Any) -> list[Any]:
    """Each value as a case of its own, marked."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


def pairs_by_day(first: Sequence[str], second: Sequence[str], by_day: Sequence[tuple[str, str]]) -> list[Any]:
    """Each pair of values as a case of its own; all but some are nightly."""
    pairs = itertools.product(first, second)
    return [pair if pair in by_day else pytest.param(*pair, marks=pytest.mark.nightly) for pair in pairs]


BY_DAY = ("llama", "qwen3", "mistral", "gpt2", "gemma3", "bert", "distilbert", "gpt2 classes")
"""Of tiny models: one with each way to rotate, to normalize, to mask, to store matrices and to be read."""


def some_by_day(kinds: Sequence[str]) -> list[Any]:
    """Each kind as a case of its own; those that others stand for are nightly."""
    return [kind if kind in BY_DAY else nightly(kind)[0] for kind in kinds]
