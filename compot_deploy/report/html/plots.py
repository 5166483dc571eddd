"""The plots of a report as SVG that takes its colours and its typeface from the page around it.

Drawn by matplotlib in placeholder colours, which then become CSS variables: one drawing serves the light and
the dark theme and paper. Text stays text. Nothing refers to anything outside of the drawing.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import KL_EDGES
from compot_deploy.errors import MissingDependencyError
from compot_deploy.report.document import Report, figure, readable_bytes
from compot_deploy.report.facts import LayerFigures

WIDTH: Final = 440
"""Of every drawing, in CSS pixels: on a phone it shrinks by a quarter and can still be read."""

_FONT: Final = 11

_MOST_POINTS: Final = 1000
"""Of a scatter plot: more would be a blot, and a megabyte of page."""

_COLOURS: Final = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "surface": "#040404",
    "accent": "#050505",
    "second": "#060606",
    "other": "#070707",
}
"""Placeholder of each CSS variable."""


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        svg: an element to put into a page that defines the variables.
        caption: what it shows, in a sentence or two.
        label: the same in a few words, for those who cannot see it.
    """

    svg: str
    caption: str
    label: str


def plots(report: Report) -> Mapping[str, Plot]:
    """Every plot for which the report has figures: ``sizes``, ``divergence``, ``errors``, ``frontier``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError("matplotlib", "report", "Plots in the HTML report") from None
    settings: Any = {
        "svg.fonttype": "none",
        "font.size": _FONT,
        "axes.edgecolor": _COLOURS["line"],
        "axes.labelcolor": _COLOURS["muted"],
        "text.color": _COLOURS["ink"],
        "xtick.color": _COLOURS["line"],
        "xtick.labelcolor": _COLOURS["muted"],
        "ytick.color": _COLOURS["line"],
        "ytick.labelcolor": _COLOURS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.unicode_minus": True,
    }
    drawn = {}
    for name, draw in (
        ("sizes", _sizes),
        ("divergence", _divergence),
        ("errors", _errors),
        ("frontier", _frontier),
    ):
        with matplotlib.rc_context({**settings, "svg.hashsalt": name}):
            plot = draw(report)
        if plot is not None:
            drawn[name] = plot
    return drawn


# -- the plots -----------------------------------------------------------------------------------------


def _sizes(report: Report) -> Plot:
    sizes = report.sizes
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
    rows: list[tuple[str, float, str, bool]] = []
    places: list[float] = []
    titles: list[tuple[float, str]] = []
    place = 0.0
    for title, entries in groups:
        known = [(name, count, ours) for name, count, ours in entries if count is not None]
        if not any(ours for _, _, ours in known):
            continue
        titles.append((place, title))
        place += 1.0
        for name, count, ours in known:
            rows.append((name, float(count), readable_bytes(count), ours))
            places.append(place)
            place += 1.0
        place += 0.4
    canvas, axes = _canvas(height=30 + round(19 * place))
    longest = max([length for _, length, _, _ in rows] + [1.0])
    axes.barh(
        places,
        [length for _, length, _, _ in rows],
        height=0.72,
        color=[_COLOURS["accent" if ours else "other"] for *_, ours in rows],
    )
    for position, (_, length, text, ours) in zip(places, rows, strict=True):
        axes.text(
            length + longest * 0.015,
            position,
            text,
            va="center",
            color=_COLOURS["ink" if ours else "muted"],
            weight="bold" if ours else "normal",
        )
    for position, title in titles:
        axes.text(-0.215, position, title, transform=_mixed(axes), va="center", weight="bold")
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, longest * 1.2)
    axes.set_ylim(place - 0.6, -0.7)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    canvas.subplots_adjust(left=0.185, right=0.99, top=0.995, bottom=0.01)
    return Plot(
        _svg(canvas, "sizes"),
        "Bytes of the weights in the file and once loaded, beside the same model in plain integers and fp16; then all "
        "files together, and as one zip.",
        "Sizes beside plain int4, plain int8 and fp16",
    )


def _divergence(report: Report) -> Plot | None:
    rows = [(name, loss) for name, loss in steps(report).items() if loss.comparison.positions > 0]
    rows.append(("noise floor", report.accuracy.noise))
    edges = [math.log10(edge) for edge in KL_EDGES]
    width = edges[1] - edges[0]
    places = [edges[0] - width, *edges]  # the left end of each bin; the outer bins are open
    used = [
        index for _, loss in rows for index, count in enumerate(loss.comparison.divergence.histogram) if count
    ]
    if not used:
        return None
    canvas, axes = _canvas(height=52 + 44 * len(rows))
    for row, (name, loss) in enumerate(rows):
        histogram = loss.comparison.divergence.histogram
        tallest = max(histogram) or 1
        filled = [index for index, count in enumerate(histogram) if count]
        span = slice(filled[0], filled[-1] + 1) if filled else slice(0)
        outline_x, outline_y = [], []
        for left, count in zip(places[span], histogram[span], strict=True):
            outline_x += [left, left + width]
            outline_y += [row - 0.78 * count / tallest] * 2
        colour = _COLOURS["muted" if name == "noise floor" else "accent" if name == "total" else "second"]
        axes.fill_between(outline_x, outline_y, row, color=colour, alpha=0.28, linewidth=0)
        axes.axhline(row, color=colour, linewidth=0.8)
        axes.plot(outline_x, outline_y, color=colour, linewidth=1)
        mean = loss.comparison.divergence.mean.value
        if mean > 0:
            at = max(math.log10(mean), places[0])
            axes.plot([at, at], [row, row - 0.9], color=_COLOURS["ink"], linewidth=1.2)
            near_right = at > places[max(used)] - 4 * width
            axes.text(
                at + (-0.08 if near_right else 0.08),
                row - 0.74,
                f"mean {figure(mean)}",
                ha="right" if near_right else "left",
                fontsize=_FONT - 1.5,
                color=_COLOURS["muted"],
            )
    first, last = min(used), max(used)
    axes.set_xlim(places[max(0, first - 1)], places[min(len(places) - 1, last + 1)] + width)
    axes.set_ylim(len(rows) - 0.85, -1.0)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    step = 2 if high - low > 5 else 1
    ticks = [tick for tick in range(-10, 3, step) if low <= tick <= high]
    axes.set_xticks(ticks, [_power(tick) for tick in ticks])
    axes.set_xlabel("KL divergence of a position [nats]")
    axes.grid(axis="x", color=_COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    canvas.subplots_adjust(left=0.245, right=0.985, top=0.995, bottom=42 / (52 + 44 * len(rows)))
    return Plot(
        _svg(canvas, "divergence"),
        "How the positions of the evaluation text spread over the KL divergence that each step adds; each row is "
        "scaled to its own height. Positions below 1e-10 are in the leftmost bin.",
        "Histograms of the KL divergence of each step",
    )


def _errors(report: Report) -> Plot | None:
    layers = [layer for layer in report.layers if layer.error is not None and layer.block is not None]
    if not 0 < len(layers) <= _MOST_POINTS:
        return None
    canvas, axes = _canvas(height=250)
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
                color=_COLOURS["accent" if kind == "factorized" else "other"],
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
            color=_COLOURS["ink"],
            markersize=9,
            markeredgewidth=1.2,
            label="before quantization",
        )
    axes.set_xlabel("block")
    axes.set_ylabel("relative error of the output")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=_COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(canvas, axes)
    canvas.subplots_adjust(left=0.125, right=0.985, top=0.85, bottom=0.175)
    return Plot(
        _svg(canvas, "errors"),
        "Relative error of each matrix's output on calibration text, as it ships"
        + (" and, as a dash, before its factors were quantized." if before else "."),
        "Error of every matrix by block",
    )


def _frontier(report: Report) -> Plot | None:
    planned = report.frontier
    if planned is None or not (planned.all_forms or planned.plain):
        return None
    canvas, axes = _canvas(height=280)
    for label, points, colour in (
        ("plain integers alone", planned.plain, "other"),
        ("all forms", planned.all_forms, "second"),
    ):
        shown = [point for point in points if point.loss > 0]
        if shown:
            axes.plot(
                [point.bits for point in shown],
                [point.loss for point in shown],
                ".-",
                color=_COLOURS[colour],
                linewidth=1.4,
                markersize=5,
                label=label,
            )
    if planned.chosen.loss > 0:
        axes.plot(
            [planned.chosen.bits],
            [planned.chosen.loss],
            "o",
            color=_COLOURS["accent"],
            markeredgecolor=_COLOURS["surface"],
            markeredgewidth=1.5,
            markersize=10,
            label="chosen",
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"bits per weight of the linears, in the {planned.counts}, everything counted")
    axes.set_ylabel("predicted loss [nats per token]")
    axes.grid(color=_COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    _plain_decades(axes)
    _legend(canvas, axes)
    canvas.subplots_adjust(left=0.165, right=0.985, top=0.87, bottom=0.155)
    return Plot(
        _svg(canvas, "frontier"),
        "The least loss that any choice of forms is predicted to have at each size; the loss of a whole plan is the "
        "sum of what each matrix was measured to cost alone.",
        "Predicted loss against bits per weight, with the chosen point",
    )


def steps(report: Report) -> dict[str, Loss]:
    """The losses on the way from the original to the file, in order, where they were measured."""
    accuracy = report.accuracy
    found: dict[str, Loss | None] = {}
    if accuracy.factorization is not None:
        found = {"factorisation": accuracy.factorization, "quantization": accuracy.quantization}
    else:
        found = {"method": accuracy.method}
    found |= {
        "export, exact": accuracy.export_exact,
        "export, shipped": accuracy.export_shipped,
        "total": accuracy.total,
    }
    return {name: loss for name, loss in found.items() if loss is not None}


# -- pieces --------------------------------------------------------------------------------------------


def _canvas(height: int) -> tuple[Any, Any]:
    """A figure without any global state, one unit of which is a CSS pixel."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(canvas)
    return canvas, canvas.add_subplot()


def _mixed(axes: Any) -> Any:
    """Horizontal positions in parts of the axes, vertical ones in data."""
    return axes.get_yaxis_transform()


def _legend(canvas: Any, axes: Any) -> None:
    canvas.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        ncols=3,
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0.1,
        fontsize=_FONT - 0.5,
    )


def _plain_decades(axes: Any) -> None:
    """Labels such as 0.01 and 0.05 instead of powers, which would need mathematical text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    few = math.log10(high / low) < 2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}"


def _svg(canvas: Any, name: str) -> str:
    """The drawing as an element for an HTML page: variables for colours, no identifier of use to nobody."""
    stream = io.StringIO()
    canvas.savefig(
        stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for ballast in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style\b.*?</style>"):
        text = re.sub(ballast, "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    for attribute in ("width", "height", "version"):
        text = re.sub(rf'(<svg\b[^>]*?)\s+{attribute}="[^"]*"', r"\1", text, count=1)
    text = text.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(
        r'\s+id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text
    )
    text = re.sub(r'(href="|url\()#([^")]+)', rf"\1#{name}-\2", text)
    for variable, placeholder in _COLOURS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    text = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    # A hundredth of a pixel is enough: in attributes, not in text.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()
