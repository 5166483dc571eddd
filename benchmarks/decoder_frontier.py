"""Divergence against bytes on a decoder: the plan beside one grid everywhere and the best mix of grids.

Grams and effects come from calibration windows, figures from held-out ones. Bytes are those of scales,
integers and one mask bit per entry of sparse codes, without padding.

    python benchmarks/decoder_frontier.py --model DIR --work DIR --out FILE.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compot_deploy.allocate import ALLOCATIONS, MatrixSize, PaperStorage, Sparsity
from compot_deploy.candidates import Search, realize
from compot_deploy.checkpoint import open_checkpoint
from compot_deploy.factorize import METHODS, Alternation, singular_spectrum
from compot_deploy.measures import compare, concatenate, predict, summarize
from compot_deploy.plan import Curve, GridChoice, Plain, knapsack, smallest_bytes
from compot_deploy.planning import Task, carry_out, choose, collect_grams, measure_curves, measure_effects
from compot_deploy.recipe import Recipe
from compot_deploy.runners import TorchRunner, torch_runner
from compot_deploy.store import StoredMatrices, write_text
from compot_deploy.texts import calibration_windows, evaluation_windows
from compot_deploy.tokens import TokenWindows, load_tokenizer
from compot_deploy.weights import DENSE, Dense, Matrix, matrix_bytes

STORAGE = PaperStorage()
GRIDS = GridChoice({2: (32, 64, 128), 3: (32, 64, 128), 4: (32, 64, 128), 8: (128,)})
FLOATING = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))


@dataclass(frozen=True)
class Point:
    """One method at one size."""

    method: str
    bits: float
    divergence: float
    perplexity_ratio: float


class Judge:
    """Compares the model with replaced matrices to the original, on held-out windows."""

    def __init__(self, runner: TorchRunner, windows: TokenWindows, numbers: int) -> None:
        self._runner, self._numbers = runner, numbers
        self._windows = [window for window in windows.windows if len(window) > 1]
        self._original = [self._predict(window) for window in self._windows]

    def __call__(self, method: str, size: float, matrices: Mapping[str, Matrix]) -> Point:
        """Judge matrices of so many bytes."""
        with self._runner.replaced(matrices):
            parts = [
                compare(original, self._predict(window))
                for window, original in zip(self._windows, self._original, strict=True)
            ]
        positions = concatenate(parts)
        found = summarize(positions)
        point = Point(
            method,
            size * 8 / self._numbers,
            found.divergence.mean.value,
            found.perplexity_ratio.value,
        )
        print(
            f"{method:34s} {point.bits:6.3f} bits  KL {point.divergence:.4f}  "
            f"perplexity x {point.perplexity_ratio:.3f}",
            flush=True,
        )
        return point

    def _predict(self, window: torch.Tensor):  # type: ignore[no-untyped-def]
        (logits,) = self._runner.logits(window[None], len(window))
        return predict(logits[0, :-1], window[1:])


def quantized(task: Task, judge: Judge, bits: Sequence[float]) -> list[Point]:
    """One grid everywhere, the best mix, and the plan at the given sizes and at that of every grid."""
    points = []
    curves = measure_curves(task)
    effects = measure_effects(task)
    numbers = sum(task.checkpoint.weight(name).numel() for name in effects)
    sizes = set()
    for grid in GRIDS.grids:
        made: dict[str, Matrix] = {}
        for layer, shared in task.inputs:
            weights = task.weights(task.names(layer, shared))
            made |= realize(Plain(grid), weights, task.whitening(layer, shared), task.search).matrices
        size = sum(matrix_bytes(made, STORAGE).values())
        sizes.add(size)
        points.append(judge(f"GPTQ {grid}", size, made))
    plain = [one.only(lambda form: isinstance(form, Plain)) for one in curves]
    for size in sorted(sizes | {int(one * numbers / 8) for one in bits}):
        points += _planned(task, judge, curves, plain, effects, size)
    return points


def _planned(
    task: Task,
    judge: Judge,
    curves: Sequence[Curve],
    plain: Sequence[Curve],
    effects: Mapping[str, float],
    size: int,
) -> list[Point]:
    points = []
    if smallest_bytes(plain) <= size:
        mixed = carry_out(task, (knapsack(plain, size, effects),))
        points.append(judge("GPTQ, mixed grids, planned", mixed.plan.bytes, StoredMatrices(mixed.files)))
    if smallest_bytes(curves) <= size:
        best = carry_out(task, choose(curves, effects, size))
        points.append(judge("compot-deploy, planned", best.plan.bytes, StoredMatrices(best.files)))
    return points


def floating(task: Task, judge: Judge, ratios: Sequence[float]) -> list[Point]:
    """The paper's row: uniform and spectral allocation, SVD-LLM and COMPOT, and the knapsack; 16 bits."""
    points = []
    names = task.checkpoint.architecture.linear_names(task.checkpoint.layers)
    sizes = []
    for name in names:
        weight = task.checkpoint.weight(name).float()
        sizes.append(MatrixSize(name, weight.shape[0], weight.shape[1], singular_spectrum(weight)))
    plain = sum(Plain(None).bytes(size.inputs, size.outputs, STORAGE) for size in sizes)
    curves, effects = measure_curves(task), measure_effects(task)
    for ratio in ratios:
        for rule in ("uniform", "spectral"):
            for method, sparsity in (("svd-llm", Sparsity(pattern=DENSE)), ("compot", Sparsity())):
                allocation = ALLOCATIONS[rule](sizes, ratio=ratio, storage=STORAGE, sparsity=sparsity)
                made: dict[str, Matrix] = {}
                for layer, shared in task.inputs:
                    whitening = task.whitening(layer, shared)
                    for name, weight in task.weights(task.names(layer, shared)).items():
                        choice = allocation.choices[name]
                        if choice.factorized:
                            factors = METHODS[method](
                                weight, whitening, choice.atoms, choice.pattern, Alternation(paper_exact=True)
                            )
                            made[name] = Dense((factors.dictionary @ factors.codes).float())
                points.append(judge(f"{method} as published, {rule}, {ratio:.0%}", allocation.bytes, made))
        best = carry_out(task, (knapsack(curves, int((1 - ratio) * plain), effects),))
        points.append(
            judge(f"compot-deploy, planned, {ratio:.0%}", best.plan.bytes, StoredMatrices(best.files))
        )
    return points


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a decoder")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is finished; it can go on")
    parser.add_argument("--out", type=Path, required=True, help="table to write")
    parser.add_argument("--bits", type=float, nargs="*", default=[1.5, 2.0, 2.5, 3.0, 3.5, 4.5])
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2, 0.3, 0.4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    recipe = Recipe(
        model=arguments.model, samples=arguments.samples, length=arguments.length, evaluation_tokens=4096
    )
    checkpoint = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint.folder)
    points: list[Point] = []
    for label, search in (
        ("quantized", Search(GRIDS)),
        ("floating", Search(GridChoice({}), unquantized=True, floating=FLOATING)),
    ):
        work = arguments.work / label
        work.mkdir(parents=True, exist_ok=True)
        windows = calibration_windows(recipe, checkpoint, tokenizer, work)
        task = Task(checkpoint, windows, work, STORAGE, search)
        collect_grams(task)
        names = checkpoint.architecture.linear_names(checkpoint.layers)
        numbers = sum(checkpoint.weight(name).numel() for name in names)
        held_out = evaluation_windows(recipe, checkpoint, tokenizer, work)
        judge = Judge(torch_runner(checkpoint.folder), held_out, numbers)
        points += (
            quantized(task, judge, arguments.bits)
            if label == "quantized"
            else floating(task, judge, arguments.ratios)
        )
    lines = ["| method | bits per weight | KL [nats per token] | perplexity ratio |", "|---|---|---|---|"]
    lines += [
        f"| {point.method} | {point.bits:.3f} | {point.divergence:.4f} | {point.perplexity_ratio:.3f} |"
        for point in sorted(points, key=lambda point: (point.bits, point.method))
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
