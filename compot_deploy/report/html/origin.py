"""The section of a report about where the artifact comes from: texts, digests, options, versions."""

from __future__ import annotations

from typing import Any

from compot_deploy.accuracy.losses import Loss
from compot_deploy.report.document import Report
from compot_deploy.report.figures import ABSENT
from compot_deploy.report.html.elements import folded, html_table, html_text, marked_bytes, page_section


def origin_section(report: Report) -> str:
    """The section as HTML."""
    origin, evaluation = report.origin, report.accuracy.evaluation
    windows = ""
    if origin.calibration_windows is not None and origin.calibration_tokens is not None:
        windows = (
            f"{marked_bytes('origin.calibration_windows', origin.calibration_windows)} windows, "
            f"{marked_bytes('origin.calibration_tokens', origin.calibration_tokens)} tokens; "
        )
    listed = [
        ("calibration text", html_text(origin.calibration or "not recorded")),
        ("calibration tokens", f"{windows}sha256 {_digest(origin.calibration_digest)}"),
        ("evaluation text", html_text(evaluation.source)),
        (
            "evaluation tokens",
            f"{marked_bytes('accuracy.evaluation.windows', evaluation.windows)} windows, "
            f"{marked_bytes('accuracy.evaluation.tokens', evaluation.tokens)} tokens, "
            f"{marked_bytes('accuracy.evaluation.positions', evaluation.positions)} positions; "
            f"sha256 {_digest(evaluation.digest)}",
        ),
        ("original", f"{html_text(report.model)}, sha256 {_digest(origin.source)}"),
        ("seed", ABSENT if origin.seed is None else str(origin.seed)),
        ("evaluated", html_text(report.created)),
        ("compot-deploy", html_text(report.package)),
        ("original runs in", html_text(_runner(report.accuracy.method, "reference"))),
        ("compressed runs in", html_text(report.accuracy.export_reference.reference)),
        ("file runs in", html_text(report.accuracy.export_deployed.candidate)),
    ]
    origin_list = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed)
    recipe_options = [
        f'<tr><th scope="row"><code>{html_text(name)}</code></th><td>{html_text(_plain(value))}</td></tr>\n'
        for name, value in report.recipe.items()
    ]
    versions = [
        f'<tr><th scope="row"><code>{html_text(name)}</code></th><td>{html_text(value)}</td></tr>\n'
        for name, value in report.versions.items()
    ]
    tables = ""
    if recipe_options:
        tables += folded(
            "Recipe: every option", html_table(("option", "value"), recipe_options), len(recipe_options)
        )
    if versions:
        tables += folded("Versions of libraries", html_table(("library", "version"), versions), len(versions))
    return page_section("Calibration and provenance", f'<dl class="facts">{origin_list}</dl>{tables}')


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
