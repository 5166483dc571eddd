"""Evaluations that say as much about a tiny model in a third of the time: few new tokens, no plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from compot_deploy.accuracy import reading
from compot_deploy.pipeline import texts
from compot_deploy.report.html import page
from compot_deploy.report.html.plots import plots

NEW_TOKENS, NOISE_TOKENS = texts._NEW_TOKENS, reading.NOISE_TOKENS


def _nothing_drawn(report: Any) -> Mapping[str, Any]:
    return {}


@contextmanager
def short_reports() -> Iterator[None]:
    """Continuations of 8 tokens instead of 32, numerical noise at 8 positions instead of 24, pages without plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_NEW_TOKENS", 8)
        patch.setattr(reading, "NOISE_TOKENS", 8)
        patch.setattr(page, "plots", _nothing_drawn)
        yield


@contextmanager
def whole_reports() -> Iterator[None]:
    """As users have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_NEW_TOKENS", NEW_TOKENS)
        patch.setattr(reading, "NOISE_TOKENS", NOISE_TOKENS)
        patch.setattr(page, "plots", plots)
        yield
