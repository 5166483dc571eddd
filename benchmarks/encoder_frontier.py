"""Accuracy against bytes on a real encoder: the plan beside everything that it has to beat.

All linears of MiniLM-L6, the same calibration text for every method, every scale and mask bit counted. Writes
`encoder_frontier.md`, `.json` and `.png`.

    python benchmarks/encoder_frontier.py --calibration valid.txt --test test.txt --cache DIR --out DIR

Measured candidates are kept in the cache, named after what they were made from: a run that was stopped goes
on, and a change of the numerics (`compot_deploy.candidates.VERSION`) measures anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from encoder import Encoder
from torch import Tensor

from compot_deploy.allocate import ALLOCATIONS, PaperStorage, Precision, Sparsity
from compot_deploy.candidates import Realized, Search, content_key, curve, forms, realize
from compot_deploy.factorize import METHODS, Alternation
from compot_deploy.plan import Curve, Form, GridChoice, Joint, Plain, Plan, better_of, describe, knapsack
from compot_deploy.quant import gptq
from compot_deploy.quantize_factors import quantize_factors
from compot_deploy.store import load_matrices, save_matrices, write_text
from compot_deploy.weights import DENSE, Grid, matrix_bytes
from compot_deploy.whiten import Whitening

STORAGE = PaperStorage()
SEARCH = Search(GridChoice({2: (32, 64, 128), 3: (32, 64, 128), 4: (32, 64, 128), 8: (128,)}))
PROBE = Plain(Grid(2, 128))
QUANTIZER, QUANTIZER_NAME = partial(gptq, sweeps=2), "gptq, 2 sweeps"
FLOORS = {1.4: 0.72, 1.5: None, 2.0: 0.82, 2.5: 0.88, 3.0: 0.93, 3.5: 0.968, 4.5: 0.988}


@dataclass(frozen=True)
class Point:
    """One method at one size."""

    method: str
    bits: float
    cosine: float
    error: float
    neighbours: float


class Laboratory:
    """The encoder, its shared inputs, and every candidate that was ever measured on it."""

    def __init__(self, encoder: Encoder, cache: Path) -> None:
        self.encoder = encoder
        self.cache = cache
        self.groups: dict[str, list[str]] = {}
        for name in encoder.weights:
            self.groups.setdefault(re.sub(r"\.(query|key|value)$", "", name), []).append(name)
        self.numbers = sum(weight.numel() for weight in encoder.weights.values())

    def whitening(self, names: Sequence[str]) -> Whitening:
        """Of the input that these matrices read."""
        return self.encoder.whitenings[names[0]]

    def realized(self, form: Form, names: Sequence[str]) -> Realized:
        """A form for some matrices of one input."""
        weights = {name: self.encoder.weights[name] for name in names}
        whitening = self.whitening(names)
        key = content_key(form, weights, whitening, SEARCH, QUANTIZER_NAME)
        matrices, facts = self.cache / f"{key}.safetensors", self.cache / f"{key}.json"
        if not facts.exists():
            made = realize(
                form, weights, whitening, SEARCH, dictionary_name="+".join(names), quantizer=QUANTIZER
            )
            save_matrices(matrices, made.matrices)
            write_text(facts, json.dumps(dict(made.errors)))
        return _Stored(matrices, facts).realized

    def errors(self, form: Form, names: Sequence[str]) -> Mapping[str, float]:
        """Squared errors of a form, without its matrices where they are known."""
        weights = {name: self.encoder.weights[name] for name in names}
        key = content_key(form, weights, self.whitening(names), SEARCH, QUANTIZER_NAME)
        facts = self.cache / f"{key}.json"
        return json.loads(facts.read_text()) if facts.exists() else self.realized(form, names).errors

    def forms(self, names: Sequence[str]) -> tuple[Form, ...]:
        """What is tried for some matrices of one input."""
        weight = torch.cat([self.encoder.weights[name] for name in names], dim=1)
        return forms(weight, self.whitening(names), STORAGE, SEARCH)

    def curves(self) -> list[Curve]:
        """Every input's candidates, measured."""
        curves = []
        for shared, names in self.groups.items():
            started = time.perf_counter()
            sizes = {name: tuple(self.encoder.weights[name].shape) for name in names}
            plain: dict[str, list[tuple[Form, float]]] = {name: [] for name in names}
            together: list[tuple[Form, Mapping[str, float]]] = []
            # Plain grids do not care who else reads the input: all matrices of it are done at once.
            for form in self.forms(names):
                errors = self.errors(form, names)
                if isinstance(form, Joint) and len(names) > 1:
                    together.append((form, errors))
                else:
                    for name in names:
                        plain[name].append((form, errors[name]))
            curves.append(curve(names, plain, together, sizes, STORAGE))  # type: ignore[arg-type]
            print(f"{shared}: {time.perf_counter() - started:.0f} s", flush=True)
        return curves

    def weights(self) -> dict[str, float]:
        """What a unit of squared error of each matrix costs the output, measured one matrix at a time."""
        result = {}
        for names in self.groups.values():
            probe = self.realized(PROBE, names)
            for name in names:
                weight = probe.matrices[name].dequantize()
                result[name] = self.remembered("effect", {name: weight}) / probe.errors[name]
        return result

    def remembered(self, label: str, weights: Mapping[str, Tensor]) -> float:
        """The encoder's effect of some weights, from the cache where it was measured before."""
        digest = hashlib.sha256(label.encode())
        for name, weight in weights.items():
            digest.update(name.encode())
            digest.update(weight.float().contiguous().numpy().tobytes())
        path = self.cache / f"effect-{digest.hexdigest()[:24]}.json"
        if not path.exists():
            write_text(path, json.dumps(self.encoder.effect(weights)))
        return float(json.loads(path.read_text()))

    def product(self, plan: Plan) -> dict[str, Tensor]:
        """Every matrix of a plan, multiplied out."""
        made: dict[str, Tensor] = {}
        for entry in plan.chosen:
            names = entry.names
            if isinstance(entry.candidate.form, Plain):
                names = next(tuple(group) for group in self.groups.values() if names[0] in group)
            matrices = self.realized(entry.candidate.form, names).matrices
            made |= {name: matrices[name].dequantize() for name in entry.names}
        return {name: made[name] for name in self.encoder.weights}

    def point(self, method: str, size: float, weights: Mapping[str, Tensor]) -> Point:
        """Judge on the test lines."""
        digest = hashlib.sha256()
        for name, weight in weights.items():
            digest.update(name.encode())
            digest.update(weight.float().contiguous().numpy().tobytes())
        path = self.cache / f"point-{digest.hexdigest()[:24]}.json"
        if not path.exists():
            write_text(path, json.dumps(asdict(self.encoder.evaluate(weights))))
        found = json.loads(path.read_text())
        point = Point(method, size * 8 / self.numbers, found["cosine"], found["error"], found["neighbours"])
        print(f"{point.method:28s} {point.bits:6.3f} bits  cosine {point.cosine:.4f}", flush=True)
        return point


class _Stored:
    """Matrices and errors of a candidate on disk."""

    def __init__(self, matrices: Path, facts: Path) -> None:
        self.realized = Realized(load_matrices(matrices), json.loads(facts.read_text()))


def planned(laboratory: Laboratory, curves: Sequence[Curve], bits: Iterable[float]) -> list[Point]:
    """The plan at each size, and the plain mix of the same bytes."""
    weights = laboratory.weights()
    plain = [one.only(lambda form: isinstance(form, Plain)) for one in curves]
    points = []
    for target in bits:
        budget = int(target * laboratory.numbers / 8)
        plans = [knapsack(curves, budget, weights)]
        if target >= 2.125:
            plans.append(knapsack(plain, budget, weights))
            mixed = laboratory.product(plans[1])
            points.append(laboratory.point("GPTQ, mixed grids, planned", plans[1].bytes, mixed))
        best = better_of(plans, lambda plan: laboratory.remembered("effect", laboratory.product(plan)))
        print(target, "joint plan" if best is plans[0] else "plain mix", _census(best), flush=True)
        points.append(laboratory.point("compot-deploy, planned", best.bytes, laboratory.product(best)))
    return points


def gptq_everywhere(laboratory: Laboratory) -> list[Point]:
    """One grid for all linears."""
    points = []
    for grid in SEARCH.grids.grids:
        made: dict[str, Tensor] = {}
        size = 0
        for names in laboratory.groups.values():
            realized = laboratory.realized(Plain(grid), names)
            size += sum(matrix_bytes(realized.matrices, STORAGE).values())
            made |= {name: matrix.dequantize() for name, matrix in realized.matrices.items()}
        points.append(laboratory.point(f"GPTQ {grid}", size, made))
    return points


def factorized_then_int4(laboratory: Laboratory, method: str, bits: float) -> Point:
    """SVD-LLM, or COMPOT as published, with uniform allocation; then both factors in 4 bits."""
    encoder = laboratory.encoder
    grid, codes = Grid(4, 64), Grid(4, 16)
    allocation = ALLOCATIONS["uniform"](
        encoder.sizes(),
        ratio=1.0 - bits / 4.25,
        storage=STORAGE,
        precision=Precision(grid, grid, codes),
        sparsity=Sparsity(pattern=DENSE) if method == "svd-llm" else Sparsity(),
    )
    made = {}
    for name, choice in allocation.choices.items():
        weight, whitening = encoder.weights[name], encoder.whitenings[name]
        if not choice.factorized:
            made[name] = gptq(weight, whitening.gram, grid).dequantize()
            continue
        factors = METHODS[method](
            weight, whitening, choice.atoms, choice.pattern, Alternation(paper_exact=True)
        )
        quantized = quantize_factors(
            factors, weight, whitening, dictionary_grid=grid, code_grid=codes, paper_exact=True
        )
        made[name] = quantized.dictionary.dequantize() @ quantized.codes.dequantize()
    label = {"svd-llm": "SVD-LLM, then int4", "compot": "COMPOT as published, then int4"}[method]
    return laboratory.point(label, allocation.bytes, made)


def write(points: Sequence[Point], out: Path) -> None:
    """Table, JSON and plot."""
    out.mkdir(parents=True, exist_ok=True)
    points = sorted(points, key=lambda point: (point.bits, point.method))
    write_text(out / "encoder_frontier.json", json.dumps([asdict(point) for point in points], indent=1))
    lines = [
        "| method | bits per weight | cosine | mean whitened error | same nearest neighbour |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        row = f"{point.method} | {point.bits:.3f} | {point.cosine:.4f} | {point.error:.4f} | {point.neighbours:.0%}"
        lines.append(f"| **{row.replace(' | ', '** | ', 1)} |" if "planned" in row[:22] else f"| {row} |")
    write_text(out / "encoder_frontier.md", "\n".join(lines) + "\n")
    _plot(points, out / "encoder_frontier.png")


def _plot(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    methods: dict[str, list[Point]] = {}
    for point in points:
        methods.setdefault(re.sub(r" int\d.*", ", one grid", point.method), []).append(point)
    for method, series in sorted(methods.items()):
        ours = method.startswith("compot-deploy")
        axes.plot(
            [point.bits for point in series],
            [point.cosine for point in series],
            "o-" if "planned" in method else "s" if "one grid" in method else "^",
            label=method,
            linewidth=2 if ours else 1,
            zorder=3 if ours else 2,
        )
    axes.set(
        xlabel="bits per weight, scales and masks counted",
        ylabel="cosine to the original embeddings",
        xlim=(1.0, 4.9),
        ylim=(0.5, 1.0),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def _census(plan: Plan) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in plan.chosen:
        label = describe(entry.candidate.form)
        label = label if label.startswith("int") else "joint"
        counts[label] = counts.get(label, 0) + len(entry.names)
    return counts


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True, help="text; its long lines give the Grams")
    parser.add_argument("--test", type=Path, required=True, help="text; its long lines are embedded")
    parser.add_argument("--cache", type=Path, required=True, help="folder of measured candidates")
    parser.add_argument("--out", type=Path, required=True, help="folder for table, JSON and plot")
    parser.add_argument("--bits", type=float, nargs="+", default=list(FLOORS))
    parser.add_argument("--factorized-bits", type=float, nargs="*", default=[2.0, 3.0])
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(arguments.calibration, arguments.test, arguments.cache)
    laboratory = Laboratory(encoder, arguments.cache)
    points = planned(laboratory, laboratory.curves(), arguments.bits)
    write(points, arguments.out)
    points += gptq_everywhere(laboratory)
    write(points, arguments.out)
    for bits in arguments.factorized_bits:
        points += [factorized_then_int4(laboratory, method, bits) for method in ("svd-llm", "compot")]
        write(points, arguments.out)
    for target, floor in FLOORS.items():
        if floor is not None and target in arguments.bits:
            budget = [p for p in points if p.method == "compot-deploy, planned" and p.bits <= target + 1e-9]
            cosine = max((point.cosine for point in budget), default=0.0)
            verdict = "reached" if cosine >= floor else "NOT reached"
            print(f"{target} bits: {cosine:.4f}, floor {floor}: {verdict}")


if __name__ == "__main__":
    main()
