"""Draw the figures of the documentation into docs/img, from real matrices of the model that ships.

    python docs/figures.py

What is drawn was computed when it was drawn: a linear of the embedded model, its Gram matrix from the embedded text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "compot-deploy"  # the same file every time
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

from compot_deploy.core.grid import DENSE, Grid, Pattern  # noqa: E402
from compot_deploy.embedded import MODEL  # noqa: E402
from compot_deploy.models.source import open_source  # noqa: E402
from compot_deploy.models.streaming import BlockStream  # noqa: E402
from compot_deploy.numerics.compot import compot  # noqa: E402
from compot_deploy.numerics.factors import Alternation  # noqa: E402
from compot_deploy.numerics.svd_llm import svd_llm  # noqa: E402
from compot_deploy.numerics.whiten import Whitening, whiten  # noqa: E402
from compot_deploy.pipeline.texts import calibration_windows  # noqa: E402
from compot_deploy.quant import gptq, rtn  # noqa: E402
from compot_deploy.recipe import Recipe  # noqa: E402

HERE = Path(__file__).parent
IMAGES = HERE / "img"
BLUE, ORANGE, GREEN, GREY = "#3949ab", "#e07b39", "#3a8f5c", "#7a7a7a"
LINEAR = "model.layers.0.mlp.gate_proj"


def save(figure: Any, name: str) -> None:
    """Write an SVG without a date."""
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def real_linear() -> tuple[torch.Tensor, Whitening]:
    """The weight of one linear, and the whitening of what it reads."""
    source = open_source(MODEL)
    windows = calibration_windows(Recipe(samples=16, length=128), source, Path())
    with BlockStream(source, source.task.batches(windows.windows)) as stream:
        grams = stream.advance()
    return source.weight(LINEAR).float(), whiten(grams["mlp.gate_proj"].matrix)


def factors(weight: torch.Tensor, whitening: Whitening) -> None:
    """A weight, its dictionary and its codes."""
    found = compot(weight, whitening, 96, Pattern(48, 96), Alternation())
    parts = (
        ("W", weight, f"W\n{weight.shape[0]} × {weight.shape[1]}"),
        ("A", found.dictionary, "dictionary A\n192 × 96, dense"),
        ("S", found.codes, "codes S\n96 × 384, half of them zero"),
    )
    widths = [part.shape[1] for _, part, _ in parts]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), width_ratios=widths)
    for axis, (_, part, title), sign in zip(axes, parts, ("", "≈", "·"), strict=True):
        values = part.float()
        limit = float(values.abs().quantile(0.99))
        axis.imshow(
            values.where(values != 0, torch.nan),
            cmap="RdBu",
            vmin=-limit,
            vmax=limit,
            aspect="equal",
            interpolation="nearest",
        )
        axis.set_title(title, fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_anchor("C")
        axis.set_ylabel(sign, rotation=0, fontsize=18, labelpad=14, va="center")
    figure.suptitle(f"{LINEAR} of the model that ships", fontsize=9, color=GREY, y=0.93)
    save(figure, "factors")


def alternation(weight: torch.Tensor, whitening: Whitening) -> None:
    """The objective, round by round."""
    figure, axis = plt.subplots(figsize=(6, 3))
    for label, settings, color in (
        ("as published", Alternation(rounds=20, tolerance=0, paper_exact=True), GREY),
        ("with momentum (default)", Alternation(rounds=20, tolerance=0), BLUE),
    ):
        # Plain numbers: the objective after each round, before the final least-squares step.
        objective = compot(weight, whitening, 96, Pattern(48, 96), settings).objective
        axis.plot(
            range(len(objective)), [value**0.5 for value in objective], label=label, color=color, marker="."
        )
    axis.set_xticks(range(0, 21, 5))
    axis.set_xlabel("round")
    axis.set_ylabel("relative whitened error")
    axis.set_title(f"{LINEAR}, 96 atoms, half of the codes kept", fontsize=9, color=GREY)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "alternation")


def one_matrix(weight: torch.Tensor, whitening: Whitening) -> None:
    """Error against bits of plain integers, with and without calibration."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for label, color, quantize in (
        ("rounded", GREY, lambda grid: rtn(weight, None, grid)),
        ("GPTQ", BLUE, lambda grid: gptq(weight, whitening.gram, grid)),
    ):
        points = []
        for bits in (2, 3, 4):
            for group in (128, 64, 32):
                grid = Grid(bits, group)
                points.append((bits + 16 / group, whitening.error(weight, quantize(grid).dequantize())))
        axis.plot(*zip(*sorted(points), strict=True), label=label, color=color, marker=".")
    floating = [
        (16 * atoms * (192 + 384) / (192 * 384), whitening.error(weight, factor.dictionary @ factor.codes))
        for atoms in (8, 16, 24, 32, 40)
        for factor in [svd_llm(weight, whitening, atoms, DENSE, Alternation())]
    ]
    axis.plot(*zip(*floating, strict=True), label="low rank, 16 bits", color=ORANGE, marker=".")
    axis.set_xlabel("bits per weight, scales counted")
    axis.set_ylabel("relative whitened error")
    axis.set_title(f"{LINEAR} of the model that ships", fontsize=9, color=GREY)
    axis.set_xlim(left=1)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "one-matrix")


def frontier() -> None:
    """The encoder's frontier, from its measurements."""
    rows = json.loads((HERE / "encoder_frontier.json").read_text())
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    styles = {
        "compot-deploy, planned": (BLUE, "o-", "planned"),
        "GPTQ, mixed grids, planned": (GREEN, "s--", "plan of plain grids only"),
    }
    for method, (color, style, label) in styles.items():
        points = sorted((row["bits"], row["cosine"]) for row in rows if row["method"] == method)
        axis.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
    others = [row for row in rows if row["method"] not in styles and row["bits"] < 5]
    plain = [row for row in others if "GPTQ" in row["method"]]
    axis.scatter(
        [r["bits"] for r in plain],
        [r["cosine"] for r in plain],
        color=GREY,
        s=16,
        label="GPTQ, one grid everywhere",
        zorder=3,
    )
    published = [row for row in others if "then int4" in row["method"]]
    axis.scatter(
        [r["bits"] for r in published],
        [r["cosine"] for r in published],
        color=ORANGE,
        marker="^",
        s=22,
        label="SVD-LLM or COMPOT as published, then int4",
    )
    axis.set_xlim(1.2, 4.7)
    axis.set_xlabel("bits per weight of the linears")
    axis.set_ylabel("cosine of embeddings")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "frontier")


def losses() -> None:
    """Which two models each loss compares."""
    figure, axis = plt.subplots(figsize=(7.5, 2.1))
    boxes = (
        ("original\nweights, torch", 0.5),
        ("dequantized\nfactors, torch", 4.0),
        ("exported file,\nas deployed", 7.5),
    )
    for text, x in boxes:
        axis.add_patch(
            FancyBboxPatch((x, 0.5), 2, 1, boxstyle="round,pad=0.08", facecolor="#eef0fb", edgecolor=BLUE)
        )
        axis.text(x + 1, 1, text, ha="center", va="center", fontsize=9)
    for start, end, y, label, color in (
        (2.6, 3.9, 1.0, "method loss", BLUE),
        (6.1, 7.4, 1.0, "export loss", GREEN),
        (1.5, 8.5, 2.0, "total loss: what a user notices", ORANGE),
    ):
        axis.add_patch(
            FancyArrowPatch((start, y), (end, y), arrowstyle="<|-|>", mutation_scale=9, color=color)
        )
        axis.text((start + end) / 2, y + 0.12, label, ha="center", fontsize=8, color=color)
    axis.set_xlim(0.2, 9.8), axis.set_ylim(0.2, 2.5)
    axis.axis("off")
    save(figure, "losses")


def steps() -> None:
    """What the command does, in three steps."""
    figure, axis = plt.subplots(figsize=(9.0, 2.5))
    boxes = (
        ("1  calibrate", "block by block over text:\none Gram matrix per input", BLUE),
        (
            "2  plan",
            "integers of 2 to 8 bits, or a\ndictionary times sparse codes,\nper matrix, on the bytes that ship",
            GREEN,
        ),
        (
            "3  export and evaluate",
            "ONNX, GGUF, Hugging Face;\nthe file reads text beside\nthe original: pass or fail",
            ORANGE,
        ),
    )
    for number, (title, text, color) in enumerate(boxes):
        x = 3.6 * number
        axis.add_patch(
            FancyBboxPatch((x, 0), 3, 1.7, boxstyle="round,pad=0.08", facecolor="#f7f8fd", edgecolor=color)
        )
        axis.text(x + 1.5, 1.45, title, ha="center", va="center", fontsize=11, weight="bold", color=color)
        axis.text(x + 1.5, 0.62, text, ha="center", va="center", fontsize=8.5)
        if number:
            axis.add_patch(
                FancyArrowPatch(
                    (x - 0.5, 0.85), (x - 0.1, 0.85), arrowstyle="-|>", mutation_scale=12, color=GREY
                )
            )
    axis.set_xlim(-0.2, 10.5), axis.set_ylim(-0.2, 1.95)
    axis.axis("off")
    save(figure, "steps")


if __name__ == "__main__":
    steps()
    torch.set_num_threads(1)
    weight, whitening = real_linear()
    factors(weight, whitening)
    alternation(weight, whitening)
    one_matrix(weight, whitening)
    frontier()
    losses()
