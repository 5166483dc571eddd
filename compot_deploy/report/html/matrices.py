"""The section of a report about its matrices: two maps of all blocks, and a table with a row for each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from compot_deploy.report.document import Report
from compot_deploy.report.facts import LayerFigures
from compot_deploy.report.figures import ABSENT
from compot_deploy.report.html.drawing import Plot
from compot_deploy.report.html.elements import (
    MOST_ROWS,
    breakable,
    folded,
    html_table,
    html_text,
    left_out,
    marked,
    marked_bytes,
    marked_number,
    page_section,
    plain_table,
    plot_figure,
)
from compot_deploy.report.tables import choice_table

_PROJECTION: Final = "_proj"

_STEPS: Final = 7
"""Shades of a map."""


def matrix_section(report: Report, drawn: Mapping[str, Plot]) -> str:
    """The section as HTML; nothing for a report without figures of its matrices."""
    if not report.layers:
        return ""
    table = choice_table(report)
    blocks = [layer for layer in report.layers if layer.block is not None]
    maps = ""
    if 0 < len(blocks) <= MOST_ROWS:
        maps = (
            '<div class="columns maps">'
            + _map("Bits per weight", blocks, "bits", lambda layer: layer.bits, "{:.1f}")
            + _map("Relative error", blocks, "error", lambda layer: layer.error, "{:.3f}")
            + "</div>"
        )
    return page_section(
        "Matrices",
        f'<div class="columns"><div>{plain_table(table, numbers=True)}</div>{plot_figure(drawn.get("errors"))}</div>'
        f"{maps}{_layer_table(report.layers)}",
    )


def _map(title: str, layers: Sequence[LayerFigures], field: str, value: Any, form: str) -> str:
    """Blocks down, roles across: a table whose cells are shaded by a figure."""
    roles = list(dict.fromkeys(layer.role for layer in layers))
    numbers = sorted({layer.block for layer in layers if layer.block is not None})
    cells = {(layer.block, layer.role): layer for layer in layers}
    values = [known for layer in layers if (known := value(layer)) is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    rows = []
    for number in numbers:
        row = []
        for role in roles:
            layer = cells.get((number, role))
            shown = None if layer is None else value(layer)
            if layer is None or shown is None:
                row.append(f"<td>{ABSENT}</td>")
                continue
            shade = 0 if high == low else min(_STEPS - 1, int(_STEPS * (shown - low) / (high - low)))
            mark = ' class="plain"' if layer.kind != "factorized" else ""
            row.append(
                f'<td data-shade="{shade}" title="{html_text(layer.name)}: {html_text(layer.choice)}">'
                f"<span{mark}>{form.format(shown)}</span></td>"
            )
        rows.append(f'<tr><th scope="row">{number}</th>{"".join(row)}</tr>\n')
    head = "".join(f'<th scope="col"><span>{html_text(_short(role, roles))}</span></th>' for role in roles)
    return (
        f'<figure class="map"><figcaption><strong>{title}</strong> by block (down) and matrix (across), from '
        f'{form.format(low)} to {form.format(high)}; <span class="plain">underlined</span>: not factorized.'
        f'</figcaption><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>\n<tbody>\n'
        f"{''.join(rows)}</tbody></table></div></figure>"
    )


def _short(role: str, roles: Sequence[str]) -> str:
    """The last part of a role where that tells it from all others."""
    last = role.rsplit(".", 1)[-1]
    if sum(one.rsplit(".", 1)[-1] == last for one in roles) > 1:
        return role
    alike = all(one.endswith(_PROJECTION) for one in roles)
    return last.removesuffix(_PROJECTION) if alike else last


def _layer_table(layers: Sequence[LayerFigures]) -> str:
    sensitivities = any(layer.sensitivity is not None for layer in layers)
    before = any(layer.unquantized_error is not None for layer in layers)
    rows = []
    for number, layer in enumerate(layers[:MOST_ROWS]):
        place = f"layers.{number}"
        reason = f"<small>{html_text(layer.reason)}</small>" if layer.reason else ""
        cells = [
            f'<th scope="row"><code>{breakable(layer.name)}</code></th>',
            f'<td class="number">{layer.inputs} × {layer.outputs}</td>',
            f"<td>{html_text(layer.choice)}{reason}</td>",
            f'<td class="number">{marked(f"{place}.bits", layer.bits, f"{layer.bits:.2f}")}</td>',
            f'<td class="number">{marked_bytes(f"{place}.bytes", layer.bytes)}</td>',
            f'<td class="number">{marked_bytes(f"{place}.plain_int4_bytes", layer.plain_int4_bytes)}</td>',
            f'<td class="number">{marked_number(f"{place}.error", layer.error)}</td>',
        ]
        if before:
            cells.append(
                f'<td class="number">{marked_number(f"{place}.unquantized_error", layer.unquantized_error)}</td>'
            )
        if sensitivities:
            cells.append(f'<td class="number">{marked_number(f"{place}.effect", layer.sensitivity)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    columns = ["matrix", "size", "choice", "bits per weight", "bytes", "plain int4", "error"]
    columns += ["before quantization"] if before else []
    columns += ["sensitivity"] if sensitivities else []
    note = (
        '<p class="note">A shared dictionary counts with the first matrix that uses it; bits per weight are those of '
        "all that share it."
        + (
            " Sensitivity: nats per token that a unit of squared error of this matrix alone costs the model."
            if sensitivities
            else ""
        )
        + "</p>"
    )
    table = html_table(columns, rows, wide=True) + left_out("p", len(layers))
    return folded(f"Every matrix ({len(layers)})", table + note, len(rows))
