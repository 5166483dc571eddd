"""The section of a report about its losses: a histogram, a summary, and a table with a column for each loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import Comparison
from compot_deploy.report.document import Report
from compot_deploy.report.figures import ABSENT, estimate, figure, percent
from compot_deploy.report.html.drawing import Plot
from compot_deploy.report.html.elements import (
    html_table,
    html_text,
    marked_estimate,
    marked_number,
    marked_percent,
    note_list,
    page_section,
    plot_figure,
)
from compot_deploy.report.steps import ALTERNATIVES, Step, all_losses, steps
from compot_deploy.report.tables import alternative_note, greedy_matches, healing_notes

_Measured: TypeAlias = Sequence[tuple[Step, Loss]]
_Cell: TypeAlias = Callable[[str, Loss], str]
"""Where a loss lies in report.json, and the loss, to HTML."""


def loss_section(report: Report, drawn: Mapping[str, Plot]) -> str:
    """The section as HTML."""
    measured = [(step, step.loss) for step in all_losses(report) if step.loss is not None]
    summary = "".join(
        f"<div><dt>{name}</dt><dd>{_in_a_line(loss.comparison)}</dd></div>"
        for name, loss in steps(report).items()
    )
    return page_section(
        "Loss",
        f'<div class="columns">{plot_figure(drawn.get("divergence"))}<div><dl class="facts">{summary}</dl>'
        f"{note_list(_notes(report, measured))}"
        '<p class="note">Losses do not add up: each is measured between two models on the same tokens. The '
        "numerical noise is what the order of additions alone changes: an export loss near it is arithmetic."
        f"</p></div></div>{_table(measured)}",
    )


def _in_a_line(figures: Comparison) -> str:
    """The figures of a loss that say most."""
    parts = []
    if figures.divergence is not None:
        parts.append(f"{figure(figures.divergence.mean.value)} nats per token")
    if figures.perplexity_ratio is not None:
        parts.append(f"perplexity × {figures.perplexity_ratio.value:.4g}")
    elif figures.top1_agreement is not None:
        parts.append(f"{percent(figures.top1_agreement)} of the choices the same")
    if figures.cosine is not None:
        parts.append(f"cosine {estimate(figures.cosine)}")
    return ", ".join(parts)


def _table(measured: _Measured) -> str:
    def row(label: str, cell: _Cell) -> str:
        cells = "".join(f'<td class="number">{cell(_place(step), loss)}</td>' for step, loss in measured)
        return f'<tr><th scope="row">{label}</th>{cells}</tr>\n'

    figures = measured[0][1].comparison
    rows: list[str] = []
    if figures.perplexity_ratio is not None:
        rows += [
            row("perplexity, from", _nested("reference_perplexity", marked_estimate)),
            row("perplexity, to", _nested("candidate_perplexity", marked_estimate)),
            row("perplexity ratio", _nested("perplexity_ratio", marked_estimate)),
        ]
    if figures.divergence is not None:
        rows += [
            row("KL divergence, mean", _nested("divergence.mean", marked_estimate)),
            row("median", _nested("divergence.median", marked_number)),
            row("90 %", _nested("divergence.p90", marked_number)),
            row("99 %", _nested("divergence.p99", marked_number)),
            row("largest", _nested("divergence.maximum", marked_number)),
            row("same top token", _nested("top1_agreement", marked_percent)),
        ]
    if figures.cosine is not None:
        rows += [
            row("cosine of embeddings, mean", _nested("cosine", marked_estimate)),
            row("lowest", _nested("lowest_cosine", marked_number)),
        ]
    if figures.word_errors is not None:
        rows.append(row("word errors against each other", _nested("word_errors", marked_percent)))
    if figures.candidate_word_errors is not None:
        rows += [
            row("word errors against what was said, from", _nested("reference_word_errors", marked_percent)),
            row("to", _nested("candidate_word_errors", marked_percent)),
        ]
    what = "logit" if figures.cosine is None else "vector"
    rows += [
        row(f"{what} NMSE", _nested("nmse", marked_number)),
        row(f"largest {what} difference", _nested("largest_difference", marked_number)),
    ]
    if any(loss.greedy for _, loss in measured):
        rows.append(row("same greedy tokens", lambda _, loss: html_text(greedy_matches(loss.greedy))))
    head = tuple(f"{html_text(step.name)}<small>{step.meaning}</small>" for step, _ in measured)
    return html_table(("", *head), rows, numbers=True, wide=True, escaped=True)


def _nested(path: str, formatter: Any) -> _Cell:
    """The cell of a figure of a comparison, which lies at `path` in it."""

    def cell(place: str, loss: Loss) -> str:
        value: Any = loss.comparison
        for part in path.split("."):
            value = getattr(value, part)
            if value is None:  # no transcripts are written to measure the numerical noise
                return ABSENT
        return str(formatter(f"{place}.{path}", value))

    return cell


def _place(step: Step) -> str:
    """Where a comparison lies in report.json."""
    return (
        f"{step.key}.loss.comparison"
        if step.key.startswith(ALTERNATIVES)
        else f"accuracy.{step.key}.comparison"
    )


def _notes(report: Report, measured: _Measured) -> list[str]:
    accuracy, read = report.accuracy, report.accuracy.evaluation
    notes = [
        f"{read.positions:,} positions in {read.windows} windows of {read.source}; figures of metrics version "
        f"{accuracy.metrics_version}. KL divergence is in nats per token; ± is one standard error.",
        *(f"{note}." for note in read.notes),
    ]
    if accuracy.reference_absent is not None:
        notes.append(f"No method and total loss: {accuracy.reference_absent}.")
    elif accuracy.factorization is None and accuracy.split_absent is not None:
        notes.append(
            f"The method loss is not split into factorization and quantization: {accuracy.split_absent}."
        )
    notes += healing_notes(report)
    notes += [alternative_note(report, other) for other in report.alternatives]
    bad = sum(
        loss.comparison.nonfinite_reference + loss.comparison.nonfinite_candidate for _, loss in measured
    )
    if bad:
        notes.append(f"{bad} logits are NaN or infinite; their positions are left out.")
    return notes
