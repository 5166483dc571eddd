"""The job summary of continuous integration: verdict, change against a baseline, tables, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.errors import InputError
from compot_deploy.report.document import Report
from compot_deploy.report.figures import ABSENT, estimate, percent, readable_bytes
from compot_deploy.report.gate import GateRequirements
from compot_deploy.report.markdown import table_markdown, to_markdown
from compot_deploy.report.tables import Table

STEP_SUMMARY: Final = "GITHUB_STEP_SUMMARY"
"""Environment variable that names the file of the running job's summary."""

_Figure: TypeAlias = tuple[Callable[[Report], float | None], Callable[[Report], str]]
"""Reads a figure of a report, and shows it."""

_MOST_BYTES: Final = 900_000
"""GitHub shows at most 1 MiB of a step."""


def to_summary(report: Report, requirements: GateRequirements) -> str:
    """Markdown: what a reviewer wants to know, most important first."""
    state = "✅ passed" if report.passed else "❌ failed"
    blocks = [f"## compot-deploy: {_inline(report.artifact)} {state}"]
    if requirements.baseline is not None:
        blocks.append(table_markdown(baseline_table(report, requirements.baseline)))
    head = "\n\n".join(blocks) + "\n\n"
    text = head + to_markdown(report)
    if len(text.encode()) > _MOST_BYTES:
        text = head + to_markdown(report, without=("Greedy text", "Structure"))
    return text if len(text.encode()) <= _MOST_BYTES else head


def baseline_table(report: Report, baseline: Report) -> Table:
    """Figures of a report beside those of an earlier one."""
    rows = []
    for name, read, show in _FIGURES:
        before, now = read(baseline), read(report)
        if show(baseline) == show(report) == ABSENT:
            continue  # a figure that the task does not have
        change = ABSENT
        if before is not None and now is not None and before > 0:
            change = f"{(now / before - 1) * 100:+.2f} %"
        rows.append((name, show(baseline), show(report), change))
    notes = (f"The baseline is {baseline.artifact}, evaluated {baseline.created}.",)
    return Table("Against the baseline", ("", "baseline", "this", "change"), tuple(rows), notes)


def write_summary(text: str, path: Path, *, append: bool) -> None:
    """Write a summary, or add it to what other steps wrote.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"The summary cannot be written to {path}: {error.strerror}.") from None


def _total(report: Report, figure: str) -> Estimate | None:
    """A figure of the total loss; None where there is none."""
    total = report.accuracy.total
    if total is None:
        return None
    if figure == "divergence":
        return None if total.comparison.divergence is None else total.comparison.divergence.mean
    found = getattr(total.comparison, figure)
    assert found is None or isinstance(found, Estimate)
    return found


def _of_loss(figure: str, show: Callable[[Estimate | None], str]) -> _Figure:
    def read(report: Report) -> float | None:
        found = _total(report, figure)
        return None if found is None else found.value

    return read, lambda report: show(_total(report, figure))


_FIGURES: Final[tuple[tuple[str, Callable[[Report], float | None], Callable[[Report], str]], ...]] = (
    ("KL divergence, mean [nats]", *_of_loss("divergence", estimate)),
    ("perplexity ratio", *_of_loss("perplexity_ratio", estimate)),
    ("same top token", *_of_loss("top1_agreement", percent)),
    ("cosine of embeddings", *_of_loss("cosine", estimate)),
    ("word errors against the original's text", *_of_loss("word_errors", percent)),
    ("word errors against what was said", *_of_loss("candidate_word_errors", percent)),
    ("all files", lambda one: float(one.sizes.artifact), lambda one: readable_bytes(one.sizes.artifact)),
    ("weights", lambda one: float(one.sizes.weights), lambda one: readable_bytes(one.sizes.weights)),
)


def _inline(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"
