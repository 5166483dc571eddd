"""The benchmark of architectures: what it counts as a failure, and some of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import Row, rows, table
from cases import nightly
from tiny_architectures import KINDS


def test_what_differs_or_was_not_measured_has_failed_and_what_was_refused_has_not() -> None:
    found = [
        Row("right", "onnx", "passed", 1e-6, False, 1.0),
        Row("different", "onnx", "passed", 2e-4, False, 1.0),
        Row("nan", "onnx", "passed", float("nan"), False, 1.0),
        Row("stopped", "onnx", "an error", None, False, 1.0),
        Row("refused", "onnx", "no way", None, True, 1.0),
    ]
    assert [row.kind for row in found if row.failed] == ["different", "nan", "stopped"]
    text = table(found)
    assert text.endswith("1 types in some format, 3 failures.\n") and "refused: no way" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly("qwen2_moe", "qwen3_5_text", "lfm2", "modernbert", "deberta-v2"))
def test_an_architecture_is_planned_exported_and_checked(kind: str, tmp_path: Path) -> None:
    assert len(KINDS) >= 45
    (row,) = rows(kind, ["onnx"], 2.5, tmp_path)
    assert not row.failed and not row.refused, row
