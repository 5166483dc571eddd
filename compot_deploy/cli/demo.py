"""The model that ships, compressed four ways, in one table: what the product is for, in less than a minute."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from compot_deploy.cli.arguments import Parser
from compot_deploy.cli.output import print_table, progress_on
from compot_deploy.errors import EXIT_CODES, EXIT_GATE_FAILED, EXIT_OK
from compot_deploy.pipeline.check import Deployment
from compot_deploy.pipeline.deploy import run
from compot_deploy.pipeline.evaluation import HTML
from compot_deploy.recipe import recipe_from_mapping
from compot_deploy.report.figures import estimate


@dataclass(frozen=True)
class Way:
    """One way to compress the model.

    Attributes:
        folder: name of its output.
        what: it is, for the table.
        options: of its recipe.
    """

    folder: str
    what: str
    options: dict[str, Any]


WAYS: Final = (
    Way("plain-int4", "plain int4 (GPTQ)", {"method": "plain"}),
    Way("planned", "planned, 20 % smaller", {"ratio": 0.2}),
    Way("compot", "all factorized by COMPOT, 20 % smaller", {"method": "compot", "ratio": 0.2}),
    Way("planned-1.8-bits", "planned at 1.8 bits", {"bits": 1.8}),
)

_COMMON: Final[dict[str, Any]] = {
    "samples": 32,
    "length": 128,
    "evaluation_tokens": 1024,
    "force": True,
}
"""Little text: figures are a little worse than the command's own defaults give."""


def demo_command(arguments: list[str], out: Console, err: Console) -> int:
    """Compress the model that ships in all four ways, and print one row for each."""
    parser = Parser(
        prog="compot-deploy demo",
        description="Compress the small model that ships with the package in four ways, and compare them.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--out", type=Path, default=Path("compot-demo"), help="folder for the four outputs")
    target = parser.parse_args(arguments).out
    err.print(
        Text(
            "A model of 1.6 million parameters, trained on Python's documentation, is compressed in four ways."
        )
    )
    made: list[Deployment] = []
    with tempfile.TemporaryDirectory() as scratch, progress_on(err) as progress:
        for way in WAYS:
            values = {**_COMMON, **way.options, "out": str(target / way.folder)}
            recipe = recipe_from_mapping(values, origin="the demo")
            made += run(recipe, progress, Path(scratch) / "work")
    columns = ("", "bytes of the weights", "bits per weight", "perplexity ratio", "factorized linears")
    rows = [_row(way, deployment) for way, deployment in zip(WAYS, made, strict=True)]
    print_table(out, "One model, four ways", columns, rows)
    out.print(
        Text(
            "Bits are those of the linears, scales counted; perplexity is of the exported file, over the original's. A "
            "model this small is not redundant: in wider ones dictionaries win below 2.1 bits."
        )
    )
    for way in WAYS:
        out.print(Text(f"{target / way.folder}: report in {HTML}"))
    return EXIT_OK if all(deployment.passed for deployment in made) else EXIT_GATE_FAILED


def _row(way: Way, deployment: Deployment) -> tuple[str, ...]:
    report = deployment.report
    total, linears = report.accuracy.total, [layer for layer in report.layers if layer.block is not None]
    factorized = sum(layer.kind == "factorized" for layer in linears)
    sizes = report.sizes
    bits = 8 * (sizes.linears or 0) / (sizes.linear_weights or 1)
    ratio = "" if total is None else estimate(total.comparison.perplexity_ratio)
    return (way.what, f"{sizes.weights:,}", f"{bits:.2f}", ratio, f"{factorized} of {len(linears)}")
