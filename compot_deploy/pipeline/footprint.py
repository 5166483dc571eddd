"""How large an output will be, before there is one: the whole export in rehearsal, with stand-ins for matrices.

A stand-in has the shape and the grid of a matrix and no values (its tensors are on torch's device ``meta``).
Exporters write graphs, headers, configuration and manifest of a model of stand-ins as those of any other model, and
only count what would be data. What is left is the report, whose figures are not known yet: it is made of
figures of the same length.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy import __version__
from compot_deploy.accuracy.evaluate import Evaluation, check
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, Leaf, Matrix, Pair, Quantized
from compot_deploy.core.store import Without, write_text
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import Provenance, describe, library_versions, write_manifest
from compot_deploy.exporters.manifest import Manifest
from compot_deploy.models.checkpoint import Checkpoint, checkpoint_shape
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.pipeline.evaluation import HTML, facts_of, gate_of, sizes_of, write_report
from compot_deploy.pipeline.texts import EVALUATION, evaluation_json
from compot_deploy.pipeline.workspace import RECIPE, targets_of
from compot_deploy.planning.compress import LinearFacts
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.schemes import Form, Joint, Plain
from compot_deploy.planning.schemes import describe as describe_form
from compot_deploy.planning.settings import table_grid
from compot_deploy.recipe import Recipe
from compot_deploy.report.document import Report
from compot_deploy.report.facts import Frontier, FrontierPoint
from compot_deploy.report.manifest import frontier_of, layers_of, origin_of
from compot_deploy.report.plan import REPORT_POINTS

_ERROR: Final = 0.12345678901234567
"""Of a linear: as many digits as a measured one has."""

_REMARKS: Final = 500
"""Bytes of a report that nothing tells before: texts of wider characters, figures of more digits than drawn here."""

_FINDINGS: Final = 350
"""Bytes of what the structural check of an ONNX folder remarks on, such as the runtime that 2 bits need; in report
and card."""

_ATTEMPTS: Final = 8
_CLOSE: Final = 0.001
"""How close to a size a plan has to come, as a part of it; then the search ends."""

_TOKENS: Final = 64
"""Of the evaluation text that the figures of the rehearsed report are made from."""


def predicted_bytes(
    recipe: Recipe,
    checkpoint: Checkpoint,
    plan: Plan,
    windows: TokenWindows,
    evaluation: Evaluation,
    notes: Sequence[str],
) -> int:
    """Size of the whole output of a plan in the recipe's first format, all files but the page report.html.

    Args:
        recipe: what is to be made.
        checkpoint: the original.
        plan: a form for every linear.
        windows: calibration text.
        evaluation: what the output will be judged on.
        notes: facts that its report will state.
    """
    kind = recipe.format[0]
    exporter = EXPORTERS[kind]
    options = exporter.options(asdict(recipe))
    model = model_of_stand_ins(recipe, checkpoint, plan)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / targets_of(recipe)[kind].resolve().name
        folder.mkdir()
        counted = exporter.rehearse(model, folder, options)
        (folder / EVALUATION).parent.mkdir(exist_ok=True)
        write_text(folder / EVALUATION, evaluation_json(evaluation))
        write_text(folder / RECIPE, recipe.to_toml())
        forms = {name: entry.candidate.form for entry in plan.chosen for name in entry.names}
        shapes = [_shape(checkpoint, name) for name in forms]
        facts = [LinearFacts(name, _ERROR, None, 1e-6, False, _reason(form)) for name, form in forms.items()]
        manifest = write_manifest(
            folder,
            describe(
                model,
                kind,
                exporter.storage(options),
                Provenance(
                    recipe=asdict(recipe),
                    calibration=windows.digest,
                    seed=recipe.seed,
                    facts={
                        "source": checkpoint.fingerprint,
                        "calibration": windows.source,
                        "calibration_windows": len(windows.windows),
                        "calibration_tokens": windows.tokens,
                        "notes": list(notes),
                        "linears": [asdict(fact) for fact in facts],
                        "frontier": asdict(_frontier(plan, sum(map(math.prod, shapes)))),
                        "effects": dict.fromkeys(forms, _ERROR),
                    },
                ),
            ),
        )
        write_report(folder, _report(recipe, checkpoint, folder, manifest, evaluation), manifest)
        unknown = _REMARKS + (_FINDINGS if kind == "onnx" else 0)
        shipped = [path for path in folder.rglob("*") if path.is_file() and path.name != Path(HTML).name]
        return counted + unknown + sum(path.stat().st_size for path in shipped)


def fit_size(
    size: int,
    budget: int,
    smallest: int,
    plans_at: Callable[[int], tuple[Plan, ...]],
    predict: Callable[[Plan], int],
) -> tuple[Plan, ...]:
    """The plans of the largest budget with which no output is larger than `size`.

    What an output takes besides its linears depends on the plan: nodes, padding, records.

    Args:
        size: of the whole output, in bytes.
        budget: for the linears, a first guess.
        smallest: least budget there is a plan for.
        plans_at: plans of a budget.
        predict: size of a plan's output.

    Raises:
        RecipeError: even the smallest forms need more, saying how much.
    """
    best: tuple[Plan, ...] = ()
    budget = max(budget, smallest)
    slope = 1.0  # bytes of output per byte of the plan, which need not be counted alike
    before: tuple[int, int] | None = None
    for _ in range(_ATTEMPTS):
        plans = plans_at(budget)
        largest = max(predict(plan) for plan in plans)
        if largest <= size and (not best or plans[0].loss < best[0].loss):
            best = plans
        if largest > size and budget == smallest:
            break
        left = size - largest
        if 0 <= left <= size * _CLOSE or (left > 0 and plans[0].notes):
            break
        spent = plans[0].bytes
        if before is not None and before[0] != spent:
            slope = min(8.0, max(0.5, (largest - before[1]) / (spent - before[0])))
        before = (spent, largest)
        budget = max(smallest, spent + int(left / slope) - int(size * _CLOSE / 2))
    if not best:
        least = max(predict(plan) for plan in plans_at(smallest))
        if least > size:
            raise RecipeError(
                f"--size: {size} bytes cannot be met: with the smallest form of every linear the output takes {least} "
                "bytes. Allow at least that, or store the embedding in fewer bits."
            )
        best = plans_at(smallest)
    return best


def model_of_stand_ins(recipe: Recipe, checkpoint: Checkpoint, plan: Plan) -> CompressedModel:
    """A model as an exporter takes it, with stand-ins for linears and tables."""
    architecture = checkpoint.architecture
    matrices: dict[str, Matrix] = {}
    for entry in plan.chosen:
        matrices |= _stand_ins(entry.candidate.form, {name: _shape(checkpoint, name) for name in entry.names})
    linears = architecture.linear_names(checkpoint.layers)
    matrices = {name: matrices[name] for name in linears}
    tables = {architecture.embedding: recipe.embeddings}
    if not checkpoint.tied:
        tables[architecture.head] = recipe.head
    for name, precision in tables.items():
        matrices[name] = _leaf(*_shape(checkpoint, name), table_grid(precision))
    return CompressedModel(
        architecture=architecture,
        config=checkpoint.config,
        matrices=matrices,
        tensors=Without(checkpoint.tensors, {f"{name}.weight" for name in matrices} | {checkpoint.head_name}),
        tied=checkpoint.tied,
        source=str(checkpoint.folder),
    )


def _stand_ins(form: Form, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Matrix]:
    match form:
        case Plain():
            return {name: _leaf(*shape, form.grid) for name, shape in shapes.items()}
        case Joint():
            shared = "+".join(shapes)
            return {
                name: Factorized(
                    tuple(
                        Pair(
                            _leaf(inputs, level.atoms, level.dictionary),
                            _leaf(level.atoms, outputs, level.codes),
                            shared,
                            level.pattern,
                        )
                        for level in form.levels
                    )
                )
                for name, (inputs, outputs) in shapes.items()
            }
        case _:
            assert_never(form)


def _leaf(rows: int, columns: int, grid: Grid | None) -> Leaf:
    if grid is None:
        return Dense(torch.empty(rows, columns, device="meta"))
    return Quantized(
        torch.empty(rows, columns, dtype=torch.int8, device="meta"),
        torch.empty(grid.groups(rows), columns, dtype=torch.float16, device="meta"),
        grid,
    )


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    outputs, inputs = checkpoint_shape(checkpoint, f"{name}.weight")
    return inputs, outputs


def _reason(form: Form) -> str:
    return f"the plan chose {describe_form(form)}" if isinstance(form, Plain) else ""


# -- the report ----------------------------------------------------------------------------------------


def _report(
    recipe: Recipe,
    checkpoint: Checkpoint,
    folder: Path,
    manifest: Manifest,
    evaluation: Evaluation,
) -> Report:
    """A report of the form and length that the real one will have, its figures drawn at random."""
    text = evaluation.text
    short = dataclasses.replace(text, windows=tuple(window[:_TOKENS] for window in text.windows[:2]))
    original, compressed, exact, shipped = (
        _Rehearsed(name, seed, checkpoint, text)
        for seed, name in enumerate(
            (
                "original",
                "torch 2.13.0+cpu, dequantized weights",
                "onnxruntime 1.32.0, accuracy level 0",
                "onnxruntime 1.32.0, as shipped",
            )
        )
    )
    return Report(
        model=str(recipe.model or "the model that ships with compot-deploy"),
        artifact=folder.name,
        format=manifest.exporter,
        package=__version__,
        created="2000-01-01T00:00:00+00:00",
        sizes=dataclasses.replace(sizes_of(manifest), transport=sum(r.bytes for r in manifest.matrices)),
        accuracy=check(
            original,
            compressed,
            shipped,
            exact,
            dataclasses.replace(evaluation, text=short),
            gate_of(recipe),
            factorized_absent="the plan's factors were made on their grids and never existed without",
        ),
        findings=(),
        facts=facts_of(manifest),
        recipe=manifest.recipe,
        versions=library_versions(),
        layers=layers_of(manifest),
        frontier=frontier_of(manifest),
        origin=origin_of(manifest),
    )


def _frontier(plan: Plan, weights: int) -> Frontier:
    """As many points as a report has."""
    point = FrontierPoint(plan.bytes, _ERROR + 2, _ERROR)
    points = (point,) * REPORT_POINTS
    return Frontier("file", plan.budget, weights, point, points, points)


@dataclasses.dataclass(frozen=True)
class _Rehearsed:
    """A runner that was never run: random logits, and continuations taken from the evaluation text."""

    name: str
    seed: int
    checkpoint: Checkpoint
    text: TokenWindows

    @property
    def vocabulary(self) -> int:
        return self.checkpoint.vocabulary

    @property
    def context(self) -> int | None:
        return None

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        generator = torch.Generator().manual_seed(self.seed)
        for piece in tokens.split(chunk, dim=1):
            yield torch.randn(*piece.shape, self.vocabulary, generator=generator)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        longest = max(self.text.windows, key=len)
        tokens = [int(token) for token in longest[self.seed :]]
        return tuple((tokens * -(-new_tokens // len(tokens)))[:new_tokens])
