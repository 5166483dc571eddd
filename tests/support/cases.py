"""Cases of a law that run every night only, because others show it already and each takes long."""

from __future__ import annotations

from typing import Any

import pytest


def nightly(*values: Any) -> list[Any]:
    """Each value as a case of its own, marked."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]
