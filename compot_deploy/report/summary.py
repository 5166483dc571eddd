"""The job summary of continuous integration: verdict, change against a baseline, tables, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from compot_deploy.errors import InputError
from compot_deploy.report.document import Report
from compot_deploy.report.figures import ABSENT, estimate, percent, readable_bytes
from compot_deploy.report.gate import Demands
from compot_deploy.report.markdown import table_markdown, to_markdown
from compot_deploy.report.tables import Table

STEP_SUMMARY: Final = "GITHUB_STEP_SUMMARY"
"""Environment variable that names the file of the running job's summary."""

_MOST_BYTES: Final = 900_000
"""GitHub shows at most 1 MiB of a step."""


def to_summary(report: Report, demands: Demands) -> str:
    """Markdown: what a reviewer wants to know, most important first."""
    state = "✅ passed" if report.passed else "❌ failed"
    blocks = [f"## compot-deploy: {_inline(report.artifact)} {state}"]
    if demands.baseline is not None:
        blocks.append(table_markdown(baseline_table(report, demands.baseline)))
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
        change = ABSENT
        if before is not None and now is not None and before > 0:
            change = f"{(now / before - 1) * 100:+.2f} %"
        rows.append((name, show(baseline), show(report), change))
    notes = (f"The baseline is {baseline.artifact}, judged {baseline.created}.",)
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


def _kl(report: Report) -> float | None:
    total = report.accuracy.total
    return None if total is None else total.comparison.divergence.mean.value


def _perplexity(report: Report) -> float | None:
    total = report.accuracy.total
    return None if total is None else total.comparison.perplexity_ratio.value


def _top1(report: Report) -> float | None:
    total = report.accuracy.total
    return None if total is None else total.comparison.top1_agreement.value


def _show_kl(report: Report) -> str:
    total = report.accuracy.total
    return ABSENT if total is None else estimate(total.comparison.divergence.mean)


def _show_perplexity(report: Report) -> str:
    total = report.accuracy.total
    return ABSENT if total is None else estimate(total.comparison.perplexity_ratio)


def _show_top1(report: Report) -> str:
    total = report.accuracy.total
    return ABSENT if total is None else percent(total.comparison.top1_agreement)


_FIGURES: Final[tuple[tuple[str, Callable[[Report], float | None], Callable[[Report], str]], ...]] = (
    ("KL divergence, mean [nats]", _kl, _show_kl),
    ("perplexity ratio", _perplexity, _show_perplexity),
    ("same top token", _top1, _show_top1),
    ("all files", lambda one: float(one.sizes.artifact), lambda one: readable_bytes(one.sizes.artifact)),
    ("weights", lambda one: float(one.sizes.weights), lambda one: readable_bytes(one.sizes.weights)),
)


def _inline(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"
