"""The report as GitHub Markdown, for a model card or a job summary."""

from __future__ import annotations

from collections.abc import Sequence

from compot_deploy.report.document import Report, verdict
from compot_deploy.report.figures import printable
from compot_deploy.report.tables import Table, tables


def to_markdown(report: Report, without: Sequence[str] = ()) -> str:
    """Verdict and tables as GitHub Markdown, for a model card or a job summary.

    Args:
        report: to show.
        without: titles of tables that are left out.
    """
    blocks = [f"**{_escaped(verdict(report))}**"]
    blocks += [table_markdown(table) for table in tables(report) if table.title not in without]
    return "\n\n".join(blocks) + "\n"


def table_markdown(table: Table) -> str:
    """A table as GitHub Markdown, its title above it and its notes below."""
    right = "---" if table.title in ("Gate", "Structure", "Greedy text") else "---:"
    lines = [
        f"### {table.title}",
        "",
        _markdown_row(table.columns),
        _markdown_row(["---", *[right] * (len(table.columns) - 1)], escape=False),
        *(_markdown_row(row) for row in table.rows),
    ]
    if table.notes:
        lines += ["", *(f"- {_escaped(note)}" for note in table.notes)]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(_escaped(cell) if escape else cell for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = printable(text)
    for character in "\\`*_[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())
