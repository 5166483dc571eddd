"""The report as tables of finished strings, for people; the terminal, Markdown and the HTML page draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compot_deploy.accuracy.losses import GreedyMatch, Loss
from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.accuracy.outcome import Continuation
from compot_deploy.report.document import Alternative, Report
from compot_deploy.report.facts import LayerFigures
from compot_deploy.report.figures import (
    ABSENT,
    estimate,
    figure,
    limit_figure,
    percent,
    printable,
    ratio,
    readable_bytes,
)
from compot_deploy.report.steps import all_losses


@dataclass(frozen=True)
class Table:
    """A table of finished strings; the first column names the row.

    Attributes:
        title: above the table.
        columns: headings; the first may be empty.
        rows: as many entries as columns each.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: every row needs {len(self.columns)} entries.")


def tables(report: Report) -> tuple[Table, ...]:
    """All tables of a report in reading order; those that would be empty are left out."""
    candidates = (
        gate_table(report),
        size_table(report),
        loss_table(report),
        task_table(report),
        choice_table(report),
        diagnostic_table(report),
        text_table(report),
    )
    return tuple(table for table in candidates if table.rows)


def gate_table(report: Report) -> Table:
    """Each criterion of the gate: value, limit, verdict."""
    rows = tuple(
        (
            criterion.name,
            limit_figure(criterion.value),
            f"{criterion.relation} {limit_figure(criterion.threshold)}",
            "passed" if criterion.passed else "FAILED",
        )
        for criterion in report.accuracy.gate.criteria
    )
    return Table("Gate", ("criterion", "value", "limit", "verdict"), rows)


def size_table(report: Report) -> Table:
    """Bytes of the artifact beside plain int4, plain int8 and fp16."""
    sizes = report.sizes
    entries: list[tuple[str, int | None]] = [
        ("artifact, all files", sizes.artifact),
        ("artifact, weights", sizes.weights),
        ("plain int4, weights", sizes.plain_int4),
        ("plain int8, weights", sizes.plain_int8),
        ("fp16, weights", sizes.fp16),
        ("artifact, compressed for transport", sizes.transport),
    ]
    in_memory: list[tuple[str, int | None]] = [
        ("artifact, weights in memory", sizes.memory),
        ("plain int4, weights in memory", sizes.memory_int4),
        ("plain int8, weights in memory", sizes.memory_int8),
    ]
    rows = tuple(
        (name, readable_bytes(count), f"{count:,}", ratio(weights, count))
        for weights, group in ((sizes.weights, entries), (sizes.memory, in_memory))
        for name, count in group
        if count is not None and weights is not None
    )
    return Table("Size", ("", "size", "bytes", "artifact's weights / this"), rows, report.notes)


def loss_table(report: Report) -> Table:
    """The three losses side by side, the export twice, and the numerical noise."""
    accuracy = report.accuracy
    columns = all_losses(report)
    figures = [None if step.loss is None else _figures(step.loss) for step in columns]
    names = tuple(_figures(accuracy.export_reference))
    lines = [(name, *(ABSENT if column is None else column[name] for column in figures)) for name in names]
    rows = tuple(line for line in lines if set(line[1:]) != {ABSENT})  # what the task has no figure for
    evaluation = accuracy.evaluation
    notes = [
        f"{evaluation.positions:,} positions in {evaluation.windows} windows of {evaluation.source}; "
        f"metrics version {accuracy.metrics_version}.",
        f"The numerical noise is {accuracy.noise.reference} against {accuracy.noise.candidate}.",
        *(f"{note}." for note in evaluation.notes),
    ]
    if accuracy.reference_absent is not None:
        notes.append(f"No method and total loss: {accuracy.reference_absent}.")
    elif accuracy.factorization is not None:
        notes.append("The method loss is split: factorization alone, then what quantization adds to it.")
    notes += healing_notes(report)
    notes += [alternative_note(report, other) for other in report.alternatives]
    return Table("Accuracy", ("", *(step.name for step in columns)), rows, tuple(notes))


def task_table(report: Report) -> Table:
    """What the file scores in each task, beside the original."""
    rows = tuple(
        (
            printable(one.task),
            printable(one.metric),
            f"{one.samples:,}",
            estimate(one.original),
            estimate(one.exported),
            _recovered(one.recovery),
        )
        for one in report.tasks
    )
    columns = ("task", "metric", "samples", "original", "deployed", "recovery")
    notes = ("Recovery is the share of the original's score that the file keeps, ± one standard error.",)
    return Table("Tasks", columns, rows, notes if rows else ())


def _recovered(share: Estimate | None) -> str:
    if share is None or not math.isfinite(share.value):
        return ABSENT
    error = f" ± {share.standard_error:.1%}" if math.isfinite(share.standard_error) else ""
    return f"{share.value:.1%}{error}"


def healing_notes(report: Report) -> list[str]:
    """What healing gained on the evaluation text; nothing where nothing was healed."""
    method, unhealed = report.accuracy.method, report.accuracy.unhealed
    if method is None or unhealed is None:
        return []
    before, after = unhealed.comparison, method.comparison
    if before.divergence is not None and after.divergence is not None:
        first, second = before.divergence.mean.value, after.divergence.mean.value
        return [
            f"Healing took the method loss from {figure(first)} to {figure(second)} nats"
            + (f", {second / first - 1:+.0%}." if first > 0 else ".")
        ]
    if before.cosine is not None and after.cosine is not None:
        return [f"Healing took the cosine from {estimate(before.cosine)} to {estimate(after.cosine)}."]
    return []


def alternative_note(report: Report, other: Alternative) -> str:
    """What an alternative is, beside the report's own model."""
    return (
        f"{other.name} is the same model at {other.bits:.3f} bits per weight, {other.factorized} of {other.linears} "
        f"linears factorized, in {other.bytes:,} bytes of weights; this one has {report.sizes.weights:,}."
    )


def choice_table(report: Report) -> Table:
    """What was chosen for how many matrices, what that takes, and the error that it makes."""
    groups: dict[str, list[LayerFigures]] = {}
    for layer in report.layers:
        groups.setdefault(kind_of(layer), []).append(layer)
    rows = []
    for kind, layers in sorted(groups.items()):
        size = sum(layer.bytes for layer in layers)
        weights = sum(layer.inputs * layer.outputs for layer in layers)
        measured = [layer.error for layer in layers if layer.error is not None]
        rows.append(
            (
                kind,
                str(len(layers)),
                readable_bytes(size),
                f"{size * 8 / weights:.2f}",
                figure(sum(measured) / len(measured)) if measured else ABSENT,
                ratio(size, sum(layer.plain_int4_bytes for layer in layers)),
            )
        )
    columns = ("scheme", "matrices", "size", "bits per weight", "mean error", "of plain int4")
    notes = ("Error is relative, of a matrix's output on calibration text; scales count as bits.",)
    return Table("Matrices", columns, tuple(rows), notes if rows else ())


def kind_of(layer: LayerFigures) -> str:
    """The scheme of a matrix without its sizes: what matrices are grouped by."""
    if layer.kind == "factorized":
        return "dictionary and codes"
    return layer.choice


def diagnostic_table(report: Report) -> Table:
    """What the structural lint found."""
    rows = tuple(
        (diagnostic.severity, printable(diagnostic.where), printable(diagnostic.sentence))
        for diagnostic in report.diagnostics
    )
    return Table("Structure", ("severity", "where", "diagnostic"), rows)


def text_table(report: Report) -> Table:
    """Greedy continuations side by side."""
    rows: list[tuple[str, ...]] = []
    for text in report.accuracy.continuations:
        voices = speakers(text, "exported")
        rows += [(printable(text.prompt), " = ".join(who), printable(said)) for said, who in voices.items()]
    return Table("Greedy text", ("prompt", "model", "continuation"), tuple(rows))


def speakers(text: Continuation, file: str) -> dict[str, list[str]]:
    """Each continuation of a prompt, and the models that wrote it.

    Args:
        text: of one prompt.
        file: what the exported file is called.
    """
    voices: dict[str, list[str]] = {}
    for who, said in (
        ("original", text.reference),
        ("factorized", text.factorized),
        ("compressed", text.compressed),
        (f"{file}, float32", text.exact),
        (f"{file}, deployed", text.exported),
    ):
        if said is not None:
            voices.setdefault(said, []).append(who)
    return voices


def _figures(loss: Loss) -> dict[str, str]:
    figures = loss.comparison
    divergence = figures.divergence
    what = "logit" if figures.cosine is None else "vector"
    lowest = ABSENT if figures.lowest_cosine is None else f"{figures.lowest_cosine:.5f}"
    return {
        "perplexity, from": estimate(figures.reference_perplexity),
        "perplexity, to": estimate(figures.candidate_perplexity),
        "perplexity ratio": estimate(figures.perplexity_ratio),
        "KL divergence, mean [nats]": ABSENT if divergence is None else estimate(divergence.mean),
        "KL divergence, median": ABSENT if divergence is None else figure(divergence.median),
        "KL divergence, p90": ABSENT if divergence is None else figure(divergence.p90),
        "KL divergence, p99": ABSENT if divergence is None else figure(divergence.p99),
        "KL divergence, largest": ABSENT if divergence is None else figure(divergence.maximum),
        "same top token": percent(figures.top1_agreement),
        "cosine of embeddings, mean": estimate(figures.cosine),
        "cosine of embeddings, lowest": lowest,
        "word errors against what was said, from": percent(figures.reference_word_errors),
        "word errors against what was said, to": percent(figures.candidate_word_errors),
        "word errors against each other": percent(figures.word_errors),
        f"{what} NMSE": figure(figures.nmse),
        f"largest {what} difference": figure(figures.largest_difference),
        f"non-finite {what}s": str(figures.nonfinite_reference + figures.nonfinite_candidate),
        "same greedy tokens": greedy_matches(loss.greedy),
    }


def greedy_matches(matches: Sequence[GreedyMatch]) -> str:
    """How much of the greedy continuations is the same."""
    if not matches:
        return ABSENT
    shared, length = sum(match.common_prefix for match in matches), sum(match.length for match in matches)
    return f"{shared}/{length}, {sum(match.equal for match in matches)} of {len(matches)} texts"
