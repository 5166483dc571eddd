"""Laws of the gate: every limit is evaluated, growth is measured from the baseline, bad input is one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import report
from test_report_html import full

from compot_deploy import cli
from compot_deploy.accuracy.gate import LOSS_LIMITS
from compot_deploy.accuracy.metrics import METRICS_VERSION, Estimate
from compot_deploy.errors import EXIT_BAD_INPUT, InputError
from compot_deploy.report.document import Report, verdict
from compot_deploy.report.gate import (
    BYTE_LIMITS,
    GROWING,
    GateRequirements,
    gate_from_mapping,
    parse_growth,
    read_baseline,
    read_gate,
)
from compot_deploy.report.json import to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.summary import to_summary

ROOT = Path(__file__).parents[2]
SIZES = {
    "max_bytes": 5_250_001,
    "max_weight_bytes": 4_200_002,
    "max_transport_bytes": 4_900_006,
    "max_memory_bytes": 4_600_007,
}


def with_kl(made: Report, kl: float, noise: float = 1e-12) -> Report:
    def at(loss: Any, mean: float) -> Any:
        divergence = replace(loss.comparison.divergence, mean=Estimate(mean, mean / 50))
        return replace(loss, comparison=replace(loss.comparison, divergence=divergence))

    accuracy = made.accuracy
    return replace(
        made, accuracy=replace(accuracy, total=at(accuracy.total, kl), noise=at(accuracy.noise, noise))
    )


def results(made: Report) -> dict[str, bool]:
    return {one.name: one.passed for one in made.accuracy.gate.criteria}


# Limits


def test_every_limit_on_bytes_is_tried() -> None:
    assert set(SIZES) == set(BYTE_LIMITS)


@pytest.mark.parametrize("key", SIZES)
def test_a_limit_on_bytes_holds_at_the_size_and_fails_one_below(key: str) -> None:
    made = full()
    size = SIZES[key]
    assert size in (made.sizes.artifact, made.sizes.weights, made.sizes.memory, made.sizes.transport)
    for limit, passed in ((size, True), (size - 1, False)):
        evaluated = GateRequirements(gate_from_mapping({key: limit}, "gate.toml")).apply(made)
        assert results(evaluated)[key] is passed
        assert evaluated.passed is evaluated.accuracy.gate.passed is passed
        assert f"{size:,}" in next(
            one.sentence for one in evaluated.accuracy.gate.criteria if one.name == key
        )
        assert 'name="' + key in to_junit(evaluated)
        assert key.replace("_", "\\_") in to_summary(evaluated, GateRequirements())
        assert results(made) == {k: v for k, v in results(evaluated).items() if k != key}


def test_a_size_that_was_not_measured_fails_its_limit() -> None:
    made = report()
    assert made.sizes.memory is None
    evaluated = GateRequirements(gate_from_mapping({"max_memory_bytes": "1GB"}, "gate.toml")).apply(made)
    assert not evaluated.passed and results(evaluated)["max_memory_bytes"] is False


def test_without_requirements_nothing_changes() -> None:
    assert GateRequirements().apply(full()) == full()


def test_the_example_is_a_gate_with_every_kind_of_key() -> None:
    gate = read_gate(ROOT / "examples" / "ci" / "gate.toml")
    others = {
        "min_cosine",
        "max_wer_increase",
        "min_recovery",
    }  # of other models, and of tasks, which take an extra
    assert set(gate.losses) == set(LOSS_LIMITS) - others, "of a decoder"
    assert gate.sizes == {"max_bytes": 1_500_000} and gate.growth == {"kl": 0.1, "bytes": 0.02}
    documented = (ROOT / "docs" / "ci-gate.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in documented for key in (*LOSS_LIMITS, *BYTE_LIMITS, *GROWING))


# Growth


def test_a_report_does_not_outgrow_itself() -> None:
    made, keys = full(), set(GROWING) - {"cosine_distance"}
    evaluated = GateRequirements(gate_from_mapping({"regression": dict.fromkeys(keys, 0)}, "g"), made).apply(
        made
    )
    assert evaluated.passed
    assert {f"{key}_growth" for key in keys} <= set(results(evaluated))


@pytest.mark.parametrize(
    ("kl", "growth", "passed"),
    [(0.22, "10%", True), (0.2201, "10%", False), (0.1, 0, True), (0.21, 0, False)],
)
def test_kl_may_grow_as_far_as_is_allowed(kl: float, growth: Any, passed: bool) -> None:
    requirements = GateRequirements(
        gate_from_mapping({"regression": {"kl": growth}}, "g"), with_kl(full(), 0.2)
    )
    evaluated = requirements.apply(with_kl(full(), kl))
    assert results(evaluated)["kl_growth"] is evaluated.passed is passed
    assert "0.2 in the baseline" in verdict(evaluated) or passed
    assert "bytes_growth" not in results(evaluated)


def test_bytes_may_grow_as_far_as_is_allowed() -> None:
    base = full()
    for more, passed in ((105_000, True), (105_001, False)):
        grown = replace(base, sizes=replace(base.sizes, artifact=base.sizes.artifact + more))
        evaluated = GateRequirements(baseline=base).apply(grown)
        assert results(evaluated)["bytes_growth"] is passed
        assert results(evaluated)["kl_growth"]


def test_growth_below_the_numerical_noise_is_no_growth() -> None:
    base, now = with_kl(full(), 1e-13, 1e-12), with_kl(full(), 9e-13, 1e-12)
    assert GateRequirements(baseline=base).apply(now).passed
    assert not GateRequirements(baseline=base).apply(with_kl(full(), 9e-12, 1e-12)).passed


def test_what_cannot_be_measured_has_outgrown_the_baseline() -> None:
    assert not GateRequirements(baseline=full()).apply(with_kl(full(), math.nan)).passed


def test_one_growth_for_both_unless_the_file_names_it() -> None:
    gate = gate_from_mapping({"regression": {"bytes": "3%"}}, "g")
    assert GateRequirements(gate, full(), max_growth=0.5).growth == {"kl": 0.5, "bytes": 0.03}
    assert GateRequirements(gate, full()).growth == {"bytes": 0.03}
    assert GateRequirements(baseline=full()).growth == {"kl": 0.1, "bytes": 0.02}


@pytest.mark.parametrize(
    ("value", "growth"),
    [("10%", 0.1), (" 2.5 % ", 0.025), ("0.1", 0.1), (0.1, 0.1), (0, 0.0), (".5%", 0.005)],
)
def test_a_growth_is_a_fraction_or_per_cent(value: Any, growth: float) -> None:
    assert parse_growth(value, "here") == pytest.approx(growth)


# Summary


def test_the_summary_says_verdict_change_and_tables() -> None:
    requirements = GateRequirements(baseline=with_kl(full(), 0.2))
    text = to_summary(requirements.apply(with_kl(full(), 0.3)), requirements)
    assert text.startswith("## compot-deploy: `tiny-int4-onnx` ❌ failed\n")
    assert "| KL divergence, mean \\[nats\\] | 0.2000 ± 0.0040 | 0.3000 ± 0.0060 | +50.00 % |" in text
    assert text.index("Against the baseline") < text.index("### Gate") < text.index("### Accuracy")
    assert "Against" not in to_summary(full(), GateRequirements()) and "✅ passed" in to_summary(
        full(), GateRequirements()
    )


def test_a_summary_stays_below_what_is_shown() -> None:
    made = full()
    one = replace(made.accuracy.continuations[0], exported="x" * 2_000_000)
    long = replace(made, accuracy=replace(made.accuracy, continuations=(one,)))
    text = to_summary(long, GateRequirements())
    assert len(text.encode()) < 2**20 and "### Gate" in text


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_kk": 1}, r"unknown key 'max_kk'. Known keys: max_perplexity_ratio, max_kl, .*\[regression\]"),
        ({"max_kl": "0.1"}, r"max_kl = '0.1' is not a number"),
        ({"max_kl": True}, r"max_kl = True is not a number"),
        ({"max_kl": -1}, r"max_kl = -1: a limit is a number from 0 on"),
        ({"max_bytes": "much"}, r"max_bytes = 'much' is not a size"),
        ({"max_bytes": 1.5}, r"max_bytes = 1.5 is not a size"),
        ({"regression": 3}, r"regression = 3 is not a table"),
        (
            {"regression": {"kll": "1%"}},
            r"unknown key 'kll' in \[regression\]. Known keys: kl, perplexity_ratio",
        ),
        ({"regression": {"kl": "ten"}}, r"regression.kl = 'ten' is not a growth"),
        ({"regression": {"kl": -0.1}}, r"regression.kl = -0.1 is not a growth"),
        ({"regression": {"kl": math.nan}}, r"regression.kl = nan is not a growth"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gate_from_mapping(values, "gate.toml")


def changed(**values: Any) -> str:
    document = json.loads(to_json(full()))
    document["accuracy"] |= values
    return json.dumps(document)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["--gate", "gate.toml"], "The gate file gate.toml does not exist."),
        ({"gate.toml": "max_kl ="}, ["--gate", "gate.toml"], "The gate file gate.toml cannot be read"),
        (
            {"gate.toml": "max_kl = 1\nfoo = 2"},
            ["--gate", "gate.toml"],
            "gate.toml: unknown key 'foo'. Known",
        ),
        ({"gate.toml": "[regression]\nkl = 0"}, ["--gate", "gate.toml"], "there is nothing to grow from"),
        ({}, ["--max-growth", "5%"], "--max-growth limits growth over a baseline"),
        (
            {"b.json": "x"},
            ["--baseline", "b.json", "--max-growth", "5x"],
            "The baseline b.json cannot be read",
        ),
        ({"b.json": changed()}, ["--baseline", "b.json", "--max-growth", "5x"], "--max-growth = '5x' is not"),
        ({}, ["--baseline", "b.json"], "The baseline b.json does not exist"),
        (
            {"b.json": changed(metrics_version=METRICS_VERSION + 1)},
            ["--baseline", "b.json"],
            f"The baseline b.json has the metrics version {METRICS_VERSION + 1}; this compot-deploy knows version",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(
    files: dict[str, str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_text(text)
    assert cli.main(["check", "no-such-folder", *arguments]) == EXIT_BAD_INPUT
    complaint = " ".join(capsys.readouterr().err.split())
    assert message in complaint and "Traceback" not in complaint


def test_a_baseline_on_other_text_or_without_the_original_is_refused() -> None:
    made = full()
    other = replace(
        made, accuracy=replace(made.accuracy, evaluation=replace(made.accuracy.evaluation, digest="ef" * 32))
    )
    with pytest.raises(InputError, match=r"old.json was measured on other text .*abababababab"):
        GateRequirements(baseline=made, baseline_name="old.json").check_text("ef" * 32, "mine.txt")
    with pytest.raises(InputError, match=r"measured on other text"):
        GateRequirements(baseline=made).apply(other)
    with pytest.raises(InputError, match=r"no total loss to compare with \(the original was not given\)"):
        GateRequirements(baseline=report(reference=False)).apply(made)
    with pytest.raises(InputError, match=r"Give the original model with --reference"):
        GateRequirements(baseline=made).apply(report(reference=False))
    # Bytes compare whatever was read.
    gate = gate_from_mapping({"regression": {"bytes": 0}}, "g")
    assert GateRequirements(gate, other).apply(made).passed


def test_a_folder_stands_for_the_report_in_it(tmp_path: Path) -> None:
    (tmp_path / "compot").mkdir()
    (tmp_path / "compot" / "report.json").write_text(to_json(full()), encoding="utf-8")
    assert read_baseline(tmp_path) == read_baseline(tmp_path / "compot" / "report.json")
