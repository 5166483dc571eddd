"""What a page of the report is made of: escaped text, figures with their place in report.json, tables, lists."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Final

from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.report.figures import ABSENT, estimate, figure, percent, printable
from compot_deploy.report.html.drawing import Plot
from compot_deploy.report.tables import Table

LONGEST_TEXT: Final = 3_000
"""Characters of a continuation that are shown; report.json has the rest."""

MOST_ROWS: Final = 500
"""Rows of a table and entries of a list that are shown; report.json has the rest. These limits keep the page
below 2 MB whatever the report."""

FOLDED_ROWS: Final = 12
"""Tables with more rows are folded on a screen; on paper they are open."""

_FOLDED_NOTES: Final = 6
"""Longer lists of notes are folded."""


def html_text(value: str) -> str:
    """Text of anyone as HTML: control characters visible, markup as text."""
    return html.escape(printable(value), quote=True)


def breakable(name: str) -> str:
    """A module path that may break after its dots."""
    return html_text(name).replace(".", ".<wbr>")


def marked(place: str, value: int | float | None, shown: str) -> str:
    """A figure with its place in report.json and its exact value there."""
    if value is None or not math.isfinite(value):
        return f'<data data-field="{place}" value="">{ABSENT}</data>'
    return f'<data data-field="{place}" value="{value!r}">{html_text(shown)}</data>'


def marked_number(place: str, value: float | None) -> str:
    """A marked figure, a few digits of it shown."""
    return marked(place, value, ABSENT if value is None else figure(value))


def marked_bytes(place: str, value: int | None) -> str:
    """A marked whole number, bytes mostly, every digit shown."""
    return marked(place, value, ABSENT if value is None else f"{value:,}")


def marked_estimate(place: str, value: Estimate) -> str:
    """A marked estimate with its standard error; its value is what is marked."""
    return marked(f"{place}.value", value.value, estimate(value))


def marked_percent(place: str, value: Estimate) -> str:
    """A marked share in percent, with its standard error."""
    return marked(f"{place}.value", value.value, percent(value))


def page_section(title: str, body: str) -> str:
    """A part of the page under a heading; `body` is HTML."""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def tile(name: str, value: str, note: str) -> str:
    """One of the large figures at the top; `value` is HTML."""
    return f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>\n"


def plot_figure(plot: Plot | None) -> str:
    """A plot with its caption; nothing where there is none."""
    if plot is None:
        return ""
    label = html_text(plot.label)
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<figure class="plot">{svg}<figcaption>{html_text(plot.caption)}</figcaption></figure>'


def note_list(entries: Iterable[str], label: str = "notes") -> str:
    """A list of sentences, folded if it is long and cut if it is very long."""
    known = list(entries)
    if not known:
        return ""
    items = "".join(f"<li>{html_text(entry[:LONGEST_TEXT])}</li>" for entry in known[:MOST_ROWS])
    items += left_out("li", len(known))
    body = f'<ul class="notes">{items}</ul>'
    if len(known) > _FOLDED_NOTES:
        return folded(f"{len(known)} {label}", body, len(known), _FOLDED_NOTES)
    return body


def html_table(
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    numbers: bool = False,
    wide: bool = False,
    escaped: bool = False,
) -> str:
    """A table of finished rows; it scrolls by itself where the page is too narrow."""
    head = ""
    for number, column in enumerate(columns):
        right = ' class="number"' if numbers and number else ""
        head += f'<th scope="col"{right}>{column if escaped else html_text(column)}</th>'
    kind = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody></table>'
        "</div>"
    )


def plain_table(table: Table, *, numbers: bool = False) -> str:
    """A table of finished strings."""
    right = ' class="number"' if numbers else ""
    rows = [
        f'<tr><th scope="row">{html_text(row[0])}</th>'
        + "".join(f"<td{right}>{html_text(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in table.rows[:MOST_ROWS]
    ]
    return (
        html_table(table.columns, rows, numbers=numbers)
        + left_out("p", len(table.rows))
        + note_list(table.notes)
    )


def left_out(tag: str, count: int) -> str:
    """What is said where a list was cut."""
    if count <= MOST_ROWS:
        return ""
    return f'<{tag} class="note">{count - MOST_ROWS} more are in report.json.</{tag}>'


def folded(title: str, body: str, rows: int, most: int = FOLDED_ROWS) -> str:
    """What is long stays shut on a screen until somebody opens it."""
    shut = "" if rows > most else " open"
    return f"<details{shut}><summary>{html_text(title)}</summary>{body}</details>"
