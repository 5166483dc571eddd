"""Laws of keys: files that people have are spelled as ever, whatever attributes are called in code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from test_report import DIAGNOSTICS, report
from test_report_html import full

from compot_deploy.accuracy.outcome import AccuracyReport
from compot_deploy.core.json_files import as_object, key_of
from compot_deploy.exporters.artifact import write_manifest
from compot_deploy.exporters.manifest import MANIFEST, Manifest, read_manifest
from compot_deploy.report.document import Report
from compot_deploy.report.facts import Frontier, LayerFigures
from compot_deploy.report.json import from_json, to_json


def test_a_report_has_the_keys_of_its_first_version_and_is_read_by_them() -> None:
    made = dataclasses.replace(full(), diagnostics=DIAGNOSTICS[1:])
    written = json.loads(to_json(made))
    assert {"findings", "facts"} <= set(written) and not {"diagnostics", "notes"} & set(written)
    assert {"export_exact", "export_shipped"} <= set(written["accuracy"])
    assert all("effect" in layer and "sensitivity" not in layer for layer in written["layers"])
    assert "all_forms" in written["frontier"]
    assert from_json(json.dumps(written)) == made
    written["facts"] = ["something else"]
    assert from_json(json.dumps(written)).notes == ("something else",)


def test_a_manifest_keeps_what_a_run_recorded_under_its_first_key(tmp_path: Path) -> None:
    made = Manifest(1, "onnx", "0", "llama", False, {}, None, 3, {"source": "ab"}, {}, (), ())
    write_manifest(tmp_path, made)
    written = json.loads((tmp_path / MANIFEST).read_text())
    assert written["facts"] == {"source": "ab"} and "metadata" not in written
    assert read_manifest(tmp_path).metadata == {"source": "ab"}


def test_every_key_that_differs_belongs_to_an_attribute() -> None:
    for kind, keys in (
        (AccuracyReport, {"export_exact", "export_shipped"}),
        (Frontier, {"all_forms"}),
        (LayerFigures, {"effect"}),
        (Manifest, {"facts"}),
        (Report, {"findings", "facts"}),
    ):
        names = [entry.name for entry in dataclasses.fields(kind)]
        found = [key_of(kind, name) for name in names]
        assert len(set(found)) == len(names), "no two attributes share a key"
        assert set(found) - set(names) == keys


def test_a_class_without_other_spellings_keeps_its_attributes() -> None:
    sizes = report().sizes
    assert as_object(sizes) == dataclasses.asdict(sizes)
