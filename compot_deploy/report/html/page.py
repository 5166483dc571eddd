"""The report as one HTML page that needs nothing else: no script, no network, no file beside it.

Every figure that `compot_deploy.report.json.to_json` has is marked with its place there, ``data-field``, so that a
program (and a test) can compare the two. All text is escaped: prompts, texts and names come from models.
"""

from __future__ import annotations

from collections.abc import Mapping

from compot_deploy.errors import MissingDependencyError
from compot_deploy.report.document import Report, verdict
from compot_deploy.report.figures import ABSENT, limit_figure, ratio, readable_bytes
from compot_deploy.report.html.drawing import Plot
from compot_deploy.report.html.elements import (
    html_table,
    html_text,
    marked,
    marked_bytes,
    marked_estimate,
    marked_number,
    marked_percent,
    note_list,
    page_section,
    plain_table,
    plot_figure,
    tile,
)
from compot_deploy.report.html.loss import loss_section
from compot_deploy.report.html.matrices import matrix_section
from compot_deploy.report.html.origin import origin_section
from compot_deploy.report.html.plan import plan_section
from compot_deploy.report.html.plots import plots
from compot_deploy.report.html.style import STYLE
from compot_deploy.report.html.texts import text_section
from compot_deploy.report.tables import diagnostic_table, task_table


def to_html(report: Report) -> str:
    """The page. Without matplotlib it has every table, no plot, and says which extra brings them.

    Args:
        report: what `report.json` holds.
    """
    drawn: Mapping[str, Plot] = {}
    missing = ""
    try:
        drawn = plots(report)
    except MissingDependencyError as error:
        missing = f'<p class="note">{html_text(str(error))}</p>'
    sections = [
        _gate(report),
        _size(report, drawn),
        loss_section(report, drawn),
        matrix_section(report, drawn),
        plan_section(report, drawn),
        text_section(report),
        _tasks(report),
        _structure(report),
        origin_section(report),
    ]
    title = f"{html_text(report.artifact)}: {'passed' if report.passed else 'failed'}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        f"{_head(report)}\n<main>\n{missing}"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n{_foot(report)}\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    state = "passed" if report.passed else "failed"
    tiles = [
        tile(
            "weights",
            marked("sizes.weights", report.sizes.weights, readable_bytes(report.sizes.weights)),
            f"{ratio(report.sizes.weights, report.sizes.fp16)} of fp16, "
            f"{ratio(report.sizes.weights, report.sizes.plain_int4)} of plain int4",
        )
    ]
    total, path = report.accuracy.total, "accuracy.total.comparison"
    if total is None:
        total, path = report.accuracy.export_deployed, "accuracy.export_shipped.comparison"
        against = "against the compressed model"
    else:
        against = "against the original"
    comparison = total.comparison
    if comparison.perplexity_ratio is not None:
        value = marked_estimate(f"{path}.perplexity_ratio", comparison.perplexity_ratio)
        tiles.append(tile("perplexity ratio", value, against))
    if comparison.top1_agreement is not None:
        value = marked_percent(f"{path}.top1_agreement", comparison.top1_agreement)
        tiles.append(tile("same top token", value, against))
    if comparison.divergence is not None:
        value = marked_estimate(f"{path}.divergence.mean", comparison.divergence.mean)
        tiles.append(tile("KL divergence", value, "nats per token, mean"))
    if comparison.cosine is not None:
        value = marked_estimate(f"{path}.cosine", comparison.cosine)
        tiles.append(tile("cosine of embeddings", value, against))
    if comparison.candidate_word_errors is not None:
        value = marked_percent(f"{path}.candidate_word_errors", comparison.candidate_word_errors)
        tiles.append(tile("word errors", value, "against what was said"))
    elif comparison.word_errors is not None:
        tiles.append(
            tile("word errors", marked_percent(f"{path}.word_errors", comparison.word_errors), against)
        )
    tiles += [
        tile(
            "export error",
            marked_number(
                "accuracy.export_exact.comparison.nmse", report.accuracy.export_reference.comparison.nmse
            ),
            "NMSE that the file adds, exactly computed",
        ),
    ]
    return (
        f'<header class="{state}">\n<p class="kicker">compot-deploy report</p>\n'
        f'<h1>{html_text(report.artifact)}</h1>\n<p class="sub">{html_text(report.model)} '
        f'<span class="chip">{html_text(report.format)}</span></p>\n'
        f'<p class="verdict"><strong class="badge">{state.upper()}</strong> '
        f"{html_text(verdict(report).partition(': ')[2])}</p>\n"
        f'<dl class="tiles">\n{"".join(tiles)}</dl>\n</header>'
    )


def _gate(report: Report) -> str:
    rows = []
    for number, criterion in enumerate(report.accuracy.gate.criteria):
        place = f"accuracy.gate.criteria.{number}"
        state = "passed" if criterion.passed else "failed"
        meaning = criterion.sentence.partition(": ")[0]
        rows.append(
            f'<tr class="{state}"><th scope="row"><code>{html_text(criterion.name)}</code>'
            f"<small>{html_text(meaning)}</small></th>"
            f'<td class="number">{marked(f"{place}.value", criterion.value, limit_figure(criterion.value))}</td>'
            f'<td class="number">{criterion.relation} '
            f"{marked(f'{place}.threshold', criterion.threshold, limit_figure(criterion.threshold))}</td>"
            f'<td><strong class="state">{state}</strong></td></tr>\n'
        )
    columns = (
        "criterion",
        *(f'<span class="number">{name}</span>' for name in ("value", "limit")),
        "verdict",
    )
    return page_section("Gate", f'<div class="gate">{html_table(columns, rows, escaped=True)}</div>')


def _size(report: Report, drawn: Mapping[str, Plot]) -> str:
    sizes = report.sizes
    rows = []
    for name, weights, memory in (
        ("this artifact", "weights", "memory"),
        ("plain int4", "plain_int4", "memory_int4"),
        ("plain int8", "plain_int8", "memory_int8"),
        ("fp16", "fp16", "fp16"),
    ):
        cells = []
        for field, ours in ((weights, sizes.weights), (memory, sizes.memory)):
            count = getattr(sizes, field)
            cells += [
                f'<td class="number">{marked_bytes(f"sizes.{field}", count)}</td>',
                f'<td class="number">{ABSENT if count is None or ours is None else ratio(ours, count)}</td>',
            ]
        ours_class = ' class="ours"' if weights == "weights" else ""
        rows.append(f'<tr{ours_class}><th scope="row">{name}</th>{"".join(cells)}</tr>\n')
    table = html_table(
        ("weights", "file, bytes", "this / it", "memory, bytes", "this / it"), rows, numbers=True
    )
    whole = [("all files", "artifact", sizes.artifact), ("all files, zipped", "transport", sizes.transport)]
    listed = "".join(
        f"<div><dt>{name}</dt><dd>{marked_bytes(f'sizes.{field}', count)} bytes"
        f"{'' if count is None else f' ({readable_bytes(count)})'}</dd></div>"
        for name, field, count in whole
    )
    if sizes.linears is not None and sizes.linear_weights:
        listed += (
            f"<div><dt>linears</dt><dd>{marked_bytes('sizes.linears', sizes.linears)} bytes, "
            f"{sizes.linears * 8 / sizes.linear_weights:.3f} bits per weight over "
            f"{marked_bytes('sizes.linear_weights', sizes.linear_weights)} weights</dd></div>"
        )
    notes = note_list(report.notes, "facts")
    return page_section(
        "Size",
        f'<div class="columns"><div>{table}<dl class="facts">{listed}</dl>'
        '<p class="note">Files include the tokenizer, not this report. Plain int4 and int8 store every linear in '
        "groups of 32 inputs, the rest as here. Memory is the tensors of the loaded graph; what a runtime adds is "
        f"not counted.</p></div>{plot_figure(drawn.get('sizes'))}</div>{notes}",
    )


def _tasks(report: Report) -> str:
    table = task_table(report)
    return page_section("Tasks", plain_table(table)) if table.rows else ""


def _structure(report: Report) -> str:
    table = diagnostic_table(report)
    return page_section("Structure", plain_table(table)) if table.rows else ""


def _foot(report: Report) -> str:
    return (
        "<footer><p>The same figures for programs: <code>compot/report.json</code>, schema "
        f"{report.schema_version}.{report.schema_minor}, metrics version {report.accuracy.metrics_version}. Checked "
        "again by <code>compot-deploy check</code>.</p></footer>"
    )
