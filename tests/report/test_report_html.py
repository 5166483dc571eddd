"""Laws of the page: it says what report.json says, needs nothing from anywhere, and text stays text."""

from __future__ import annotations

import html
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from test_report import DIAGNOSTICS, loss, report

from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.accuracy.outcome import Continuation
from compot_deploy.report.document import Alternative, Report, Sizes
from compot_deploy.report.facts import Frontier, FrontierPoint, LayerFigures, Origin
from compot_deploy.report.html.page import to_html
from compot_deploy.report.html.plots import plots
from compot_deploy.report.json import to_json

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
HOSTILE = (
    '</p></script><script>alert(1)</script><img src=http://evil.example/x onerror="x"> & \' \x1b[2J \ud800'
)
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer(block: int | None, role: str, number: int) -> LayerFigures:
    factorized = number % 3 != 0 and block is not None
    return LayerFigures(
        name=role if block is None else f"model.layers.{block}.{role}",
        block=block,
        role=role,
        kind="factorized" if factorized else "quantized",
        choice="k 96, 48:96: int4/g32 · int4/g32" if factorized else "int4/g32",
        inputs=192,
        outputs=192,
        bytes=15_552 + number,
        plain_int4_bytes=20_736,
        bits=3.375 + number / 1000,
        error=None if block is None else 0.1 + number / 1000,
        unquantized_error=0.09 + number / 1000 if factorized else None,
        sensitivity=0.25 + number / 7,
        reason="" if factorized else "the plan chose int4/g32",
    )


def full(blocks: int = 3) -> Report:
    """A report in which everything is there."""
    layers = [layer(None, "model.embed_tokens", 0)]
    for block in range(blocks):
        layers += [layer(block, role, len(layers)) for role in ROLES]
    points = tuple(FrontierPoint(1000 * n, 1.5 + n / 2, 1.25 / 2**n) for n in range(1, 6))
    made = report(diagnostics=DIAGNOSTICS[1:])
    return replace(
        made,
        sizes=Sizes(
            5_250_001, 4_200_002, 4_500_003, 8_000_004, 15_000_005, 4_900_006, 4_600_007, 4_800_008, 8_100_009
        ),
        layers=tuple(layers),
        frontier=Frontier("file", 3456, 777_777, points[1], points, points[2:]),
        alternatives=(
            Alternative("gptq int4/g32", 4_200_010, 3.5, 20, 28, loss("original", "gptq", 0.9)),
            Alternative("plain", 4_199_011, 3.25, 0, 28, loss("original", "plain", 0.8)),
        ),
        origin=Origin("ab" * 32, "some text", "cd" * 32, 128, 32_768, 7),
        accuracy=replace(
            made.accuracy,
            factorization=loss("original", "factors", 0.7),
            quantization=loss("factors", "dequantized", 0.3),
        ),
    )


class Page(HTMLParser):
    """Collects tags, attributes and figures, and refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.fields: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "data":
            self.fields.append({name: value or "" for name, value in attrs} | {"shown": ""})
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (self.open[-5:], tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.fields[-1]["shown"] += data


def at(document: Any, path: str) -> Any:
    for part in path.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def number_in(text: str) -> float:
    match = re.match(r"[\d,.]+(?:e[+-]?\d+)?", text)
    assert match is not None, text
    return float(match[0].replace(",", ""))


def test_every_figure_of_the_page_is_the_figure_of_report_json() -> None:
    made = full()
    document = json.loads(to_json(made))
    page = Page(to_html(made))
    for entry in page.fields:
        value = at(document, entry["data-field"])
        if value is None:
            assert entry["value"] == "" and entry["shown"] == "—", entry
            continue
        assert float(entry["value"]) == value, entry
        text, unit = entry["shown"], 1.0
        for name, size in ((" kB", 1e3), (" MB", 1e6), (" %", 0.01)):
            unit = size if text.endswith(name) else unit
        assert number_in(text) * unit == pytest.approx(value, rel=0.006, abs=1e-9), entry


def test_the_page_shows_every_size_loss_criterion_layer_and_point() -> None:
    made = full()
    document = json.loads(to_json(made))
    shown = {entry["data-field"] for entry in Page(to_html(made)).fields}
    wanted = {f"sizes.{name}" for name in document["sizes"]} - {"sizes.linears", "sizes.linear_weights"}
    wanted |= {f"accuracy.gate.criteria.{n}.{key}" for n in range(2) for key in ("value", "threshold")}
    for key in (
        "factorization", "quantization", "method", "export_exact", "export_shipped", "total", "noise",
    ):  # fmt: skip
        wanted |= {
            f"accuracy.{key}.comparison.{name}"
            for name in ("nmse", "perplexity_ratio.value", "divergence.mean.value", "divergence.p99")
        }
    wanted |= {f"alternatives.{n}.loss.comparison.nmse" for n in range(2)}
    for n in range(len(made.layers)):
        wanted |= {f"layers.{n}.{key}" for key in ("bits", "bytes", "error", "unquantized_error", "effect")}
    wanted |= {f"frontier.all_forms.{n}.loss" for n in range(5)} | {"frontier.chosen.bytes"}
    assert wanted <= shown


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("reference", [True, False])
def test_the_page_is_well_formed_whatever_is_missing(passed: bool, reference: bool) -> None:
    made = report(passed, reference, DIAGNOSTICS)
    text = to_html(made)
    page = Page(text)
    assert page.tags.count("html") == page.tags.count("main") == page.tags.count("h1") == 1
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    state = "FAILED" if not made.passed else "PASSED"
    body = text[text.index("<body") :]
    assert body.index(state) < body.index("<h2>Gate") < body.index("<h2>Size") < body.index("<h2>Loss")


def loads(text: str) -> list[str]:
    """Everything in a page that a browser might fetch."""
    page = Page(text)
    found = [
        f"{tag} {name}={value}"
        for tag, name, value in page.attributes
        if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background")
        and not value.startswith("#")
    ]
    found += [value for value in re.findall(r"url\(([^)]*)\)", text) if not value.startswith("#")]
    found += re.findall(r"@import[^;]*", text)
    return found + [
        tag for tag in page.tags if tag in ("script", "iframe", "object", "embed", "link", "base")
    ]


def test_the_page_asks_nobody_for_anything() -> None:
    text = to_html(full())
    assert loads(text) == []
    assert "://" not in text
    assert "default-src 'none'" in html.unescape(text)
    assert loads('<img src="http://a/b">') and loads("<style>@import 'x';</style>")  # the law can fail


def test_what_a_drawing_refers_to_is_in_it() -> None:
    for name, plot in plots(full()).items():
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', plot.svg))
        made = re.findall(r'\bid="([^"]+)"', plot.svg)
        assert used == set(made) and len(made) == len(set(made)), name
        assert "#0" not in plot.svg and "DejaVu" not in plot.svg  # every colour and typeface is the page's
        assert "xmlns" not in plot.svg and "<style" not in plot.svg


def test_text_of_a_model_stays_text() -> None:
    made = full()
    hostile = replace(
        made,
        model=HOSTILE,
        artifact=HOSTILE,
        notes=(HOSTILE,),
        recipe={HOSTILE: HOSTILE, "many": (HOSTILE,)},
        versions={HOSTILE: HOSTILE},
        diagnostics=tuple(
            replace(diagnostic, where=HOSTILE, sentence=HOSTILE) for diagnostic in made.diagnostics
        ),
        layers=tuple(
            replace(one, name=HOSTILE, role=HOSTILE, choice=HOSTILE, reason=HOSTILE) for one in made.layers
        ),
        origin=Origin(HOSTILE, HOSTILE, HOSTILE, 1, 1, 1),
        accuracy=replace(
            made.accuracy,
            continuations=(Continuation(HOSTILE, HOSTILE, HOSTILE + "a", HOSTILE, "", HOSTILE),),
            evaluation=replace(made.accuracy.evaluation, source=HOSTILE, digest=HOSTILE, notes=(HOSTILE,)),
            gate=replace(
                made.accuracy.gate,
                criteria=tuple(
                    replace(one, name=HOSTILE, sentence=HOSTILE) for one in made.accuracy.gate.criteria
                ),
            ),
            split_absent=HOSTILE,
            method=replace(loss(HOSTILE, HOSTILE)),
        ),
    )
    text = to_html(hostile)
    assert loads(text) == []
    assert "<script" not in text and "<img" not in text and "\x1b" not in text
    assert "onerror" in html.unescape(text) and Page(text).tags.count("h1") == 1
    text.encode("utf-8")


def test_every_figure_may_be_missing() -> None:
    made = full()
    comparison = made.accuracy.export_reference.comparison
    nothing = replace(
        comparison,
        positions=0,
        nmse=math.nan,
        perplexity_ratio=Estimate(math.inf, math.nan),
        divergence=replace(comparison.divergence, mean=Estimate(math.nan, math.nan), median=math.nan,
                           histogram=(0,) * len(comparison.divergence.histogram)),
    )  # fmt: skip
    empty = replace(made.accuracy.export_reference, comparison=nothing)
    accuracy = replace(
        made.accuracy, export_reference=empty, export_deployed=empty, method=None, total=None, noise=empty,
        factorization=None, quantization=None, reference_absent="nobody knows", continuations=(),
    )  # fmt: skip
    for layers in ((), tuple(replace(one, error=None, sensitivity=None) for one in made.layers)):
        sizes = Sizes(0, 0, 0, 0, 0)
        text = to_html(
            replace(made, accuracy=accuracy, layers=layers, sizes=sizes, frontier=None, origin=Origin())
        )
        assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()
        Page(text)


def test_without_matplotlib_the_page_has_every_table_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_plots = Page(to_html(full()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = to_html(full())
    without = Page(text)
    assert "compot-deploy[report]" in text and "svg" not in without.tags and "svg" in with_plots.tags
    assert without.fields == with_plots.fields


def test_the_page_of_a_large_model_is_small_and_the_same_twice() -> None:
    made = full(blocks=43)
    assert len(made.layers) > 300
    text = Continuation("p" * 500, "a b " * 400, "a c " * 400, "d", "e" * 90_000)
    texts = (text,) * 12
    made = replace(made, accuracy=replace(made.accuracy, continuations=texts))
    text = to_html(made)
    assert len(text.encode()) < 1_000_000
    assert text == to_html(made)


def test_no_report_makes_a_page_of_two_megabytes() -> None:
    made = full()
    quotes = Continuation(*['"' * n for n in (90_000, 91_000, 92_000, 93_000, 94_000, 95_000)])
    huge = replace(
        made,
        notes=tuple("a linear stays dense: " + "because " * 12 for _ in range(4000)),
        layers=tuple(layer(n // 7, ROLES[n % 7], n) for n in range(4000)),
        accuracy=replace(made.accuracy, continuations=(quotes,) * 40),
    )
    text = to_html(huge)
    assert len(text.encode()) < 2_000_000
    assert "3500 more are in report.json" in text and "28 more prompts are in report.json" in text
    Page(text)


def test_what_differs_is_marked_from_where_it_differs() -> None:
    made = full()
    text = Continuation("once", "upon a time", "upon a mat", "upon a mat", "upon")
    page = to_html(replace(made, accuracy=replace(made.accuracy, continuations=(text,))))
    assert "upon a <mark>mat</mark>" in page and "compressed = file, float32" in page
    assert "upon a time</p>" in page and "upon <em>ends here</em>" in page
