"""Drawings as SVG that take their colours and their typeface from the page around them.

Drawn by matplotlib in placeholder colours, which then become CSS variables: one drawing serves the light and
the dark theme and paper. Text stays text. Nothing refers to anything outside of the drawing.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 440
"""Of every drawing, in CSS pixels: on a phone it shrinks by a quarter and can still be read."""

FONT: Final = 11

COLOURS: Final = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "surface": "#040404",
    "accent": "#050505",
    "second": "#060606",
    "other": "#070707",
}
"""Placeholder of each CSS variable."""


PAGE_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "font.size": FONT,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.color": COLOURS["line"],
    "ytick.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
}
"""Settings of matplotlib for every drawing."""


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


def canvas_of(height: int) -> tuple[Any, Any]:
    """A figure without any global state, one unit of which is a CSS pixel."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(canvas)
    return canvas, canvas.add_subplot()


def add_legend(canvas: Any, axes: Any) -> None:
    """What the colours mean, above the axes."""
    canvas.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        ncols=3,
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0.1,
        fontsize=FONT - 0.5,
    )


def plain_decades(axes: Any) -> None:
    """Labels such as 0.01 and 0.05 instead of powers, which would need mathematical text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    few = math.log10(high / low) < 2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg_of(canvas: Any, name: str) -> str:
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
    for variable, placeholder in COLOURS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    text = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    # A hundredth of a pixel is enough: in attributes, not in text.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()
