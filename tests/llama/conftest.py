"""Folders of tiny models that the tests of llama.cpp export."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(root / kind, kind) for kind in tiny.KINDS}
