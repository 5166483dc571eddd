"""The section of a report about the plan: budget, choice, and what could have been chosen."""

from __future__ import annotations

from collections.abc import Mapping

from compot_deploy.report.document import Report
from compot_deploy.report.html.drawing import Plot
from compot_deploy.report.html.elements import (
    FOLDED_ROWS,
    folded,
    html_table,
    marked,
    marked_bytes,
    marked_number,
    page_section,
    plot_figure,
)


def plan_section(report: Report, drawn: Mapping[str, Plot]) -> str:
    """The section as HTML; nothing where nothing was planned."""
    planned = report.frontier
    if planned is None:
        return ""
    chosen = planned.chosen
    listed = [
        (
            "budget",
            f"{marked_bytes('frontier.budget', planned.budget)} bytes, counted in the {planned.counts}",
        ),
        (
            "chosen",
            f"{marked_bytes('frontier.chosen.bytes', chosen.bytes)} bytes, "
            f"{marked('frontier.chosen.bits', chosen.bits, f'{chosen.bits:.3f}')} bits per weight",
        ),
        ("predicted loss", f"{marked_number('frontier.chosen.loss', chosen.loss)} nats per token"),
    ]
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed)
    tables = ""
    for title, key, points in (
        ("All schemes", "all_forms", planned.all_schemes),
        ("Plain integers alone", "plain", planned.plain),
    ):
        rows = [
            f'<tr><td class="number">{marked_bytes(f"frontier.{key}.{n}.bytes", point.bytes)}</td>'
            f'<td class="number">{marked(f"frontier.{key}.{n}.bits", point.bits, f"{point.bits:.3f}")}</td>'
            f'<td class="number">{marked_number(f"frontier.{key}.{n}.loss", point.loss)}</td></tr>\n'
            for n, point in enumerate(points)
        ]
        if rows:
            tables += folded(
                f"{title}: points of the plot",
                html_table(("bytes", "bits per weight", "predicted loss"), rows, numbers=True),
                FOLDED_ROWS + 1,
            )
    return page_section(
        "Plan",
        f'<div class="columns">{plot_figure(drawn.get("frontier"))}<div><dl class="facts">{figures}</dl>{tables}'
        "</div></div>",
    )
