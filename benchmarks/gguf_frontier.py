"""Divergence against bytes and against tokens per second, for GGUF files of one model of real weights.

llama.cpp's own types, rounded with the importance of the calibration, beside factorized files and planned ones.
Writes `gguf_frontier.md`, `.json` and `.png`.

    python benchmarks/gguf_frontier.py --work DIR --out DIR            # the model that ships
    python benchmarks/gguf_frontier.py --work DIR --out DIR --model M  # any other

K and IQ types want rows of 256 numbers. Where a model has others, zeros are appended to its hidden and
intermediate widths, which changes nothing that it computes; figures of such files are marked, count the bytes of
real weights alone, and their speed is a ratio to Q8_0 of the same widened shapes.

Everything is evaluated as it ships: llama.cpp and the plug-in round activations to 8 bits. Speed is measured in
turn, round after round, in one process, so a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from compot_deploy.accuracy.metrics import Prediction, compare, concatenate, predict, summarize
from compot_deploy.accuracy.torch_runner import torch_runner
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.store import write_text
from compot_deploy.embedded import MODEL
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.quantize import row_bytes
from compot_deploy.exporters.gguf.reader import read_header
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama.model import LlamaModel
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.pipeline.compress import compress, context_of
from compot_deploy.pipeline.texts import evaluation_windows
from compot_deploy.planning.context import collect_grams
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe, override

BLOCK = 256
PLAIN = ("Q8_0", "Q5_0", "Q4_0", "IQ4_NL")
BLOCKS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XXS")
UNWEIGHTED = ("Q4_K", "Q3_K", "Q2_K")
BITS = (1.8, 2.2, 2.6, 3.0, 3.5, 4.5)
RATIOS = (0.2, 0.35)


@dataclass(frozen=True)
class Candidate:
    """One file.

    Attributes:
        label: what it is.
        family: series of the plot.
        path: where it lies.
        shapes: ``as they are`` or ``widened``; speeds compare within one of them.
        bits: of the linears per real weight, scales counted.
        nbytes: of all tensors, likewise without appended zeros.
    """

    label: str
    family: str
    path: Path
    shapes: str
    bits: float
    nbytes: int


@dataclass(frozen=True)
class Point:
    """A candidate and its figures; KL in nats per token ± standard error, speed as a ratio to Q8_0."""

    label: str
    family: str
    shapes: str
    bits: float
    nbytes: int
    divergence: float
    divergence_error: float
    perplexity_ratio: float
    top1: float
    speed: float
    speed_low: float
    speed_high: float


def original(source: ModelSource) -> CompressedModel:
    """The model as it is, in float32."""
    layout = source.layout
    tables = [layout.embedding] + ([] if layout.tied else [layout.head])
    matrices: dict[str, Matrix] = {
        name: Dense(source.weight(name).float()) for name in (*layout.names, *tables)
    }
    taken = {f"{name}.weight" for name in (*matrices, layout.head)}
    tensors = {name: source.tensors[name].float() for name in source.tensors if name not in taken}
    return CompressedModel(
        source.architecture, source.config, matrices, tensors, layout.tied, str(source.folder)
    )


def widened(model: CompressedModel) -> CompressedModel:
    """The same function with hidden and intermediate widths rounded up to whole blocks by zeros.

    The root mean square of a norm sees more entries, so its weight and epsilon shrink with their share.
    """
    config = dict(model.config)
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    wide, wider = (-(-width // BLOCK) * BLOCK for width in (hidden, inner))
    share = hidden / wide
    config |= {
        "hidden_size": wide,
        "intermediate_size": wider,
        "head_dim": model.architecture.head_size(config),
        "rms_norm_eps": float(config["rms_norm_eps"]) * share,
    }

    def grown(name: str, weight: Tensor) -> Tensor:
        """Inputs and outputs of a matrix, (in, out)."""
        last = name.rpartition(".")[2]
        inputs = wider if last == "down_proj" else weight.shape[0] if last == "o_proj" else wide
        outputs = {"o_proj": wide, "down_proj": wide, "gate_proj": wider, "up_proj": wider}.get(
            last, weight.shape[1]
        )
        return pad(weight, (0, outputs - weight.shape[1], 0, inputs - weight.shape[0]))

    def norm(name: str, tensor: Tensor) -> Tensor:
        own = (
            tensor.shape[0] == hidden
            and "norm" in name
            and not name.endswith(("q_norm.weight", "k_norm.weight"))
        )
        return pad(tensor * math.sqrt(share), (0, wide - hidden)) if own else tensor

    return replace(
        model,
        config=config,
        matrices={name: Dense(grown(name, matrix.dequantize())) for name, matrix in model.matrices.items()},
        tensors={name: norm(name, tensor) for name, tensor in model.tensors.items()},
    )


def real_bytes(path: Path, model: CompressedModel) -> tuple[int, int]:
    """(bytes of the linears, of all tensors) of a file as if nothing had been appended to its rows."""
    architecture = model.architecture
    shapes = {"token_embd.weight": model.matrices[architecture.embedding].shape}
    for layer in range(model.layers):
        for path_in_block in architecture.linears:
            stem = f"blk.{layer}.{architecture.ggml_names[path_in_block]}.weight"
            shapes[stem] = model.matrices[f"{architecture.block_path(layer)}.{path_in_block}"].shape
    linears = total = 0
    for tensor in read_header(path).tensors.values():
        nbytes = tensor.nbytes
        # Only rows of a dense file can have been widened; payloads have shapes of their own.
        if tensor.kind != "I8" and tensor.name in shapes and tensor.shape != shapes[tensor.name][::-1]:
            inputs, outputs = shapes[tensor.name]
            nbytes = round(outputs * inputs * row_bytes(tensor.kind, BLOCK) / BLOCK)
        total += nbytes
        linears += nbytes if tensor.name.startswith("blk.") and len(tensor.shape) == 2 else 0
    return linears, total


class Laboratory:
    """Writes candidates of one model."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe, self.work = recipe, work
        self.source = open_source(recipe.model or MODEL)
        self.model = original(self.source)
        self.numbers = sum(
            math.prod(m.shape) for name, m in self.model.matrices.items() if ".layers." in name
        )

    def importance(self) -> Mapping[str, Tensor]:
        """Diagonals of the Grams."""
        work = self.work / "grams"
        work.mkdir(parents=True, exist_ok=True)
        context = context_of(resolve(self.recipe, self.source), work)
        collect_grams(context)
        return context.importances()

    def candidate(self, label: str, family: str, path: Path, shapes: str = "as they are") -> Candidate:
        """A written file."""
        linears, total = real_bytes(path, self.model)
        return Candidate(label, family, path, shapes, linears * 8 / self.numbers, total)

    def dense(self) -> list[Candidate]:
        """llama.cpp's own types."""
        importance = self.importance()
        found = []
        fits = all(matrix.shape[0] % BLOCK == 0 for matrix in self.model.matrices.values())
        wide = self.model if fits else widened(self.model)
        longer = {
            name: pad(one, (0, wide.matrices[name].shape[0] - len(one))) for name, one in importance.items()
        }
        jobs = [(kind, True, self.model, importance, "as they are") for kind in PLAIN]
        shapes = "as they are" if fits else "widened"
        jobs += [(kind, True, wide, longer, shapes) for kind in BLOCKS if not (fits and kind in PLAIN)]
        jobs += [("Q4_0", False, self.model, importance, "as they are")]
        jobs += [(kind, False, wide, longer, shapes) for kind in UNWEIGHTED]
        for kind, weighted, model, weights, form in jobs:
            path = self.work / f"{kind}{'' if weighted else '-unweighted'}-{form.replace(' ', '-')}.gguf"
            if not path.exists():
                write(model, path, GgufOptions(type=kind, importance=weights if weighted else None))
            family = "llama.cpp's types" if weighted else "the same without importance"
            label = (
                kind + ("" if weighted else ", no importance") + (", widened" if form == "widened" else "")
            )
            found.append(self.candidate(label, family, path, form))
        return found

    def planned(self, bits: Sequence[float]) -> list[Candidate]:
        """--bits in the sparse layout."""
        recipe = override(self.recipe, gguf_layout="sparse")
        return [
            self._compressed(
                override(recipe, bits=one), f"--bits {one:g}, sparse", "planned, sparse", "planned"
            )
            for one in bits
        ]

    def factorized(self, ratios: Sequence[float]) -> list[Candidate]:
        """--ratio in both factorized layouts, with 2:4 codes in the sparse one."""
        found = []
        for ratio in ratios:
            for layout, pattern in (("factorized", "column"), ("sparse", "2:4")):
                recipe = override(
                    self.recipe,
                    allocation="spectral",
                    gguf_layout=layout,
                    code_pattern=pattern,
                    ratio=ratio,
                )
                label = f"--ratio {ratio:g}, {layout}{' 2:4' if pattern == '2:4' else ''}"
                work = f"{layout}-{ratio:g}"
                found.append(self._compressed(recipe, label, f"fixed ratio, {layout}", work))
        return found

    def _compressed(self, recipe: Recipe, label: str, family: str, folder: str) -> Candidate:
        path = (
            self.work
            / f"{label.replace('--', '').replace(', ', '-').replace(' ', '-').replace(':', '')}.gguf"
        )
        work = self.work / folder
        work.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            made = compress(resolve(recipe, self.source), work)
            write(made.model, path, GgufOptions(layout=recipe.gguf_layout))
            print(label, *(note for note in made.notes if "plan" in note), sep="\n  ", flush=True)
        return self.candidate(label, family, path)


class Evaluator:
    """Divergence from the original on held-out windows."""

    def __init__(self, source: ModelSource, windows: TokenWindows) -> None:
        self._windows = [window for window in windows.windows if len(window) > 1]
        runner = torch_runner(source)
        self._original: list[Prediction] = []
        for window in self._windows:
            (logits,) = runner.logits(window[None], len(window))
            self._original.append(predict(logits[0, :-1], window[1:]))

    def __call__(self, candidate: Candidate, speed: Sequence[float]) -> Point:
        """Evaluate a file as it ships, with a cache in F32 so that the cache is not what is measured."""
        parts = []
        with LlamaModel(candidate.path, exact=True) as model:
            for window, reference in zip(self._windows, self._original, strict=True):
                logits = torch.from_numpy(model.logits(window.tolist()))
                parts.append(compare(reference, predict(logits[:-1], window[1:])))
        found = summarize(concatenate(parts))
        low, middle, high = statistics.quantiles(speed, n=4)
        point = Point(
            candidate.label,
            candidate.family,
            candidate.shapes,
            candidate.bits,
            candidate.nbytes,
            found.divergence.mean.value,
            found.divergence.mean.standard_error,
            found.perplexity_ratio.value,
            found.top1_agreement.value,
            middle,
            low,
            high,
        )
        print(
            f"{point.label:32s} {point.bits:6.3f} bits  KL {point.divergence:.4f}  speed x {middle:.2f}",
            flush=True,
        )
        return point


def speeds(candidates: Sequence[Candidate], rounds: int, steps: int) -> dict[str, list[float]]:
    """Decode speed of each candidate in each round over that of Q8_0 of the same shapes in the same round."""
    models = {one.label: LlamaModel(one.path, context=steps + 8) for one in candidates}
    prompt = [1, 2, 3, 4]
    base = {one.shapes: one.label for one in candidates if one.label.startswith("Q8_0")}
    seconds: dict[str, list[float]] = {label: [] for label in models}
    try:
        for _ in range(rounds):
            for label, model in models.items():
                seconds[label].append(model.generate(prompt, max_tokens=steps + 1, stop=False).seconds)
    finally:
        for model in models.values():
            model.close()
    return {
        one.label: [
            reference / own
            for reference, own in zip(seconds[base[one.shapes]], seconds[one.label], strict=True)
        ]
        for one in candidates
    }


def publish(points: Sequence[Point], out: Path, about: str) -> None:
    """Table, JSON and plot."""
    out.mkdir(parents=True, exist_ok=True)
    points = sorted(points, key=lambda point: (point.bits, point.label))
    write_text(out / "gguf_frontier.json", json.dumps([asdict(point) for point in points], indent=1) + "\n")
    lines = [
        about,
        "",
        "| file | bits per weight | bytes | KL [nats per token] | perplexity ratio | same top token | decode, x Q8_0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        label = point.label if point.family.startswith(("llama", "the same")) else f"**{point.label}**"
        lines.append(
            f"| {label} | {point.bits:.3f} | {point.nbytes:,} | {point.divergence:.4f} ± {point.divergence_error:.4f} "
            f"| {point.perplexity_ratio:.3f} | {point.top1:.1%} | {point.speed:.2f} "
            f"({point.speed_low:.2f} to {point.speed_high:.2f}) |"
        )
    write_text(
        out / "gguf_frontier.md", "\n".join(lines) + "\n\n![KL against bits and speed](gguf_frontier.png)\n"
    )
    _plot(points, out / "gguf_frontier.png")


def _plot(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.5), dpi=120, sharey=True)
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    for number, (family, series) in enumerate(sorted(families.items())):
        style = "o-" if family.startswith("planned") else "^sDvP"[number % 5]
        divergence = [point.divergence for point in series]
        left.plot([point.bits for point in series], divergence, style, label=family)
        right.plot([point.speed for point in series], divergence, style.replace("-", ""), label=family)
        for point in series:
            if "no importance" in point.label:
                continue  # beside the point of the same type, which has its name
            short = point.label.split(",")[0]
            for axes, x in ((left, point.bits), (right, point.speed)):
                axes.annotate(
                    short,
                    (x, point.divergence),
                    fontsize=6,
                    xytext=(4, 3),
                    textcoords="offset points",
                    alpha=0.7,
                )
    left.set(
        xlabel="bits per weight of the linears", ylabel="KL [nats per token]", yscale="log", xlim=(1.5, 7)
    )
    right.set(xlabel="decode speed over that of Q8_0 of the same shapes", yscale="log")
    right.margins(x=0.14)  # for the names on the right
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Write, evaluate, measure, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model; none takes the one that ships")
    parser.add_argument("--calibration", help="text, as for compot-deploy")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is finished; it can go on")
    parser.add_argument("--out", type=Path, required=True, help="folder for table, JSON and plot")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="to evaluate on")
    parser.add_argument("--bits", type=float, nargs="*", default=BITS)
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--rounds", type=int, default=21, help="of the measurement of speed")
    parser.add_argument("--steps", type=int, default=32, help="tokens made in a round")
    arguments = parser.parse_args()
    recipe = Recipe(
        model=arguments.model,
        calibration=arguments.calibration,
        format=("gguf",),
        samples=arguments.samples,
        evaluation_tokens=arguments.tokens,
    )
    laboratory = Laboratory(recipe, arguments.work)
    candidates = laboratory.dense()
    candidates += laboratory.factorized(arguments.ratios) + laboratory.planned(arguments.bits)
    windows = evaluation_windows(recipe, laboratory.source, arguments.work)
    evaluator = Evaluator(laboratory.source, windows)
    measured = speeds(candidates, arguments.rounds, arguments.steps)
    points = [evaluator(candidate, measured[candidate.label]) for candidate in candidates]
    name = arguments.model or "the model that ships"
    about = (
        f"GGUF files of {name} ({laboratory.numbers:,} weights in linears), {windows.source}, {arguments.tokens} "
        f"tokens; calibrated on {arguments.samples} windows. The embedding has 8 bits in all files. *Widened*: zeros "
        "appended to rows that do not split into blocks of 256, not counted as bytes; o_proj keeps its rows and falls "
        "back as llama.cpp does. Speeds: median of ratios in one process, quartiles in brackets. "
        "Ratios are allocated by singular values (`--allocation spectral`). "
        "Made by `benchmarks/gguf_frontier.py`."
    )
    if laboratory.numbers < 20_000_000:
        about += (
            " In a model so small a step is mostly a fixed cost per node of the graph, and factors are two products "
            "instead of one: for speed see `benchmarks/llama_speed.py`, which has 181 million weights."
        )
    publish(points, arguments.out, about)


if __name__ == "__main__":
    main()
