"""Here evaluations and reports are what users have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from short import whole_reports


@pytest.fixture(scope="module", autouse=True)
def _whole_reports() -> Iterator[None]:
    with whole_reports():
        yield
