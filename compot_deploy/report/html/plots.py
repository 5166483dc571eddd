"""The plots of a report: sizes, divergence, errors by block, and the frontier of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from compot_deploy.accuracy.metrics import KL_EDGES
from compot_deploy.errors import MissingDependencyError
from compot_deploy.report.document import Report, Sizes
from compot_deploy.report.facts import LayerFigures
from compot_deploy.report.figures import figure, readable_bytes
from compot_deploy.report.html.drawing import (
    COLOURS,
    FONT,
    PAGE_STYLE,
    Plot,
    add_legend,
    canvas_of,
    plain_decades,
    svg_of,
)
from compot_deploy.report.steps import steps

_MOST_POINTS: Final = 1000
"""Of a scatter plot: more would be a blot, and a megabyte of page."""


def plots(report: Report) -> Mapping[str, Plot]:
    """Every plot for which the report has figures: ``sizes``, ``divergence``, ``errors``, ``frontier``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError("matplotlib", "report", "Plots in the HTML report") from None
    drawn = {}
    for name, draw in (
        ("sizes", _sizes),
        ("divergence", _divergence),
        ("errors", _errors),
        ("frontier", _frontier),
    ):
        with matplotlib.rc_context({**PAGE_STYLE, "svg.hashsalt": name}):
            plot = draw(report)
        if plot is not None:
            drawn[name] = plot
    return drawn


@dataclass(frozen=True)
class _Bar:
    """One bar of the sizes: what it is of, its bytes, where it stands, and whether it is the artifact's own."""

    name: str
    bytes: int
    place: float
    ours: bool


def _size_bars(sizes: Sizes) -> tuple[list[tuple[float, str]], list[_Bar], float]:
    """Titles of groups with their places, bars from top to bottom, and where the last one ends."""
    groups: list[tuple[str, list[tuple[str, int | None, bool]]]] = [
        (
            "weights in the file",
            [
                ("this", sizes.weights, True),
                ("plain int4", sizes.plain_int4, False),
                ("plain int8", sizes.plain_int8, False),
                ("fp16", sizes.fp16, False),
            ],
        ),
        (
            "weights in memory",
            [
                ("this", sizes.memory, True),
                ("plain int4", sizes.memory_int4, False),
                ("plain int8", sizes.memory_int8, False),
                ("fp16", sizes.fp16, False),
            ],
        ),
        (
            "all files",
            [("this", sizes.artifact, True), ("this, zipped", sizes.transport, True)],
        ),
    ]
    titles: list[tuple[float, str]] = []
    bars: list[_Bar] = []
    place = 0.0
    for title, entries in groups:
        known = [(name, count, ours) for name, count, ours in entries if count is not None]
        if not any(ours for _, _, ours in known):
            continue
        titles.append((place, title))
        place += 1.0
        for name, count, ours in known:
            bars.append(_Bar(name, count, place, ours))
            place += 1.0
        place += 0.4
    return titles, bars, place


def _sizes(report: Report) -> Plot:
    titles, bars, end = _size_bars(report.sizes)
    canvas, axes = canvas_of(height=30 + round(19 * end))
    longest = float(max([bar.bytes for bar in bars] + [1]))
    axes.barh(
        [bar.place for bar in bars],
        [float(bar.bytes) for bar in bars],
        height=0.72,
        color=[COLOURS["accent" if bar.ours else "other"] for bar in bars],
    )
    for bar in bars:
        axes.text(
            bar.bytes + longest * 0.015,
            bar.place,
            readable_bytes(bar.bytes),
            va="center",
            color=COLOURS["ink" if bar.ours else "muted"],
            weight="bold" if bar.ours else "normal",
        )
    # Horizontal positions in parts of the axes, vertical ones in data.
    for place, title in titles:
        axes.text(-0.215, place, title, transform=axes.get_yaxis_transform(), va="center", weight="bold")
    axes.set_yticks([bar.place for bar in bars], [bar.name for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, longest * 1.2)
    axes.set_ylim(end - 0.6, -0.7)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    canvas.subplots_adjust(left=0.185, right=0.99, top=0.995, bottom=0.01)
    return Plot(
        svg_of(canvas, "sizes"),
        "Bytes of the weights in the file and once loaded, beside the same model in plain integers and fp16; then all "
        "files together, and as one zip.",
        "Sizes beside plain int4, plain int8 and fp16",
    )


_EDGES: Final = tuple(math.log10(edge) for edge in KL_EDGES)
_BIN: Final = _EDGES[1] - _EDGES[0]
_BINS: Final = (_EDGES[0] - _BIN, *_EDGES)
"""Width and left ends of the bins, as powers of ten; the outer ones are open."""


def _divergence(report: Report) -> Plot | None:
    compared = [(name, loss) for name, loss in steps(report).items() if loss.comparison.positions > 0]
    compared.append(("numerical noise", report.accuracy.noise))
    rows = [
        (name, loss.comparison.divergence)
        for name, loss in compared
        if loss.comparison.divergence is not None
    ]
    used = [number for _, found in rows for number, count in enumerate(found.histogram) if count]
    if not used:
        return None
    first, last = min(used), max(used)
    canvas, axes = canvas_of(height=52 + 44 * len(rows))
    for row, (name, found) in enumerate(rows):
        colour = COLOURS["muted" if name == "numerical noise" else "accent" if name == "total" else "second"]
        _draw_histogram(axes, row, found.histogram, colour)
        mean = found.mean.value
        if mean > 0:
            _draw_mean(axes, row, mean, right=_BINS[last] - 4 * _BIN)
    axes.set_xlim(_BINS[max(0, first - 1)], _BINS[min(len(_BINS) - 1, last + 1)] + _BIN)
    axes.set_ylim(len(rows) - 0.85, -1.0)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    step = 2 if high - low > 5 else 1
    ticks = [tick for tick in range(-10, 3, step) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
    axes.set_xlabel("KL divergence of a position [nats]")
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    canvas.subplots_adjust(left=0.245, right=0.985, top=0.995, bottom=42 / (52 + 44 * len(rows)))
    return Plot(
        svg_of(canvas, "divergence"),
        "How the positions of the evaluation text spread over the KL divergence that each step adds; each row is "
        "scaled to its own height. Positions below 1e-10 are in the leftmost bin.",
        "Histograms of the KL divergence of each step",
    )


def _draw_histogram(axes: Any, row: int, histogram: tuple[int, ...], colour: str) -> None:
    tallest = max(histogram) or 1
    filled = [number for number, count in enumerate(histogram) if count]
    span = slice(filled[0], filled[-1] + 1) if filled else slice(0)
    outline_x, outline_y = [], []
    for left, count in zip(_BINS[span], histogram[span], strict=True):
        outline_x += [left, left + _BIN]
        outline_y += [row - 0.78 * count / tallest] * 2
    axes.fill_between(outline_x, outline_y, row, color=colour, alpha=0.28, linewidth=0)
    axes.axhline(row, color=colour, linewidth=0.8)
    axes.plot(outline_x, outline_y, color=colour, linewidth=1)


def _draw_mean(axes: Any, row: int, mean: float, right: float) -> None:
    """A line at the mean, its figure beside it: on the left of what lies beyond `right`."""
    at = max(math.log10(mean), _BINS[0])
    axes.plot([at, at], [row, row - 0.9], color=COLOURS["ink"], linewidth=1.2)
    near_right = at > right
    axes.text(
        at + (-0.08 if near_right else 0.08),
        row - 0.74,
        f"mean {figure(mean)}",
        ha="right" if near_right else "left",
        fontsize=FONT - 1.5,
        color=COLOURS["muted"],
    )


def _errors(report: Report) -> Plot | None:
    layers = [layer for layer in report.layers if layer.error is not None and layer.block is not None]
    if not 0 < len(layers) <= _MOST_POINTS:
        return None
    canvas, axes = canvas_of(height=250)
    roles = sorted({layer.role for layer in layers}, key=[layer.role for layer in layers].index)

    def at(layer: LayerFigures) -> float:  # side by side within a block, in the order of the model
        return (layer.block or 0) + 0.64 * ((roles.index(layer.role) + 0.5) / len(roles) - 0.5)

    for kind, label, marker in (
        ("factorized", "dictionary and codes", "o"),
        ("quantized", "plain integers", "s"),
        ("dense", "floating point", "D"),
    ):
        own = [layer for layer in layers if layer.kind == kind]
        if own:
            axes.plot(
                [at(layer) for layer in own],
                [layer.error for layer in own],
                marker,
                color=COLOURS["accent" if kind == "factorized" else "other"],
                markersize=5,
                markeredgewidth=0,
                alpha=0.85,
                label=label,
            )
    before = [layer for layer in layers if layer.unquantized_error is not None]
    if before:
        axes.plot(
            [at(layer) for layer in before],
            [layer.unquantized_error for layer in before],
            "_",
            color=COLOURS["ink"],
            markersize=9,
            markeredgewidth=1.2,
            label="before quantization",
        )
    axes.set_xlabel("block")
    axes.set_ylabel("relative error of the output")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    add_legend(canvas, axes)
    canvas.subplots_adjust(left=0.125, right=0.985, top=0.85, bottom=0.175)
    return Plot(
        svg_of(canvas, "errors"),
        "Relative error of each matrix's output on calibration text, as deployed"
        + (" and, as a dash, before its factors were quantized." if before else "."),
        "Error of every matrix by block",
    )


def _frontier(report: Report) -> Plot | None:
    planned = report.frontier
    if planned is None or not (planned.all_schemes or planned.plain):
        return None
    canvas, axes = canvas_of(height=280)
    for label, points, colour in (
        ("plain integers alone", planned.plain, "other"),
        ("all schemes", planned.all_schemes, "second"),
    ):
        shown = [point for point in points if point.loss > 0]
        if shown:
            axes.plot(
                [point.bits for point in shown],
                [point.loss for point in shown],
                ".-",
                color=COLOURS[colour],
                linewidth=1.4,
                markersize=5,
                label=label,
            )
    if planned.chosen.loss > 0:
        axes.plot(
            [planned.chosen.bits],
            [planned.chosen.loss],
            "o",
            color=COLOURS["accent"],
            markeredgecolor=COLOURS["surface"],
            markeredgewidth=1.5,
            markersize=10,
            label="chosen",
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"bits per weight of the linears, in the {planned.counts}, everything counted")
    axes.set_ylabel("predicted loss [nats per token]")
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    plain_decades(axes)
    add_legend(canvas, axes)
    canvas.subplots_adjust(left=0.165, right=0.985, top=0.87, bottom=0.155)
    return Plot(
        svg_of(canvas, "frontier"),
        "The least loss that any choice of schemes is predicted to have at each size; the loss of a whole plan is the "
        "sum of what each matrix was measured to cost alone.",
        "Predicted loss against bits per weight, with the chosen point",
    )
