"""How large the files of a model will be, before there are any: the export in a dry run, with stand-ins for matrices.

A stand-in has the shape and the grid of a matrix and no values (its tensors are on torch's device ``meta``). Exporters
write graphs, headers and configuration of a model of stand-ins as those of any other model, and only count what would
be data. Reports, manifest and model card are not part of the model, and a size does not count them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from typing_extensions import assert_never

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.core.store import Without
from compot_deploy.errors import RecipeError
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.pipeline.provenance import stamp
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.schemes import Joint, Plain, Scheme, Separate
from compot_deploy.planning.settings import Settings, options_of

_ATTEMPTS: Final = 8
_CLOSE: Final = 0.001
"""How close to a size a plan has to come, as a part of it; then the search ends."""


def other_bytes(settings: Settings, plan: Plan) -> int:
    """Bytes of the model's files in the first format, less what a plan says that its matrices take."""
    exporter = settings.exporter
    model = model_of_stand_ins(settings, plan)
    # A hash that is not known yet has the length of any other.
    options = options_of(settings.recipe, exporter, provenance=stamp(settings.recipe, "0" * 64))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        counted = exporter.dry_run(model, folder, options)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return counted + written - plan.bytes


def fit_size(
    size: int,
    budget: int,
    smallest: int,
    plans_at: Callable[[int], tuple[Plan, ...]],
    predict: Callable[[Plan], int],
) -> tuple[Plan, ...]:
    """The plans of the largest budget with which no output is larger than `size`.

    What a model takes besides its matrices depends on the plan: nodes, padding, names.

    Args:
        size: of the model's files, in bytes.
        budget: for the matrices and the tables that compete with them, a first guess.
        smallest: least budget there is a plan for.
        plans_at: plans of a budget.
        predict: size of a plan's files.

    Raises:
        RecipeError: even the smallest schemes need more, saying how much.
    """
    best: tuple[Plan, ...] = ()
    budget = max(budget, smallest)
    slope = 1.0  # bytes of output per byte of the plan, which need not be counted alike
    before: tuple[int, int] | None = None
    for _ in range(_ATTEMPTS):
        plans = plans_at(budget)
        largest = max(predict(plan) for plan in plans)
        if largest <= size and (not best or plans[0].total_loss < best[0].total_loss):
            best = plans
        if largest > size and budget == smallest:
            break
        left = size - largest
        if 0 <= left <= size * _CLOSE or (left > 0 and plans[0].notes):
            break
        spent = plans[0].bytes + plans[0].table_bytes
        if before is not None and before[0] != spent:
            slope = min(8.0, max(0.5, (largest - before[1]) / (spent - before[0])))
        before = (spent, largest)
        budget = max(smallest, spent + int(left / slope) - int(size * _CLOSE / 2))
    if not best:
        least = max(predict(plan) for plan in plans_at(smallest))
        if least > size:
            raise RecipeError(
                f"--size: {size} bytes cannot be met: with the smallest scheme of every linear the model takes {least} "
                "bytes. Allow at least that, or store the embedding in fewer bits."
            )
        best = plans_at(smallest)
    return best


def model_of_stand_ins(settings: Settings, plan: Plan) -> CompressedModel:
    """A model as an exporter takes it, with stand-ins for matrices and tables."""
    source, layout = settings.source, settings.source.layout
    made: dict[str, Matrix] = {}
    for entry in plan.chosen:
        made |= _stand_ins(entry.candidate.scheme, {name: source.shape(name) for name in entry.names})
    matrices = {name: made[name] for name in layout.names}
    matrices |= {name: _leaf(*source.shape(name), grid) for name, grid in settings.tables(plan).items()}
    matrices |= {name: _leaf(*source.shape(name), None) for name in source.outside}
    written = {f"{name}.weight" for name in (layout.embedding, layout.head) if name is not None}
    written |= {site.parameter for site in layout.sites} | {f"{name}.weight" for name in source.outside}
    return CompressedModel(
        architecture=source.architecture,
        config=source.config,
        matrices=matrices,
        tensors=Without(source.tensors, written),
        tied=layout.tied,
        source=str(source.folder),
        tables=Tables(layout.embedding, layout.head),
        outside=frozenset(source.outside),
    )


def _stand_ins(scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Matrix]:
    shared = "+".join(shapes)
    match scheme:
        case Plain():
            return {name: _leaf(*shape, scheme.grid) for name, shape in shapes.items()}
        case Joint():
            return {
                name: Factorized(
                    tuple(
                        FactorPair(
                            _leaf(inputs, tier.atoms, tier.dictionary),
                            _leaf(tier.atoms, outputs, tier.codes),
                            shared,
                            tier.pattern,
                        )
                        for tier in scheme.tiers
                    )
                )
                for name, (inputs, outputs) in shapes.items()
            }
        case Separate():
            return {
                name: Factorized(
                    (
                        FactorPair(
                            _leaf(inputs, scheme.atoms, scheme.dictionary),
                            _leaf(scheme.atoms, outputs, scheme.codes),
                            shared,
                            scheme.pattern,
                        ),
                    )
                )
                for name, (inputs, outputs) in shapes.items()
            }
        case _:
            assert_never(scheme)


def _leaf(rows: int, columns: int, grid: Grid | None) -> Leaf:
    if grid is None:
        return Dense(torch.empty(rows, columns, device="meta"))
    return Quantized(
        torch.empty(rows, columns, dtype=torch.int8, device="meta"),
        torch.empty(grid.groups(rows), columns, dtype=torch.float16, device="meta"),
        grid,
    )
