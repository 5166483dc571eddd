"""A compressed folder that the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest
from compressed_folders import written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hf"))
