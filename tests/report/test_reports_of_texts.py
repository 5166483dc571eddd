"""Laws of reports on models that read whole texts: what they do not have is not shown, what they have is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import report
from test_report_html import Page, full

from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import KL_EDGES, Comparison, Divergence, Estimate
from compot_deploy.errors import InputError
from compot_deploy.report.document import Report
from compot_deploy.report.gate import GateRequirements, gate_from_mapping
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import from_json, to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.markdown import to_markdown
from compot_deploy.report.summary import baseline_table, to_summary
from compot_deploy.report.tables import loss_table

NO_TEXT: dict[str, Any] = {
    "positions": 20,
    "skipped": 0,
    "nonfinite_reference": 0,
    "nonfinite_candidate": 0,
    "reference_perplexity": None,
    "candidate_perplexity": None,
    "perplexity_ratio": None,
    "nmse": 0.0123,
    "largest_difference": 0.7,
}


def vectors(distance: float = 0.0321) -> Comparison:
    """Of a model that gives embeddings."""
    return Comparison(
        **NO_TEXT,
        divergence=None,
        top1_agreement=None,
        cosine=Estimate(1 - distance, 0.0011),
        lowest_cosine=1 - 3 * distance,
    )


def classes(scale: float = 1.0) -> Comparison:
    """Of a classifier."""
    histogram = tuple(range(len(KL_EDGES) + 1))
    divergence = Divergence(Estimate(0.0456 * scale, 0.0011), 0.01, 0.02, 0.05, 0.2, histogram)
    return Comparison(**NO_TEXT, divergence=divergence, top1_agreement=Estimate(0.8765, 0.01))


def with_figures(made: Report, figures: Comparison, noise: Comparison) -> Report:
    """The same report, of a model with other figures and without continuations."""

    def changed(loss: Loss | None, comparison: Comparison = figures) -> Loss | None:
        return None if loss is None else replace(loss, comparison=comparison, greedy=())

    accuracy = made.accuracy
    names = ("method", "export_reference", "export_deployed", "total", "factorization", "quantization")
    losses: Any = {name: changed(getattr(accuracy, name)) for name in names}
    losses["noise"] = replace(accuracy.noise, candidate="torch, text by text", comparison=noise, greedy=())
    others = tuple(replace(one, loss=changed(one.loss)) for one in made.alternatives)
    return replace(
        made,
        accuracy=replace(accuracy, continuations=(), **losses),
        alternatives=others,  # type: ignore[arg-type]
    )


def encoder(distance: float = 0.0321, whole: bool = False) -> Report:
    return with_figures(full() if whole else report(), vectors(distance), vectors(1e-9))


def classifier(scale: float = 1.0, whole: bool = False) -> Report:
    return with_figures(full() if whole else report(), classes(scale), classes(1e-9))


@pytest.mark.parametrize(
    "made", [encoder(), classifier(), encoder(whole=True)], ids=["vectors", "classes", "all"]
)
def test_json_round_trip(made: Report) -> None:
    text = to_json(made)
    assert from_json(text) == made
    total = json.loads(text)["accuracy"]["total"]["comparison"]
    assert total["perplexity_ratio"] is None
    assert (total["cosine"] is None) is (total["divergence"] is not None)


@pytest.mark.parametrize("whole", [False, True])
def test_a_figure_that_a_task_does_not_have_is_shown_nowhere(whole: bool) -> None:
    for made, shown, absent in (
        (encoder(whole=whole), ("cosine", "0.9679"), ("erplexity", "KL divergence", "same top")),
        (classifier(whole=whole), ("KL divergence", "0.0456"), ("erplexity", "cosine")),
    ):
        table = loss_table(made)
        texts = [" ".join(map(str, (*row, ""))) for row in table.rows]
        page = to_html(made)
        body = page[page.index("<body") :]
        for text in ("\n".join(texts), to_markdown(made), body, to_summary(made, GateRequirements())):
            assert all(word in text for word in shown)
        for text in ("\n".join(texts), body[body.index("<h2>Loss") :].partition("<h2>")[0]):
            assert not any(word in text for word in absent)
        assert Page(page).tags.count("main") == 1
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert any("torch, text by text" in note for note in table.notes)
        tree = ElementTree.fromstring(to_junit(made))
        assert tree.findall(".//testcase")


def test_the_page_shows_the_figures_of_an_encoder_by_their_fields() -> None:
    made = encoder(whole=True)
    fields = {entry["data-field"] for entry in Page(to_html(made)).fields}
    for key in (
        "method",
        "export_exact",
        "export_shipped",
        "total",
        "factorization",
        "quantization",
        "noise",
    ):
        place = f"accuracy.{key}.comparison"
        assert {f"{place}.cosine.value", f"{place}.lowest_cosine", f"{place}.nmse"} <= fields
    assert not any("perplexity" in name or "divergence" in name for name in fields)
    assert "alternatives.0.loss.comparison.cosine.value" in fields


@pytest.mark.parametrize(
    ("now", "passes"), [(0.0321, True), (0.035, True), (0.036, False)], ids=["same", "9 % more", "12 % more"]
)
def test_without_a_word_the_cosine_of_an_encoder_may_not_grow_away_from_its_baseline(
    now: float, passes: bool
) -> None:
    found = GateRequirements(baseline=encoder(0.0321)).apply(encoder(now)).accuracy.gate
    by_name = {one.name: one for one in found.criteria}
    assert by_name["cosine_distance_growth"].passed is passes is found.passed
    assert "kl_growth" not in by_name and by_name["bytes_growth"].passed


def test_an_encoder_does_not_outgrow_itself() -> None:
    made, keys = encoder(), ("cosine_distance", "bytes", "weight_bytes")
    evaluated = GateRequirements(gate_from_mapping({"regression": dict.fromkeys(keys, 0)}, "g"), made).apply(
        made
    )
    assert evaluated.passed
    assert {f"{key}_growth" for key in keys} <= {one.name for one in evaluated.accuracy.gate.criteria}


def test_a_distance_below_the_numerical_noise_may_come_and_go() -> None:
    assert GateRequirements(baseline=encoder(1e-12)).apply(encoder(0.9e-9)).accuracy.gate.passed
    assert not GateRequirements(baseline=encoder(1e-12)).apply(encoder(1e-8)).accuracy.gate.passed


def test_growth_of_a_classifier_is_that_of_its_divergence() -> None:
    for scale, passes in ((1.05, True), (1.2, False)):
        found = GateRequirements(baseline=classifier()).apply(classifier(scale)).accuracy.gate
        assert {one.name: one.passed for one in found.criteria}["kl_growth"] is passes
    found = GateRequirements(baseline=classifier(), max_growth=0.5).apply(classifier(1.2)).accuracy.gate
    assert found.passed


@pytest.mark.parametrize(
    ("made", "key", "what"),
    [
        (encoder(), "kl", "KL divergence"),
        (encoder(), "perplexity_ratio", "perplexity"),
        (encoder(), "top1_disagreement", "share of the same choices"),
        (classifier(), "cosine_distance", "cosine"),
        (classifier(), "perplexity_ratio", "perplexity"),
    ],
)
def test_growth_of_a_figure_that_a_task_does_not_have_is_refused_by_name(
    made: Report, key: str, what: str
) -> None:
    requirements = GateRequirements(
        gate_from_mapping({"regression": {key: "10%"}}, "gate.toml"), baseline=made
    )
    with pytest.raises(InputError, match=rf"Growth of the {what} cannot be measured"):
        requirements.apply(made)


def test_a_summary_compares_what_both_have() -> None:
    rows = {row[0]: row[1:] for row in baseline_table(encoder(0.03), encoder(0.02)).rows}
    assert rows["cosine of embeddings"][:2] == ("0.9800 ± 0.0011", "0.9700 ± 0.0011")
    assert set(rows) == {"cosine of embeddings", "all files", "weights"}
    names = {row[0] for row in baseline_table(classifier(), classifier()).rows}
    assert names == {"KL divergence, mean [nats]", "same top token", "all files", "weights"}
