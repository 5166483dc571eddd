"""Tiny models of kinds that no exporter knows by name, and what the command line makes of them, once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from places import Exported, Place, few_schemes
from texts import write_lines


@pytest.fixture
def few() -> Iterator[None]:
    """So that a plan takes seconds."""
    with few_schemes():
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root: Path = tmp_path_factory.mktemp("place")
    write_lines(root / "text.txt")
    return Place(root)


@pytest.fixture(scope="session")
def exported(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(place, tmp_path_factory.mktemp("exported"))
