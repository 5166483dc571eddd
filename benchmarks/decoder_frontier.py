"""Divergence against bytes on small decoders: the plan beside everything that it has to beat.

Grams, sensitivities and the plan's last check come from calibration windows, figures from held-out ones. Bytes are
those of integers, scales and masks, without padding. One command writes `decoder_frontier.md`, `.json` and
`.png`, for the model that ships and for any others:

    python benchmarks/decoder_frontier.py --model DIR --cache DIR --out docs

Whatever was measured is kept in the cache, and a run that was stopped goes on. The program ends with 1 if at
the size of any baseline, or at a budget, the plan is worse than a baseline of no more bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from baselines import Baseline, Small, baselines, paper_row
from encoder_frontier import LARGEST, paper_claims
from frontier import (
    MIXED,
    PLANNED,
    Comparison,
    Figures,
    Jobs,
    Point,
    Score,
    as_data,
    as_files,
    compare,
    compare_at_sizes,
    digest,
    distinct,
    draw,
    report,
    table,
    unmatched,
    verdicts,
)
from torch import Tensor

from compot_deploy.accuracy.metrics import Prediction, concatenate, predict, summarize
from compot_deploy.accuracy.metrics import compare as compare_predictions
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.storage import PaperStorage, matrix_bytes
from compot_deploy.core.store import StoredMatrices, write_text
from compot_deploy.embedded import MODEL
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.models.whole import replaced, whole_model
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.pipeline.texts import calibration_windows, evaluation_windows
from compot_deploy.planning import candidates
from compot_deploy.planning.candidates import Search, realize
from compot_deploy.planning.carry_out import carry_out, choose
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.knapsack import Plan, knapsack, smallest_bytes
from compot_deploy.planning.measure import measure_rate_points
from compot_deploy.planning.schemes import GridChoice, Plain
from compot_deploy.planning.sensitivity import measure_sensitivities
from compot_deploy.recipe import Recipe

STORAGE = PaperStorage()
GRIDS = GridChoice({2: (32, 64, 128, 256), 3: (32, 64, 128, 256), 4: (32, 64, 128), 8: (128,)})
"""Groups of 256 are one scale per output for the 192 inputs of the model that ships; GGUF's planes hold them."""

FLOATING = (0.4, 0.55, 0.7, 0.85)
BUDGETS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.5)
EVALUATION_TOKENS = 4096
BY_WINDOW = "by window, perplexity too, last choice on 4096 positions"

DIVERGENCE = Score("divergence", "KL [nats per token]", higher=False, errors=2.0)
"""Two models that are two standard errors of their difference apart, paired by window of text, are not told apart."""

PERPLEXITY = Score(
    "perplexity_ratio", "perplexity ratio", ".3f", higher=False, errors=3.0, named=", in perplexity"
)
"""Claimed at the sizes of files that can exist: rows that do not fill their blocks count as they are stored. Some
ninety claims are made, two of which chance alone would put more than two standard errors behind."""

SCORES = (DIVERGENCE, PERPLEXITY)


class Evaluator:
    """Compares the model with replaced matrices to the original, on held-out windows."""

    def __init__(self, source: ModelSource, windows: TokenWindows) -> None:
        self._source, self._model = source, whole_model(source)
        self._runner = TorchRunner(self._model)
        self._windows = [window for window in windows.windows if len(window) > 1]
        self._original = [self._predict(window) for window in self._windows]
        self.made_from = digest({str(number): window for number, window in enumerate(self._windows)})

    def __call__(self, matrices: Mapping[str, Matrix], bits: float) -> Figures:
        """Figures of some matrices, which have so many bits per weight."""
        with replaced(self._model, self._source, matrices):
            parts = [
                compare_predictions(original, self._predict(window))
                for window, original in zip(self._windows, self._original, strict=True)
            ]
        found = summarize(concatenate(parts))
        scores = {
            "divergence": found.divergence.mean.value,
            "perplexity_ratio": found.perplexity_ratio.value,
        }
        # Windows of more tokens weigh more, so that the mean over windows is the mean over tokens.
        share = len(parts) / found.positions
        ratio = found.perplexity_ratio.value
        samples = {
            "divergence": [float(part.divergence.sum()) * share for part in parts],
            # A ratio of perplexities is exp of a mean: its windows to first order.
            "perplexity_ratio": [
                ratio * float((part.candidate_surprise - part.reference_surprise).sum()) * share
                for part in parts
            ],
        }
        return Figures(bits, scores, samples)

    def _predict(self, window: Tensor) -> Prediction:
        (logits,) = self._runner.logits(window[None], len(window))
        return predict(logits[0, :-1], window[1:])


class Laboratory:
    """A decoder, the whitenings of its linears, and what it is evaluated on."""

    def __init__(self, label: str, context: PlanningContext, evaluator: Evaluator) -> None:
        self.label, self.context, self.evaluator = label, context, evaluator
        self.weights: dict[str, Tensor] = {}
        self._whitenings: dict[str, Whitening] = {}
        for group in context.groups:
            self.weights |= context.weights(group.names)
            self._whitenings |= dict.fromkeys(group.names, context.whitening(group))
        self.numbers = sum(weight.numel() for weight in self.weights.values())
        factors = {name: whitening.factor for name, whitening in self._whitenings.items()}
        self.made_from = digest(self.weights) + digest(factors) + evaluator.made_from

    def whitening_of(self, name: str) -> Whitening:
        """Of the input of a linear."""
        return self._whitenings[name]

    def everywhere(self, grid: Grid) -> Small:
        """One grid for all linears, by the package's GPTQ."""
        made: dict[str, Matrix] = {}
        context = self.context
        for group in context.groups:
            weights = context.weights(group.names)
            made |= realize(Plain(grid), weights, context.whitening(group), context.search).matrices
        size = sum(matrix_bytes(made, STORAGE).values())
        return Small({name: matrix.dequantize() for name, matrix in made.items()}, size)

    def measured(self, jobs: Jobs, entries: Sequence[Baseline]) -> list[Point]:
        """The points of baselines."""
        points = []
        for entry in entries:

            def make(entry: Baseline = entry) -> Figures:
                small = entry.make(self)
                dense = {name: Dense(weight) for name, weight in small.weights.items()}
                found = self.evaluator(dense, small.bytes * 8 / self.numbers)
                in_file = small.file_bytes
                return replace(found, file_bits=None if in_file is None else in_file * 8 / self.numbers)

            key = (entry.version, BY_WINDOW, entry.method, self.made_from)
            points.append(jobs.point(entry.family, entry.method, key, make))
        return points

    def planned(self, jobs: Jobs, sizes: Sequence[float]) -> list[Point]:
        """The plan at each number of bits, and the plain mix of the same bytes."""
        rate_points, sensitivities = measure_rate_points(self.context), measure_sensitivities(self.context)
        plain = [one.only(lambda scheme: isinstance(scheme, Plain)) for one in rate_points]
        points = []
        for size in sizes:
            budget = int(size * self.numbers / 8 + 1e-3)  # the size of a baseline is a whole number
            if smallest_bytes(plain) <= budget:
                points.append(self._point(jobs, MIXED, MIXED, (knapsack(plain, budget, sensitivities),)))
            if smallest_bytes(rate_points) <= budget:
                points.append(self._point(jobs, PLANNED, PLANNED, choose(rate_points, sensitivities, budget)))
        return points

    def floating(self, jobs: Jobs, ratios: Sequence[float]) -> list[Point]:
        """The knapsack over factorized schemes without quantization."""
        rate_points, sensitivities = measure_rate_points(self.context), measure_sensitivities(self.context)
        plain = sum(2 * weight.numel() for weight in self.weights.values())
        family = "compot-deploy, knapsack"
        return [
            self._point(
                jobs,
                family,
                f"{family}, {ratio:.0%}",
                (knapsack(rate_points, int((1 - ratio) * plain), sensitivities),),
            )
            for ratio in ratios
        ]

    def _point(self, jobs: Jobs, family: str, method: str, plans: Sequence[Plan]) -> Point:
        def make() -> Figures:
            best = carry_out(self.context, plans)
            return self.evaluator(StoredMatrices(best.files), best.plan.bytes * 8 / self.numbers)

        return jobs.point(family, method, (candidates.VERSION, BY_WINDOW, plans, self.made_from), make)


def open_laboratory(model: str | None, search: Search, work: Path, samples: int, length: int) -> Laboratory:
    """A model with its texts and Grams; None is the model that ships."""
    recipe = Recipe(model=model, samples=samples, length=length, evaluation_tokens=EVALUATION_TOKENS)
    work.mkdir(parents=True, exist_ok=True)
    source = open_source(model or MODEL)
    context = PlanningContext(source, calibration_windows(recipe, source, work), work, STORAGE, search)
    collect_grams(context)
    held_out = evaluation_windows(recipe, source, work)
    label = "the model that ships" if model is None else Path(model).name
    return Laboratory(label, context, Evaluator(source, held_out))


def frontier(
    model: str | None, arguments: argparse.Namespace
) -> tuple[str, list[Point], list[Point], list[Comparison]]:
    """All points of a model: quantized, without quantization, and what was compared."""
    name = "embedded" if model is None else Path(model).name
    work = arguments.cache / name
    quantized = open_laboratory(model, Search(GRIDS), work / "quantized", arguments.samples, arguments.length)
    entries = [
        Baseline("GPTQ, one grid", f"GPTQ {grid}", lambda _, grid=grid: quantized.everywhere(grid))
        for grid in GRIDS.grids
    ]
    entries += baselines(arguments.factorized_bits, arguments.factorized_bits)
    row_entries = paper_row(arguments.ratios, arguments.cospadi_ratios)
    jobs = Jobs(arguments.cache, 5.0 * (len(entries) + len(row_entries) + 60))
    print(f"-- {quantized.label}", flush=True)
    points = quantized.measured(jobs, entries)
    points += quantized.planned(jobs, arguments.bits)
    for score, sized in ((DIVERGENCE, list), (PERPLEXITY, as_files)):
        tried: set[float] = set()
        while (size := unmatched(sized(points), score, LARGEST, tried)) is not None:
            tried.add(size)
            points += quantized.planned(jobs, [size])
    points = distinct(points)
    row = quantized.measured(jobs, row_entries)
    if arguments.ratios:
        search = Search(GridChoice({}), unquantized=True, floating=FLOATING)
        plain = open_laboratory(model, search, work / "floating", arguments.samples, arguments.length)
        row += plain.floating(jobs, arguments.ratios)
    comparisons = [
        *compare(points, DIVERGENCE, arguments.bits, {}),
        *compare_at_sizes(points, DIVERGENCE, LARGEST),
        *compare(as_files(points), PERPLEXITY, arguments.bits, {}),
        *compare_at_sizes(as_files(points), PERPLEXITY, LARGEST),
        *paper_claims(row, arguments.ratios, DIVERGENCE),
    ]
    return quantized.label, points, row, comparisons


def write(found: Sequence[tuple[str, list[Point], list[Point], list[Comparison]]], out: Path) -> None:
    """Tables, JSON and plot."""
    out.mkdir(parents=True, exist_ok=True)
    data = {label: as_data([*points, *row], claims) for label, points, row, claims in found}
    write_text(out / "decoder_frontier.json", json.dumps(data, indent=1) + "\n")
    parts = [_INTRODUCTION]
    for label, points, row, comparisons in found:
        parts += [f"\n## {label[0].upper()}{label[1:]}\n\n", table(points, SCORES)]
        if row:
            parts += ["\n### Without quantization, 16 bits\n\n", table(row, SCORES)]
        parts += ["\n### Compared\n\n", verdicts(comparisons)]
    write_text(out / "decoder_frontier.md", "".join(parts))
    _plot(found, out / "decoder_frontier.png")


_INTRODUCTION = """\
# Accuracy against bytes on small decoders

Divergence and perplexity, relative to the original, on held-out text. Bits per weight of the linears count integers,
scales, zero points and masks. Made by `benchmarks/decoder_frontier.py`; what each baseline is, and how its bytes
are counted, is said in `benchmarks/baselines.py`. *Rows padded*: llama.cpp wants rows of 256 and these models have
shorter ones; only a part of a padded block is counted, so these points are smaller than any file could be. Claims
about the divergence, which is what the plan minimizes, are made at those sizes all the same; claims about perplexity,
in which chance has a larger part, at the sizes of real files. Divergences that are two standard errors of their
difference apart or less, paired by window of text, are not told apart, perplexities three: ninety are compared, and
chance alone puts two of them more than two apart. *Spectral* weighs singular values by the bytes that they
cost; *spectral by value*, the paper's rule to the letter, does not: on the model that ships it gives narrow matrices
too much and can be worse than uniform, so that is not claimed of it.
"""


def _plot(found: Sequence[tuple[str, list[Point], list[Point], list[Comparison]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(7 * len(found), 5), dpi=130, squeeze=False)
    for axes, (label, points, _, _) in zip(panels[0], found, strict=True):
        draw(axes, points, DIVERGENCE)
        axes.set(title=label, xlim=(1.0, 5.6), yscale="log", ylim=(3e-3, 10))
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> int:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[], help="folder of a further decoder")
    parser.add_argument(
        "--shipped", action=argparse.BooleanOptionalAction, default=True, help="the model that ships"
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder of what was measured")
    parser.add_argument("--out", type=Path, required=True, help="folder for table, JSON and plot")
    parser.add_argument("--bits", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--factorized-bits", type=float, nargs="*", default=[2.0, 3.0, 4.0])
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2, 0.3, 0.4])
    parser.add_argument("--cospadi-ratios", type=float, nargs="*", default=[0.4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = []
    for model in ((None,) if arguments.shipped else ()) + tuple(arguments.model):
        found.append(frontier(model, arguments))
        write(found, arguments.out)
    holds = [report(comparisons) for _, _, _, comparisons in found]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
