"""Law of interruptions: a run that was killed goes on, and gives the bytes that an undisturbed one gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    import kills

    assert kills.attack(tiny.save(tmp_path / "model", num_hidden_layers=1), tmp_path, moments=3, seed=1) == []
