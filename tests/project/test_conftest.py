"""Laws of the tests themselves: whose warnings are errors, and what a long test has to say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LONG = """
import time
import pytest

def compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_long(): compute(0.3)
@pytest.mark.slow
def test_long_and_marked(): compute(0.3)
def test_waits_without_computing(): time.sleep(0.3)
def test_short(): pass
"""


def test_a_long_test_without_its_mark_fails_the_run(tmp_path: Path) -> None:
    text = (TESTS / "conftest.py").read_text(encoding="utf-8")
    assert "\nLONGEST = 10.0\n" in text
    assert "\nSLACK = 6.0\n" in text
    (tmp_path / "conftest.py").write_text(
        text.replace("LONGEST = 10.0", "LONGEST = 0.2").replace("SLACK = 6.0", "SLACK = 1.0"),
        encoding="utf-8",
    )
    shutil.copy(TESTS / "support" / "shapes.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "test_long.py").write_text(LONG)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ)
    )
    assert done.returncode == 1 and "1 failed, 3 passed" in done.stdout, done.stdout
    assert re.search(r"test_long took 0\.\d s, more than 0\.2 s .*Make it smaller, or mark it", done.stdout)


def _filtered(kind: type[Warning], module: str) -> bool:
    """Whether a warning of a module is an error under the filters of this run."""
    with warnings.catch_warnings(record=True):
        try:
            warnings.warn_explicit("planted", kind, "planted.py", 1, module=module)
        except kind:
            return True
    return False


def test_our_own_warnings_are_errors_and_deprecations_of_others_are_not(
    request: pytest.FixtureRequest,
) -> None:
    own = ["compot_deploy.core.grid", *sorted(path.stem for path in TESTS.rglob("*.py"))]
    for kind in (UserWarning, RuntimeWarning, SyntaxWarning):
        assert [module for module in own if not _filtered(kind, module)] == []
    if "error" in (request.config.getoption("pythonwarnings") or []):
        return  # `make newest`: everything is one
    for module in ("transformers.utils.deprecation", "torch.nn.modules.module"):
        for kind in (UserWarning, RuntimeWarning, FutureWarning, DeprecationWarning):
            assert not _filtered(kind, module)
    # A call of ours that somebody deprecated is counted as ours, and is no error either.
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        assert not _filtered(kind, "compot_deploy.core.grid")
