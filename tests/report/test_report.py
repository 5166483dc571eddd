from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from xml.etree import ElementTree

import pytest

from compot_deploy.accuracy.gate import Criterion, GateResult
from compot_deploy.accuracy.harness import TaskFigures
from compot_deploy.accuracy.losses import GreedyMatch, Loss
from compot_deploy.accuracy.metrics import KL_EDGES, METRICS_VERSION, Comparison, Divergence, Estimate
from compot_deploy.accuracy.outcome import AccuracyReport, Continuation, EvaluationMetadata
from compot_deploy.core.diagnostics import Diagnostic, errors
from compot_deploy.core.json_files import key_of
from compot_deploy.errors import InputError
from compot_deploy.report.document import SCHEMA_VERSION, Report, Sizes, verdict
from compot_deploy.report.figures import ABSENT
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import from_json, to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.markdown import to_markdown
from compot_deploy.report.tables import Table, gate_table, loss_table, size_table, tables


def comparison(scale: float = 1.0) -> Comparison:
    divergence = Divergence(
        Estimate(0.0123 * scale, 0.0004), 0.011, 0.02, 0.05, 0.2, tuple(range(len(KL_EDGES) + 1))
    )
    return Comparison(
        4000,
        0,
        0,
        0,
        Estimate(12.3456, 0.21),
        Estimate(12.9, 0.22),
        Estimate(1.0449, 0.0031),
        divergence,
        Estimate(0.9412, 0.0037),
        3.3e-3 * scale,
        1.5,
    )


def loss(first: str, second: str, scale: float = 1.0) -> Loss:
    return Loss(first, second, comparison(scale), (GreedyMatch(5, 12, False), GreedyMatch(12, 12, True)))


def report(passed: bool = True, reference: bool = True, diagnostics: tuple[Diagnostic, ...] = ()) -> Report:
    criteria = (
        Criterion("nonfinite_logits", 0.0, 0.0, "at most", True, "no bad logits"),
        Criterion("max_kl", 0.0123, 0.02 if passed else 0.01, "at most", passed, "mean <KL> & more: 0.0123"),
    )
    accuracy = AccuracyReport(
        METRICS_VERSION,
        EvaluationMetadata(
            "held-out.txt", "ab" * 32, 16, 4096, 4080, 1, 12, ("fewer windows than asked for",)
        ),
        loss("original", "dequantized") if reference else None,
        loss("dequantized", "exact", 1e-10),
        loss("dequantized", "deployed"),
        loss("original", "deployed") if reference else None,
        replace(loss("original", "original, token by token", 1e-12), greedy=()),
        None if reference else "the original was not given",
        (Continuation("Once | upon", "a time" if reference else None, "a *time*", "a\ntime", "a <time>"),),
        GateResult(criteria, passed),
    )
    return Report(
        model="tiny",
        artifact="tiny-int4-onnx",
        format="onnx",
        package="0.1.0",
        created="2026-01-02T03:04:05Z",
        sizes=Sizes(5_250_000, 4_200_000, 4_500_000, 8_000_000, 15_000_000),
        accuracy=accuracy,
        diagnostics=diagnostics,
        notes=("model.layers.0.self_attn.k_proj stayed dense",),
        recipe={"quant": "int4", "ratio": 0.2, "format": ("onnx",), "max_kl": None},
        versions={"torch": "2.13.0"},
    )


NASTY = Diagnostic("error", "onnx/model.onnx: a\x00b", "bad \x1b <node> & \ud800 \"quote\" ]]> 'x' |")
DIAGNOSTICS = (
    NASTY,
    Diagnostic("warning", "genai_config.json", "slow"),
    Diagnostic("note", "k_proj", "stayed dense"),
)


# JSON


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("reference", [True, False])
def test_json_round_trip(passed: bool, reference: bool) -> None:
    original = report(passed, reference, DIAGNOSTICS[1:])
    text = to_json(original)
    assert from_json(text) == original
    assert to_json(from_json(text)) == text
    assert json.loads(text)["passed"] is passed


def test_values_that_json_does_not_know_become_null_and_their_counts_stay() -> None:
    made = report()
    broken = replace(
        made.accuracy.export_reference.comparison,
        nmse=math.nan,
        perplexity_ratio=Estimate(math.inf, math.inf),
        nonfinite_candidate=77,
        skipped=3,
    )
    made = replace(
        made,
        accuracy=replace(
            made.accuracy, export_reference=replace(made.accuracy.export_reference, comparison=broken)
        ),
    )
    text = to_json(made)
    assert "NaN" not in text and "Infinity" not in text
    written = json.loads(text)["accuracy"]["export_exact"]["comparison"]
    assert written["nmse"] is None and written["perplexity_ratio"]["value"] is None
    assert written["nonfinite_candidate"] == 77 and written["skipped"] == 3
    read = from_json(text).accuracy.export_reference.comparison
    assert math.isnan(read.nmse) and math.isnan(read.perplexity_ratio.value)
    assert read.nonfinite_candidate == 77


def test_any_text_of_a_model_can_be_written() -> None:
    made = report()
    text = Continuation("\x00\x1b", None, "naïve ☃ 🦊", "half \ud800", "\u2028\n")
    made = replace(made, accuracy=replace(made.accuracy, continuations=(text,)))
    written = from_json(to_json(made).encode("utf-8").decode("utf-8")).accuracy.continuations[0]
    assert written == replace(text, exact="half ?")


def test_tasks_are_read_back_and_stand_in_a_table_of_their_own() -> None:
    known = TaskFigures("own", "acc", 200, Estimate(0.4, 0.03), Estimate(0.5, 0.03), Estimate(0.8, 0.012))
    unknown = TaskFigures("alone", "acc", 200, Estimate(0.4, 0.03))
    made = replace(report(), tasks=(known, unknown))
    assert from_json(to_json(made)) == made
    (table,) = [table for table in tables(made) if table.title == "Tasks"]
    assert [row[-1] for row in table.rows] == ["80.0% ± 1.2%", ABSENT]
    assert "80.0% ± 1.2%" in to_markdown(made) and "80.0% ± 1.2%" in to_html(made)
    assert not [table for table in tables(report()) if table.title == "Tasks"]


def test_a_newer_minor_field_is_ignored() -> None:
    document = json.loads(to_json(report()))
    document["a_field_of_tomorrow"] = document["sizes"]["another"] = 1
    assert from_json(json.dumps(document)) == report()


def change(path: str, value: Any) -> str:
    document = json.loads(to_json(report(diagnostics=DIAGNOSTICS[1:])))
    *parents, last = path.split("/")
    place = document
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("sizes/weights", ..., r"old.json: sizes.weights is missing"),
        ("sizes/weights", 1.5, r"old.json: sizes.weights is 1.5, not a whole number"),
        ("sizes/weights", True, r"sizes.weights is true, not a whole number"),
        ("sizes/weights", None, r"sizes.weights is null, not a whole number"),
        ("sizes", [1], r"sizes is \[1\], not an object"),
        ("accuracy/gate/passed", 1, r"accuracy.gate.passed is 1, not true or false"),
        ("accuracy/export_exact", None, r"accuracy.export_exact is null, not an object"),
        ("accuracy/total/comparison/nmse", "x", r"accuracy.total.comparison.nmse is \"x\", not a number"),
        ("accuracy/gate/criteria", {}, r"accuracy.gate.criteria is \{\}, not a list"),
        (
            "accuracy/gate/criteria/1/relation",
            "above",
            r"criteria\[1\].relation is \"above\", not one of at most",
        ),
        (
            "findings/0/severity",
            "fatal",
            r"findings\[0\].severity is \"fatal\", not one of error, warning, note",
        ),
        (
            "schema_version",
            SCHEMA_VERSION + 1,
            r"has the schema version 2; this compot-deploy knows version 1",
        ),
        ("accuracy/metrics_version", 0, r"has the metrics version 0"),
        ("accuracy", 3, r"has the metrics version None"),
    ],
)
def test_a_damaged_report_is_refused_with_the_place(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json(change(path, value), "old.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"report"'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"report.json"):
        from_json(text)


def all_fields(kind: Any) -> set[str]:
    names: set[str] = set()
    if dataclasses.is_dataclass(kind):
        for entry in dataclasses.fields(kind):
            names |= {key_of(kind, entry.name)} | all_fields(get_type_hints(kind)[entry.name])
    elif get_origin(kind) is not None:
        for argument in get_args(kind):
            names |= all_fields(argument)
    return names


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report-schema.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", text))
    fields = all_fields(Report)
    assert {"schema_version", "histogram", "reference_absent", "severity"} <= fields
    assert fields <= documented


# The verdict


def test_a_lint_error_fails_the_report_and_a_warning_does_not() -> None:
    assert report().passed and report(diagnostics=DIAGNOSTICS[1:]).passed
    assert not report(diagnostics=DIAGNOSTICS).passed and not report(passed=False).passed
    assert errors(DIAGNOSTICS) == (NASTY,)


def test_the_verdict_names_every_failure() -> None:
    assert verdict(report()).startswith("PASSED")
    text = verdict(report(passed=False, diagnostics=DIAGNOSTICS))
    assert text.startswith("FAILED: mean <KL> & more: 0.0123; onnx/model.onnx")


def test_a_diagnostic_of_unknown_severity_is_refused() -> None:
    with pytest.raises(Exception, match=r"severity|diagnostic"):
        Diagnostic("fatal", "here", "it broke")  # type: ignore[arg-type]


# JUnit


@pytest.mark.parametrize("passed", [True, False])
def test_junit_is_well_formed_and_counts_right(passed: bool) -> None:
    made = replace(report(passed, diagnostics=DIAGNOSTICS), artifact='<a> & "b" \x00')
    text = to_junit(made)
    suite = ElementTree.fromstring(text.encode("utf-8")).find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    assert len(cases) == int(suite.attrib["tests"]) == 5
    failures = suite.findall("testcase/failure")
    assert len(failures) == int(suite.attrib["failures"]) == (1 if passed else 2)
    by_name = {case.attrib["name"]: case for case in cases}
    assert set(by_name) >= {"nonfinite_logits", "max_kl", "genai_config.json", "k_proj"}
    assert (by_name["max_kl"].find("failure") is None) is passed
    lint = failures[-1]
    assert (
        lint.attrib["type"] == "lint" and "<node> &" in lint.attrib["message"] and "]]>" in (lint.text or "")
    )
    assert "\\x00" in suite.attrib["name"]


def test_junit_of_a_clean_report_has_no_failure() -> None:
    root = ElementTree.fromstring(to_junit(report()).encode())
    assert root.find(".//failure") is None and len(root.findall(".//testcase")) == 2


# Tables


def rows(table: Table) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_sizes_stand_beside_plain_int4_and_fp16() -> None:
    table = rows(size_table(report()))
    assert table["artifact, weights"] == ("4.2 MB", "4,200,000", "100.0 %")
    assert table["plain int4, weights"] == ("4.5 MB", "4,500,000", "93.3 %")
    assert table["fp16, weights"] == ("15 MB", "15,000,000", "28.0 %")
    assert "loaded, tensors of the weights" not in table
    assert size_table(report()).notes == report().notes


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (2_345_678_901, "2.35 GB"),
    ],
)
def test_sizes_are_in_decimal_units(count: int, text: str) -> None:
    made = replace(report(), sizes=replace(report().sizes, artifact=count))
    assert rows(size_table(made))["artifact, all files"][0] == text


def test_the_three_losses_stand_side_by_side() -> None:
    table = loss_table(report())
    assert table.columns[1:] == ("method", "export, float32", "export, deployed", "total", "numerical noise")
    cells = rows(table)
    assert cells["perplexity ratio"][0] == "1.0449 ± 0.0031"
    assert cells["perplexity, from"][0] == "12.35 ± 0.21"
    assert cells["logit NMSE"][:2] == ("0.0033", "3.3e-13")
    assert cells["same top token"][0] == "94.12 ± 0.37 %"
    assert cells["same greedy tokens"] == ("17/24, 1 of 2 texts",) * 4 + (ABSENT,)


@pytest.mark.parametrize(
    "value, error, text",
    [
        (12.3456, 0.21, "12.35 ± 0.21"),
        (1234.5, 56.7, "1234 ± 57"),
        (1.0, 0.0, "1 ± 0"),
        (0.99999999, 2.3e-8, "1 ± 2e-08"),
        (6.64e-13, 4.9e-14, "6.64e-13 ± 4.9e-14"),
        (0.01234567, 0.0000042, "0.0123457 ± 0.0000042"),
        (3.25, math.nan, "3.25"),
        (math.nan, math.nan, ABSENT),
    ],
)
def test_a_figure_shows_the_digits_that_its_error_justifies(value: float, error: float, text: str) -> None:
    made = report()
    figures = replace(comparison(), perplexity_ratio=Estimate(value, error))
    made = replace(made, accuracy=replace(made.accuracy, method=replace(loss("a", "b"), comparison=figures)))
    assert rows(loss_table(made))["perplexity ratio"][0] == text


def test_losses_that_were_not_measured_are_absent_and_the_reason_is_given() -> None:
    table = loss_table(report(reference=False))
    assert all(row[1] == row[4] == ABSENT for row in table.rows)
    assert "No method and total loss: the original was not given." in table.notes


def test_values_that_could_not_be_measured_are_shown_as_absent() -> None:
    made = report()
    nothing = replace(comparison(), nmse=math.nan, top1_agreement=Estimate(math.nan, math.nan))
    shipped = replace(made.accuracy.export_deployed, comparison=nothing)
    cells = rows(loss_table(replace(made, accuracy=replace(made.accuracy, export_deployed=shipped))))
    assert cells["logit NMSE"][2] == cells["same top token"][2] == ABSENT


def test_the_gate_table_shows_limits() -> None:
    assert rows(gate_table(report(False)))["max_kl"] == ("0.0123", "at most 0.01", "FAILED")


def test_text_of_a_model_cannot_drive_a_terminal() -> None:
    made = report(diagnostics=DIAGNOSTICS)
    text = Continuation("say \x1b[2J", None, "a\x07\x9b", "\ufffe\ud800", "naïve ☃ 🦊\n\tline")
    made = replace(made, accuracy=replace(made.accuracy, continuations=(text,)))
    cells = [cell for table in tables(made) for row in table.rows for cell in row]
    assert "naïve ☃ 🦊\n\tline" in cells and "say \\x1b[2J" in cells and "a\\x07\\x9b" in cells
    assert not any(character in cell for cell in cells for character in "\x00\x07\x1b\x9b\ufffe\ud800")


def test_a_table_with_ragged_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="every row needs 2"):
        Table("t", ("a", "b"), (("1",),))


def test_markdown_tables_keep_their_shape_whatever_the_text() -> None:
    text = to_markdown(report(passed=False, diagnostics=DIAGNOSTICS))
    blocks = re.split(r"^### .*\n", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(tables(report(diagnostics=DIAGNOSTICS))) == 5
    for block in blocks:
        lines = [line for line in block.splitlines() if line.startswith("|")]
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(cells) == 1 and len(lines) >= 3
    assert "<time>" not in text.replace("\\<time\\>", "") and "\x00" not in text
    assert text.startswith("**FAILED")
