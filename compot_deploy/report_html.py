"""The report as one HTML page that needs nothing else: no script, no network, no file beside it.

Every figure that `compot_deploy.report.to_json` has is marked with its place there, ``data-field``, so that a
program (and a test) can compare the two. All text is escaped: prompts, texts and names come from models.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from compot_deploy.accuracy import Continuation, Loss
from compot_deploy.errors import MissingDependencyError
from compot_deploy.measures import Estimate
from compot_deploy.report import (
    ABSENT,
    Report,
    Table,
    choice_table,
    estimate,
    figure,
    finding_table,
    greedy_matches,
    limit_figure,
    percent,
    printable,
    ratio,
    readable_bytes,
    verdict,
)
from compot_deploy.report_facts import LayerFigures
from compot_deploy.report_plots import Plot, plots, steps
from compot_deploy.report_style import STYLE

_LONGEST_TEXT: Final = 3_000
"""Characters of a continuation that are shown; report.json has the rest."""

_MOST_TEXTS: Final = 12
"""Prompts that are shown."""

_MOST_ROWS: Final = 500
"""Rows of a table and entries of a list that are shown; report.json has the rest. These limits keep the page
below 2 MB whatever the report."""

_FOLDED_ROWS: Final = 12
"""Tables with more rows are folded on a screen; on paper they are open."""

_FOLDED_NOTES: Final = 6
"""Longer lists of notes are folded."""

_PROJECTION: Final = "_proj"

_STEPS: Final = 7
"""Shades of a map."""


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
        missing = f'<p class="note">{_text(str(error))}</p>'
    sections = [
        _gate(report),
        _size(report, drawn),
        _loss(report, drawn),
        _layers(report, drawn),
        _plan(report, drawn),
        _texts(report),
        _structure(report),
        _origin(report),
    ]
    title = f"{_text(report.artifact)}: {'passed' if report.passed else 'failed'}"
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


# -- sections ------------------------------------------------------------------------------------------


def _head(report: Report) -> str:
    state = "passed" if report.passed else "failed"
    tiles = [
        _tile(
            "weights",
            _field("sizes.weights", report.sizes.weights, readable_bytes(report.sizes.weights)),
            f"{ratio(report.sizes.weights, report.sizes.fp16)} of fp16, "
            f"{ratio(report.sizes.weights, report.sizes.plain_int4)} of plain int4",
        )
    ]
    total, path = report.accuracy.total, "accuracy.total.comparison"
    if total is None:
        total, path = report.accuracy.export_shipped, "accuracy.export_shipped.comparison"
        against = "against the compressed model"
    else:
        against = "against the original"
    comparison = total.comparison
    tiles += [
        _tile(
            "perplexity ratio",
            _estimate(f"{path}.perplexity_ratio", comparison.perplexity_ratio),
            against,
        ),
        _tile("same top token", _percent(f"{path}.top1_agreement", comparison.top1_agreement), against),
        _tile(
            "KL divergence",
            _estimate(f"{path}.divergence.mean", comparison.divergence.mean),
            "nats per token, mean",
        ),
        _tile(
            "export error",
            _number("accuracy.export_exact.comparison.nmse", report.accuracy.export_exact.comparison.nmse),
            "NMSE that the file adds, exactly computed",
        ),
    ]
    return (
        f'<header class="{state}">\n<p class="kicker">compot-deploy report</p>\n'
        f'<h1>{_text(report.artifact)}</h1>\n<p class="sub">{_text(report.model)} '
        f'<span class="chip">{_text(report.format)}</span></p>\n'
        f'<p class="verdict"><strong class="badge">{state.upper()}</strong> '
        f"{_text(verdict(report).partition(': ')[2])}</p>\n"
        f'<dl class="tiles">\n{"".join(tiles)}</dl>\n</header>'
    )


def _gate(report: Report) -> str:
    rows = []
    for number, criterion in enumerate(report.accuracy.gate.criteria):
        place = f"accuracy.gate.criteria.{number}"
        state = "passed" if criterion.passed else "failed"
        meaning = criterion.sentence.partition(": ")[0]
        rows.append(
            f'<tr class="{state}"><th scope="row"><code>{_text(criterion.name)}</code>'
            f"<small>{_text(meaning)}</small></th>"
            f'<td class="number">{_field(f"{place}.value", criterion.value, limit_figure(criterion.value))}</td>'
            f'<td class="number">{criterion.relation} '
            f"{_field(f'{place}.threshold', criterion.threshold, limit_figure(criterion.threshold))}</td>"
            f'<td><strong class="state">{state}</strong></td></tr>\n'
        )
    columns = (
        "criterion",
        *(f'<span class="number">{name}</span>' for name in ("value", "limit")),
        "verdict",
    )
    return _section("Gate", f'<div class="gate">{_table(columns, rows, escaped=True)}</div>')


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
                f'<td class="number">{_bytes(f"sizes.{field}", count)}</td>',
                f'<td class="number">{ABSENT if count is None or ours is None else ratio(ours, count)}</td>',
            ]
        ours_class = ' class="ours"' if weights == "weights" else ""
        rows.append(f'<tr{ours_class}><th scope="row">{name}</th>{"".join(cells)}</tr>\n')
    table = _table(("weights", "file, bytes", "this / it", "memory, bytes", "this / it"), rows, numbers=True)
    whole = [("all files", "artifact", sizes.artifact), ("all files, zipped", "transport", sizes.transport)]
    listed = "".join(
        f"<div><dt>{name}</dt><dd>{_bytes(f'sizes.{field}', count)} bytes"
        f"{'' if count is None else f' ({readable_bytes(count)})'}</dd></div>"
        for name, field, count in whole
    )
    if sizes.linears is not None and sizes.linear_weights:
        listed += (
            f"<div><dt>linears</dt><dd>{_bytes('sizes.linears', sizes.linears)} bytes, "
            f"{sizes.linears * 8 / sizes.linear_weights:.3f} bits per weight over "
            f"{_bytes('sizes.linear_weights', sizes.linear_weights)} weights</dd></div>"
        )
    notes = _list(report.facts, "facts")
    return _section(
        "Size",
        f'<div class="columns"><div>{table}<dl class="facts">{listed}</dl>'
        '<p class="note">Files include the tokenizer, not this report. Plain int4 and int8 store every linear in '
        "groups of 32 inputs, the rest as here. Memory is the tensors of the loaded graph; what a runtime adds is "
        f"not counted.</p></div>{_figure(drawn.get('sizes'))}</div>{notes}",
    )


def _loss(report: Report, drawn: Mapping[str, Plot]) -> str:
    accuracy = report.accuracy
    losses: dict[str, tuple[str, Loss | None, str]] = {}
    if accuracy.factorization is not None:
        losses["factorization"] = (
            "factorisation",
            accuracy.factorization,
            "original → factors, not quantized",
        )
        losses["quantization"] = ("quantization", accuracy.quantization, "factors → quantized factors")
    losses["method"] = ("method", accuracy.method, "original → compressed, in torch")
    if report.rival is not None:
        losses["rival"] = (
            f"method, {_text(report.rival.name)}",
            report.rival.loss,
            "the same factors, another quantizer",
        )
    losses["export_exact"] = ("export, exact", accuracy.export_exact, "compressed → file, computed exactly")
    losses["export_shipped"] = (
        "export, shipped",
        accuracy.export_shipped,
        "compressed → file as it ships",
    )
    losses["total"] = ("total", accuracy.total, "original → file as it ships")
    losses["noise"] = ("noise floor", accuracy.noise, "torch against itself, token by token")
    measured = {key: (name, loss, what) for key, (name, loss, what) in losses.items() if loss is not None}

    def row(label: str, cell: Any) -> str:
        cells = "".join(
            f'<td class="number">{cell(_place(key), loss)}</td>' for key, (_, loss, _) in measured.items()
        )
        return f'<tr><th scope="row">{label}</th>{cells}</tr>\n'

    def nested(path: str, formatter: Any) -> Any:
        def cell(place: str, loss: Loss) -> str:
            value: Any = loss.comparison
            for part in path.split("."):
                value = getattr(value, part)
            return formatter(f"{place}.{path}", value)

        return cell

    rows = [
        row("perplexity, from", nested("reference_perplexity", _estimate)),
        row("perplexity, to", nested("candidate_perplexity", _estimate)),
        row("perplexity ratio", nested("perplexity_ratio", _estimate)),
        row("KL divergence, mean", nested("divergence.mean", _estimate)),
        row("median", nested("divergence.median", _number)),
        row("90 %", nested("divergence.p90", _number)),
        row("99 %", nested("divergence.p99", _number)),
        row("largest", nested("divergence.maximum", _number)),
        row("same top token", nested("top1_agreement", _percent)),
        row("logit NMSE", nested("nmse", _number)),
        row("largest logit difference", nested("largest_difference", _number)),
        row("same greedy tokens", lambda _, loss: _text(greedy_matches(loss.greedy))),
    ]
    head = tuple(f"{name}<small>{what}</small>" for name, _, what in measured.values())
    facts = accuracy.evaluation
    notes = [
        f"{facts.positions:,} positions in {facts.windows} windows of {facts.source}; figures of metrics version "
        f"{accuracy.metrics_version}. KL divergence is in nats per token; ± is one standard error.",
        *(f"{note}." for note in facts.notes),
    ]
    if accuracy.reference_absent is not None:
        notes.append(f"No method and total loss: {accuracy.reference_absent}.")
    elif accuracy.factorization is None and accuracy.split_absent is not None:
        notes.append(
            f"The method loss is not split into factorisation and quantization: {accuracy.split_absent}."
        )
    table = _table(("", *head), rows, numbers=True, wide=True, escaped=True)
    bad = sum(
        loss.comparison.nonfinite_reference + loss.comparison.nonfinite_candidate
        for _, loss, _ in measured.values()
        if loss is not None
    )
    if report.rival is not None:
        notes.append(
            f"{report.rival.name} is the same model with the same factors, quantized otherwise, in "
            f"{report.rival.bytes:,} bytes of weights; this one has {report.sizes.weights:,}."
        )
    if bad:
        notes.append(f"{bad} logits are NaN or infinite; their positions are left out.")
    summary = "".join(
        f"<div><dt>{name}</dt><dd>{figure(loss.comparison.divergence.mean.value)} nats per token, perplexity × "
        f"{loss.comparison.perplexity_ratio.value:.4g}</dd></div>"
        for name, loss in steps(report).items()
    )
    return _section(
        "Loss",
        f'<div class="columns">{_figure(drawn.get("divergence"))}<div><dl class="facts">{summary}</dl>{_list(notes)}'
        '<p class="note">Losses do not add up: each is measured between two models on the same tokens. The '
        "noise floor is what the order of additions alone changes: an export loss near it is arithmetic."
        f"</p></div></div>{table}",
    )


def _layers(report: Report, drawn: Mapping[str, Plot]) -> str:
    if not report.layers:
        return ""
    table = choice_table(report)
    blocks = [layer for layer in report.layers if layer.block is not None]
    maps = ""
    if 0 < len(blocks) <= _MOST_ROWS:
        maps = (
            '<div class="columns maps">'
            + _map("Bits per weight", blocks, "bits", lambda layer: layer.bits, "{:.1f}")
            + _map("Relative error", blocks, "error", lambda layer: layer.error, "{:.3f}")
            + "</div>"
        )
    return _section(
        "Matrices",
        f'<div class="columns"><div>{_plain_table(table, numbers=True)}</div>{_figure(drawn.get("errors"))}</div>'
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
                f'<td data-shade="{shade}" title="{_text(layer.name)}: {_text(layer.choice)}">'
                f"<span{mark}>{form.format(shown)}</span></td>"
            )
        rows.append(f'<tr><th scope="row">{number}</th>{"".join(row)}</tr>\n')
    head = "".join(f'<th scope="col"><span>{_text(_short(role, roles))}</span></th>' for role in roles)
    return (
        f'<figure class="map"><figcaption><strong>{title}</strong> by block (down) and matrix (across), from '
        f'{form.format(low)} to {form.format(high)}; <span class="plain">underlined</span>: not factorised.'
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
    effects = any(layer.effect is not None for layer in layers)
    before = any(layer.unquantized_error is not None for layer in layers)
    rows = []
    for number, layer in enumerate(layers[:_MOST_ROWS]):
        place = f"layers.{number}"
        reason = f"<small>{_text(layer.reason)}</small>" if layer.reason else ""
        cells = [
            f'<th scope="row"><code>{_breakable(layer.name)}</code></th>',
            f'<td class="number">{layer.inputs} × {layer.outputs}</td>',
            f"<td>{_text(layer.choice)}{reason}</td>",
            f'<td class="number">{_field(f"{place}.bits", layer.bits, f"{layer.bits:.2f}")}</td>',
            f'<td class="number">{_bytes(f"{place}.bytes", layer.bytes)}</td>',
            f'<td class="number">{_bytes(f"{place}.plain_int4_bytes", layer.plain_int4_bytes)}</td>',
            f'<td class="number">{_number(f"{place}.error", layer.error)}</td>',
        ]
        if before:
            cells.append(
                f'<td class="number">{_number(f"{place}.unquantized_error", layer.unquantized_error)}</td>'
            )
        if effects:
            cells.append(f'<td class="number">{_number(f"{place}.effect", layer.effect)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    columns = ["matrix", "size", "choice", "bits per weight", "bytes", "plain int4", "error"]
    columns += ["before quantization"] if before else []
    columns += ["effect"] if effects else []
    note = (
        '<p class="note">A shared dictionary counts with the first matrix that uses it; bits per weight are those of '
        "all that share it."
        + (
            " Effect: nats per token that a unit of squared error of this matrix alone costs the model."
            if effects
            else ""
        )
        + "</p>"
    )
    table = _table(columns, rows, wide=True) + _left_out("p", len(layers))
    return _folded(f"Every matrix ({len(layers)})", table + note, len(rows))


def _plan(report: Report, drawn: Mapping[str, Plot]) -> str:
    planned = report.frontier
    if planned is None:
        return ""
    chosen = planned.chosen
    listed = [
        ("budget", f"{_bytes('frontier.budget', planned.budget)} bytes, counted in the {planned.counts}"),
        (
            "chosen",
            f"{_bytes('frontier.chosen.bytes', chosen.bytes)} bytes, "
            f"{_field('frontier.chosen.bits', chosen.bits, f'{chosen.bits:.3f}')} bits per weight",
        ),
        ("predicted loss", f"{_number('frontier.chosen.loss', chosen.loss)} nats per token"),
    ]
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed)
    tables = ""
    for title, key, points in (
        ("All forms", "all_forms", planned.all_forms),
        ("Plain integers alone", "plain", planned.plain),
    ):
        rows = [
            f'<tr><td class="number">{_bytes(f"frontier.{key}.{n}.bytes", point.bytes)}</td>'
            f'<td class="number">{_field(f"frontier.{key}.{n}.bits", point.bits, f"{point.bits:.3f}")}</td>'
            f'<td class="number">{_number(f"frontier.{key}.{n}.loss", point.loss)}</td></tr>\n'
            for n, point in enumerate(points)
        ]
        if rows:
            tables += _folded(
                f"{title}: points of the plot",
                _table(("bytes", "bits per weight", "predicted loss"), rows, numbers=True),
                _FOLDED_ROWS + 1,
            )
    return _section(
        "Plan",
        f'<div class="columns">{_figure(drawn.get("frontier"))}<div><dl class="facts">{facts}</dl>{tables}'
        "</div></div>",
    )


def _texts(report: Report) -> str:
    texts = report.accuracy.continuations
    if not texts:
        return ""
    shown = "".join(_text_card(text) for text in texts[:_MOST_TEXTS])
    if len(texts) > _MOST_TEXTS:
        shown += f'<p class="note">{len(texts) - _MOST_TEXTS} more prompts are in report.json.</p>'
    return _section(
        "Texts side by side",
        '<p class="note">Greedy continuations. What differs from the first is marked from where it starts to '
        f"differ.</p>{shown}",
    )


def _text_card(text: Continuation) -> str:
    voices: dict[str, list[str]] = {}
    for who, said in (
        ("original", text.reference),
        ("factorised", text.factorized),
        ("compressed", text.compressed),
        ("file, exact", text.exact),
        ("file, as shipped", text.exported),
    ):
        if said is not None:
            voices.setdefault(said, []).append(who)
    first = next(iter(voices))
    cards = []
    for said, speakers in voices.items():
        same = _shared(first, said)
        told, cut = said[:_LONGEST_TEXT], "…" if len(said) > _LONGEST_TEXT else ""
        rest = told[same:]
        differing = f"<mark>{_text(rest)}</mark>" if rest and said != first else _text(rest)
        ended = " <em>ends here</em>" if said != first and not rest and len(said) < len(first) else ""
        cards.append(
            f'<div class="voice"><h4>{" = ".join(speakers)}</h4>'
            f"<p>{_text(told[:same])}{differing}{cut}{ended}</p></div>"
        )
    prompt = text.prompt[:_LONGEST_TEXT]
    return (
        f'<article class="text"><p class="prompt"><span>prompt</span>{_text(prompt)}</p>'
        f'<div class="voices">{"".join(cards)}</div></article>\n'
    )


def _place(key: str) -> str:
    """Where a comparison lies in report.json."""
    return "rival.loss.comparison" if key == "rival" else f"accuracy.{key}.comparison"


def _shared(first: str, second: str) -> int:
    """Characters that two texts have in common from the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))


def _structure(report: Report) -> str:
    table = finding_table(report)
    return _section("Structure", _plain_table(table)) if table.rows else ""


def _origin(report: Report) -> str:
    origin, facts = report.origin, report.accuracy.evaluation
    windows = ""
    if origin.calibration_windows is not None and origin.calibration_tokens is not None:
        windows = (
            f"{_bytes('origin.calibration_windows', origin.calibration_windows)} windows, "
            f"{_bytes('origin.calibration_tokens', origin.calibration_tokens)} tokens; "
        )
    listed = [
        ("calibration text", _text(origin.calibration or "not recorded")),
        ("calibration tokens", f"{windows}sha256 {_digest(origin.calibration_digest)}"),
        ("evaluation text", _text(facts.source)),
        (
            "evaluation tokens",
            f"{_bytes('accuracy.evaluation.windows', facts.windows)} windows, "
            f"{_bytes('accuracy.evaluation.tokens', facts.tokens)} tokens, "
            f"{_bytes('accuracy.evaluation.positions', facts.positions)} positions; sha256 {_digest(facts.digest)}",
        ),
        ("original", f"{_text(report.model)}, sha256 {_digest(origin.source)}"),
        ("seed", ABSENT if origin.seed is None else str(origin.seed)),
        ("judged", _text(report.created)),
        ("compot-deploy", _text(report.package)),
        ("original runs in", _text(_runner(report.accuracy.method, "reference"))),
        ("compressed runs in", _text(report.accuracy.export_exact.reference)),
        ("file runs in", _text(report.accuracy.export_shipped.candidate)),
    ]
    facts_list = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed)
    knobs = [
        f'<tr><th scope="row"><code>{_text(name)}</code></th><td>{_text(_plain(value))}</td></tr>\n'
        for name, value in report.recipe.items()
    ]
    versions = [
        f'<tr><th scope="row"><code>{_text(name)}</code></th><td>{_text(value)}</td></tr>\n'
        for name, value in report.versions.items()
    ]
    tables = ""
    if knobs:
        tables += _folded("Recipe: every knob", _table(("knob", "value"), knobs), len(knobs))
    if versions:
        tables += _folded("Versions of libraries", _table(("library", "version"), versions), len(versions))
    return _section("Calibration and provenance", f'<dl class="facts">{facts_list}</dl>{tables}')


def _foot(report: Report) -> str:
    return (
        "<footer><p>The same figures for programs: <code>compot/report.json</code>, schema "
        f"{report.schema_version}.{report.schema_minor}, metrics version {report.accuracy.metrics_version}. Checked "
        "again by <code>compot-deploy check</code>.</p></footer>"
    )


# -- pieces --------------------------------------------------------------------------------------------


def _text(value: str) -> str:
    """Text of anyone as HTML: control characters visible, markup as text."""
    return html.escape(printable(value), quote=True)


def _breakable(name: str) -> str:
    """A module path that may break after its dots."""
    return _text(name).replace(".", ".<wbr>")


def _digest(value: str | None) -> str:
    return ABSENT if value is None else f'<code class="digest">{_text(value)}</code>'


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _runner(loss: Loss | None, which: str) -> str:
    return ABSENT if loss is None else str(getattr(loss, which))


def _field(place: str, value: int | float | None, shown: str) -> str:
    """A figure with its place in report.json and its exact value there."""
    if value is None or not math.isfinite(value):
        return f'<data data-field="{place}" value="">{ABSENT}</data>'
    return f'<data data-field="{place}" value="{value!r}">{_text(shown)}</data>'


def _number(place: str, value: float | None) -> str:
    return _field(place, value, ABSENT if value is None else figure(value))


def _bytes(place: str, value: int | None) -> str:
    return _field(place, value, ABSENT if value is None else f"{value:,}")


def _estimate(place: str, value: Estimate) -> str:
    return _field(f"{place}.value", value.value, estimate(value))


def _percent(place: str, value: Estimate) -> str:
    return _field(f"{place}.value", value.value, percent(value))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _tile(name: str, value: str, note: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>\n"


def _figure(plot: Plot | None) -> str:
    if plot is None:
        return ""
    label = _text(plot.label)
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<figure class="plot">{svg}<figcaption>{_text(plot.caption)}</figcaption></figure>'


def _list(entries: Iterable[str], label: str = "notes") -> str:
    known = list(entries)
    if not known:
        return ""
    items = "".join(f"<li>{_text(entry[:_LONGEST_TEXT])}</li>" for entry in known[:_MOST_ROWS])
    items += _left_out("li", len(known))
    body = f'<ul class="notes">{items}</ul>'
    if len(known) > _FOLDED_NOTES:
        return _folded(f"{len(known)} {label}", body, len(known), _FOLDED_NOTES)
    return body


def _table(
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
        head += f'<th scope="col"{right}>{column if escaped else _text(column)}</th>'
    kind = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody></table>'
        "</div>"
    )


def _plain_table(table: Table, *, numbers: bool = False) -> str:
    """A table of finished strings."""
    right = ' class="number"' if numbers else ""
    rows = [
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td{right}>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in table.rows[:_MOST_ROWS]
    ]
    return _table(table.columns, rows, numbers=numbers) + _left_out("p", len(table.rows)) + _list(table.notes)


def _left_out(tag: str, count: int) -> str:
    """What is said where a list was cut."""
    if count <= _MOST_ROWS:
        return ""
    return f'<{tag} class="note">{count - _MOST_ROWS} more are in report.json.</{tag}>'


def _folded(title: str, body: str, rows: int, most: int = _FOLDED_ROWS) -> str:
    """What is long stays shut on a screen until somebody opens it."""
    shut = "" if rows > most else " open"
    return f"<details{shut}><summary>{_text(title)}</summary>{body}</details>"
