"""Law of the gate: however an export is spoilt, it fails, with the original and with a reference file in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import spoils
from spoils import LIMITS, SPOILS

from compot_deploy import check

SHOWN = (
    "two matrices of equal shape have changed places",
    "two words of the vocabulary have changed places",
    "the folder allows itself everything, and its matrices are wrong",
    "a pickle lies there unlisted",
)
"""One of each kind; the others are nightly."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    return spoils.prepare(tmp_path_factory.mktemp("spoils"))


@pytest.mark.slow
def test_the_unspoilt_export_passes_both_ways(root: Path) -> None:
    for reference in spoils.references(root).values():
        assert check(root / "out", reference=reference, limits=LIMITS, strict=True).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in SHOWN else [pytest.mark.nightly]) for what in SPOILS]
)
def test_a_spoilt_export_fails(what: str, root: Path) -> None:
    assert list(spoils.fooled(root, what, list(SPOILS).index(what))) == []


def test_there_are_many_ways() -> None:
    assert len(SPOILS) >= 40 and set(SHOWN) <= set(SPOILS)
