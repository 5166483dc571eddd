"""The report as one HTML page that needs nothing else: no script, no network, no file beside it.

Every figure that `compot_deploy.report.document.to_json` has is marked with its place there, ``data-field``, so that a
program (and a test) can compare the two. All text is escaped: prompts, texts and names come from models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from compot_deploy.accuracy.losses import Continuation, Loss
from compot_deploy.errors import MissingDependencyError
from compot_deploy.report.document import (
    ABSENT,
    Report,
    figure,
    finding_table,
    greedy_matches,
    limit_figure,
    ratio,
    readable_bytes,
    verdict,
)
from compot_deploy.report.html.elements import (
    FOLDED_ROWS,
    LONGEST_TEXT,
    folded,
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
from compot_deploy.report.html.matrices import matrix_section
from compot_deploy.report.html.plots import Plot, plots, steps
from compot_deploy.report.html.style import STYLE

_MOST_TEXTS: Final = 12
"""Prompts that are shown."""


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
        _loss(report, drawn),
        matrix_section(report, drawn),
        _plan(report, drawn),
        _texts(report),
        _structure(report),
        _origin(report),
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


# -- sections ------------------------------------------------------------------------------------------


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
        total, path = report.accuracy.export_shipped, "accuracy.export_shipped.comparison"
        against = "against the compressed model"
    else:
        against = "against the original"
    comparison = total.comparison
    tiles += [
        tile(
            "perplexity ratio",
            marked_estimate(f"{path}.perplexity_ratio", comparison.perplexity_ratio),
            against,
        ),
        tile("same top token", marked_percent(f"{path}.top1_agreement", comparison.top1_agreement), against),
        tile(
            "KL divergence",
            marked_estimate(f"{path}.divergence.mean", comparison.divergence.mean),
            "nats per token, mean",
        ),
        tile(
            "export error",
            marked_number(
                "accuracy.export_exact.comparison.nmse", report.accuracy.export_exact.comparison.nmse
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
    notes = note_list(report.facts, "facts")
    return page_section(
        "Size",
        f'<div class="columns"><div>{table}<dl class="facts">{listed}</dl>'
        '<p class="note">Files include the tokenizer, not this report. Plain int4 and int8 store every linear in '
        "groups of 32 inputs, the rest as here. Memory is the tensors of the loaded graph; what a runtime adds is "
        f"not counted.</p></div>{plot_figure(drawn.get('sizes'))}</div>{notes}",
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
            f"method, {html_text(report.rival.name)}",
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
        row("perplexity, from", nested("reference_perplexity", marked_estimate)),
        row("perplexity, to", nested("candidate_perplexity", marked_estimate)),
        row("perplexity ratio", nested("perplexity_ratio", marked_estimate)),
        row("KL divergence, mean", nested("divergence.mean", marked_estimate)),
        row("median", nested("divergence.median", marked_number)),
        row("90 %", nested("divergence.p90", marked_number)),
        row("99 %", nested("divergence.p99", marked_number)),
        row("largest", nested("divergence.maximum", marked_number)),
        row("same top token", nested("top1_agreement", marked_percent)),
        row("logit NMSE", nested("nmse", marked_number)),
        row("largest logit difference", nested("largest_difference", marked_number)),
        row("same greedy tokens", lambda _, loss: html_text(greedy_matches(loss.greedy))),
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
    table = html_table(("", *head), rows, numbers=True, wide=True, escaped=True)
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
    return page_section(
        "Loss",
        f'<div class="columns">{plot_figure(drawn.get("divergence"))}<div><dl class="facts">{summary}</dl>'
        f"{note_list(notes)}"
        '<p class="note">Losses do not add up: each is measured between two models on the same tokens. The '
        "noise floor is what the order of additions alone changes: an export loss near it is arithmetic."
        f"</p></div></div>{table}",
    )


def _plan(report: Report, drawn: Mapping[str, Plot]) -> str:
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
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed)
    tables = ""
    for title, key, points in (
        ("All forms", "all_forms", planned.all_forms),
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
        f'<div class="columns">{plot_figure(drawn.get("frontier"))}<div><dl class="facts">{facts}</dl>{tables}'
        "</div></div>",
    )


def _texts(report: Report) -> str:
    texts = report.accuracy.continuations
    if not texts:
        return ""
    shown = "".join(_text_card(text) for text in texts[:_MOST_TEXTS])
    if len(texts) > _MOST_TEXTS:
        shown += f'<p class="note">{len(texts) - _MOST_TEXTS} more prompts are in report.json.</p>'
    return page_section(
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
        told, cut = said[:LONGEST_TEXT], "…" if len(said) > LONGEST_TEXT else ""
        rest = told[same:]
        differing = f"<mark>{html_text(rest)}</mark>" if rest and said != first else html_text(rest)
        ended = " <em>ends here</em>" if said != first and not rest and len(said) < len(first) else ""
        cards.append(
            f'<div class="voice"><h4>{" = ".join(speakers)}</h4>'
            f"<p>{html_text(told[:same])}{differing}{cut}{ended}</p></div>"
        )
    prompt = text.prompt[:LONGEST_TEXT]
    return (
        f'<article class="text"><p class="prompt"><span>prompt</span>{html_text(prompt)}</p>'
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
    return page_section("Structure", plain_table(table)) if table.rows else ""


def _origin(report: Report) -> str:
    origin, facts = report.origin, report.accuracy.evaluation
    windows = ""
    if origin.calibration_windows is not None and origin.calibration_tokens is not None:
        windows = (
            f"{marked_bytes('origin.calibration_windows', origin.calibration_windows)} windows, "
            f"{marked_bytes('origin.calibration_tokens', origin.calibration_tokens)} tokens; "
        )
    listed = [
        ("calibration text", html_text(origin.calibration or "not recorded")),
        ("calibration tokens", f"{windows}sha256 {_digest(origin.calibration_digest)}"),
        ("evaluation text", html_text(facts.source)),
        (
            "evaluation tokens",
            f"{marked_bytes('accuracy.evaluation.windows', facts.windows)} windows, "
            f"{marked_bytes('accuracy.evaluation.tokens', facts.tokens)} tokens, "
            f"{marked_bytes('accuracy.evaluation.positions', facts.positions)} positions; "
            f"sha256 {_digest(facts.digest)}",
        ),
        ("original", f"{html_text(report.model)}, sha256 {_digest(origin.source)}"),
        ("seed", ABSENT if origin.seed is None else str(origin.seed)),
        ("judged", html_text(report.created)),
        ("compot-deploy", html_text(report.package)),
        ("original runs in", html_text(_runner(report.accuracy.method, "reference"))),
        ("compressed runs in", html_text(report.accuracy.export_exact.reference)),
        ("file runs in", html_text(report.accuracy.export_shipped.candidate)),
    ]
    facts_list = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed)
    knobs = [
        f'<tr><th scope="row"><code>{html_text(name)}</code></th><td>{html_text(_plain(value))}</td></tr>\n'
        for name, value in report.recipe.items()
    ]
    versions = [
        f'<tr><th scope="row"><code>{html_text(name)}</code></th><td>{html_text(value)}</td></tr>\n'
        for name, value in report.versions.items()
    ]
    tables = ""
    if knobs:
        tables += folded("Recipe: every knob", html_table(("knob", "value"), knobs), len(knobs))
    if versions:
        tables += folded("Versions of libraries", html_table(("library", "version"), versions), len(versions))
    return page_section("Calibration and provenance", f'<dl class="facts">{facts_list}</dl>{tables}')


def _foot(report: Report) -> str:
    return (
        "<footer><p>The same figures for programs: <code>compot/report.json</code>, schema "
        f"{report.schema_version}.{report.schema_minor}, metrics version {report.accuracy.metrics_version}. Checked "
        "again by <code>compot-deploy check</code>.</p></footer>"
    )


def _digest(value: str | None) -> str:
    return ABSENT if value is None else f'<code class="digest">{html_text(value)}</code>'


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _runner(loss: Loss | None, which: str) -> str:
    return ABSENT if loss is None else str(getattr(loss, which))
