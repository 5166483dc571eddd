"""The whole method on one screen: checkpoint → calibration → factors → integers → files → verdict.

Each block is calibrated, factorised and quantized in one go and kept in the work folder as one file, so a
run that was stopped goes on at the first block that is not there. The work folder stands beside the output,
its name derived from everything that decides its content, and is removed when the output is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from compot_deploy import __version__
from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.core.grid import DENSE
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.storage import InMemory, Storage
from compot_deploy.core.store import (
    StoredMatrices,
    Without,
    block_weights,
    save_matrices,
    write_tensors,
    write_text,
)
from compot_deploy.embedded import MODEL
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.archive import check_archive, write_archive
from compot_deploy.exporters.artifact import Provenance, describe, write_manifest
from compot_deploy.exporters.staging import check_target, staged_folder
from compot_deploy.models.calibrate import BlockStream, Gram, Replacements, importance
from compot_deploy.models.checkpoint import Checkpoint, open_checkpoint
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.tokens import TokenWindows, load_tokenizer
from compot_deploy.numerics.spectrum import singular_spectrum
from compot_deploy.numerics.whiten import whiten
from compot_deploy.pipeline.evaluation import Deployment, gate_of, judge_folder, write_report
from compot_deploy.pipeline.footprint import fit_size, predicted_bytes
from compot_deploy.pipeline.texts import EVALUATION, calibration_windows, evaluation_json, evaluation_of
from compot_deploy.pipeline.workspace import (
    RECIPE,
    block_file,
    facts_file,
    importance_file,
    kept_when_interrupted,
    rival_file,
    targets_of,
    unquantized_file,
    work_folder,
)
from compot_deploy.planning.carry_out import (
    Draft,
    Task,
    carry_out,
    check_budget,
    choose,
    collect_grams,
    importances,
    measure_curves,
    measure_effects,
    notes_on,
    verdict,
)
from compot_deploy.planning.compress import LinearFacts, factorize_linear, quantize_linear
from compot_deploy.planning.curves import Curve
from compot_deploy.planning.knapsack import Plan as KnapsackPlan
from compot_deploy.planning.knapsack import plain_plan, smallest_bytes
from compot_deploy.planning.schemes import Joint, Plain
from compot_deploy.planning.settings import (
    budget_of,
    check_format,
    check_groups,
    check_quantizer,
    device_of,
    multiplies_out,
    rival_of,
    search_of,
    shape_of,
    spread,
    storage_of,
    stores,
    table_grid,
)
from compot_deploy.planning.sizing import Choice, MatrixSize
from compot_deploy.planning.spectral import Allocation
from compot_deploy.progress import Progress, silent
from compot_deploy.quant import rtn
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, override, recipe_from_mapping
from compot_deploy.report.facts import Frontier
from compot_deploy.report.plan import frontier_of

SPLIT_WEIGHTS: Final = 2**30
"""Linears of more weights are judged without the factors before quantization: these are one more model in memory,
4 bytes a weight."""

_LARGEST_HALF: Final = 6e4


@dataclass(frozen=True)
class Compression:
    """A model in its final form, with everything a report wants to know about the way there.

    Attributes:
        model: ready for an exporter; its matrices live in the work folder.
        allocation: who got how many atoms.
        facts: one per linear, in block order.
        calibration: the windows that were used.
        notes: facts about the run that a report must state.
        unquantized: the factorised linears before quantization, multiplied out; None if not kept.
        unquantized_absent: why they were not kept.
        frontier: loss predicted against bytes, where a knapsack planned.
        effects: what a unit of squared error of each linear costs, where a knapsack planned.
        rival: the same factors through GPTQ, where another quantizer is compared with it.
        importance: linear to the diagonal of its Gram relative to its mean, shape (in,); for formats that round.
    """

    model: CompressedModel
    allocation: Allocation
    facts: tuple[LinearFacts, ...]
    calibration: TokenWindows
    notes: tuple[str, ...]
    unquantized: Mapping[str, Matrix] | None = None
    unquantized_absent: str = ""
    frontier: Frontier | None = None
    effects: Mapping[str, float] = field(default_factory=dict)
    rival: Mapping[str, Matrix] | None = None
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)


def deploy(model: str | None = None, *, progress: Progress = silent, **knobs: Any) -> tuple[Deployment, ...]:
    """Compress a model, export it, check it: the command line as a function.

    Args:
        model: a local folder or hub id; None takes the small model that ships with the package.
        progress: told how far the work is.
        **knobs: fields of `compot_deploy.recipe.Recipe`; same names as the flags.

    Returns:
        One deployment per format.

    Raises:
        CompotDeployError: see `compot_deploy.errors`; a failed gate is not raised, it is in the report.
    """
    values = {"model": model, **knobs}
    return run(recipe_from_mapping(values, origin="deploy()"), progress)


def run(recipe: Recipe, progress: Progress = silent) -> tuple[Deployment, ...]:
    """Everything, from a recipe: check what can be checked, compress, then export and judge each format."""
    check_quantizer(recipe)
    checkpoint = open_checkpoint(recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
    targets = targets_of(recipe)
    for kind, target in targets.items():
        check_target(target, recipe.force)
        if recipe.archive:
            check_archive(target, recipe.force)
        check_format(recipe, checkpoint, kind)
    check_groups(recipe, checkpoint)

    work = work_folder(recipe, checkpoint)
    with kept_when_interrupted(work):
        compression = compress(recipe, checkpoint, work, progress)
        evaluation = evaluation_of(recipe, checkpoint, work, progress)
        deployments = tuple(
            _export(recipe, checkpoint, compression, evaluation, kind, target, progress)
            for kind, target in targets.items()
        )
    shutil.rmtree(work)
    return deployments


def compress(recipe: Recipe, checkpoint: Checkpoint, work: Path, progress: Progress = silent) -> Compression:
    """Calibrate, factorise and quantize every block; finished blocks in `work` are taken as they are."""
    if recipe.planned:
        return _compress_as_planned(recipe, checkpoint, work, progress)
    planned = allocate(recipe, checkpoint, storage_of(recipe), progress)
    recipe, allocation = planned.recipe, planned.allocation
    windows = calibration_windows(recipe, checkpoint, load_tokenizer(checkpoint.folder), work, progress)

    def finished(layer: int) -> Replacements:
        return lambda _: block_weights(block_file(work, layer), checkpoint.architecture.block_path(layer))

    def compressing(layer: int) -> Replacements:
        def compress_and_go_on(grams: Mapping[str, Gram]) -> Mapping[str, Tensor]:
            _compress_block(recipe, checkpoint, allocation, grams, layer, work)
            return finished(layer)(grams)

        return compress_and_go_on

    label = "Calibrate, factorise, quantize"
    stream: BlockStream | None = None
    for layer in range(checkpoint.layers):
        progress(layer, checkpoint.layers, label)
        needed = (block_file, importance_file, unquantized_file)
        if not all(path(work, layer).exists() for path in needed):
            if stream is None:
                stream = BlockStream(checkpoint, windows, device=device_of(recipe), dtype=recipe.dtype)
                for done in range(layer):
                    stream.advance(
                        done, capture=False, replacements=finished(done) if recipe.sequential else None
                    )
            if recipe.sequential:
                stream.advance(layer, replacements=compressing(layer))
            else:
                _compress_block(recipe, checkpoint, allocation, stream.advance(layer), layer, work)
    progress(checkpoint.layers, checkpoint.layers, label)

    files = {
        f"{checkpoint.architecture.block_path(layer)}.{path}": block_file(work, layer)
        for layer in range(checkpoint.layers)
        for path in checkpoint.architecture.linears
    }
    facts = tuple(
        LinearFacts(**entry)
        for layer in range(checkpoint.layers)
        for entry in json.loads(facts_file(work, layer).read_text())
    )
    model = _model(recipe, checkpoint, files, work)
    rival: Mapping[str, Matrix] | None = None
    if rival_of(recipe) is not None:
        numbers = {block_file(work, layer): layer for layer in range(checkpoint.layers)}
        beside = {name: rival_file(work, numbers[path]) for name, path in files.items()}
        rival = StoredMatrices({**beside, **_compress_tables(recipe, checkpoint, work)})
    notes = (*planned.notes, *_why_not_planned(recipe), *_notes(windows, facts))
    kept = _keeps_unquantized(checkpoint)
    return Compression(
        model,
        allocation,
        facts,
        windows,
        notes,
        rival=rival,
        importance=_importance(checkpoint, work),
        unquantized=StoredMatrices(
            {
                name: unquantized_file(work, layer)
                for layer in range(checkpoint.layers)
                for path in checkpoint.architecture.linears
                if allocation.choices[
                    name := f"{checkpoint.architecture.block_path(layer)}.{path}"
                ].factorized
            }
        )
        if kept
        else None,
        unquantized_absent=""
        if kept
        else f"a model of more than {SPLIT_WEIGHTS:,} weights would be in memory once more for it",
    )


def _compress_as_planned(
    recipe: Recipe, checkpoint: Checkpoint, work: Path, progress: Progress
) -> Compression:
    """Measure candidates and effects, plan, make what was planned."""
    drafted = draft(recipe, checkpoint, work, progress)
    outcome = carry_out(drafted.task, drafted.plans)
    plain = Plain(recipe.dictionary_grid)
    choices = {}
    for entry in outcome.plan.chosen:
        form, first = entry.candidate.form, entry.names[0]
        levels = form.levels if isinstance(form, Joint) else ()
        for name in entry.names:
            choices[name] = Choice(
                name,
                sum(level.atoms for level in levels),
                levels[-1].pattern if levels else DENSE,
                entry.candidate.bytes if name == first else 0,  # a shared dictionary counts with the first
                plain.bytes(*shape_of(checkpoint, name), drafted.task.storage),
            )
    ordered = {name: choices[name] for name in outcome.files}
    model = _model(recipe, checkpoint, outcome.files, work)
    notes = (
        *_notes_of_plan(recipe, checkpoint, outcome.plan),
        *notes_on(drafted.curves),
        *outcome.notes,
        *_notes(drafted.task.windows, outcome.facts),
    )
    allocation = Allocation(ordered, outcome.plan.budget)
    return Compression(
        model,
        allocation,
        outcome.facts,
        drafted.task.windows,
        notes,
        importance=importances(drafted.task),
        unquantized_absent="the plan's factors were made on their grids and never existed without"
        if any(isinstance(entry.candidate.form, Joint) for entry in outcome.plan.chosen)
        else "the plan factorises no linear",
        frontier=frontier_of(drafted, outcome.plan, recipe.budget),
        effects=drafted.effects,
    )


def draft(recipe: Recipe, checkpoint: Checkpoint, work: Path, progress: Progress = silent) -> Draft:
    """Measure candidates and effects, and plan."""
    storage = storage_of(recipe)
    windows = calibration_windows(recipe, checkpoint, load_tokenizer(checkpoint.folder), work, progress)
    task = Task(
        checkpoint=checkpoint,
        windows=windows,
        work=work,
        storage=InMemory(storage) if recipe.budget == "memory" else storage,
        search=search_of(recipe, checkpoint),
        quantizer=recipe.quantizer,
        device=device_of(recipe),
        dtype=recipe.dtype,
        sequential=recipe.sequential,
        progress=progress,
    )
    evaluation = evaluation_of(recipe, checkpoint, work, progress)
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    sizes = {name: shape_of(checkpoint, name) for name in names}

    def predict(plan: KnapsackPlan) -> int:
        notes = (*_notes_of_plan(recipe, checkpoint, plan), *notes_on(curves))
        notes += (verdict((plan,) * 3, (0.12345,) * 3), *windows.notes) if plan.chosen else windows.notes
        return predicted_bytes(recipe, checkpoint, plan, windows, evaluation, notes)

    curves: tuple[Curve, ...] = ()  # none measured yet
    plain = plain_plan(sizes, recipe.dictionary_grid, storage)
    budget = budget_of(recipe, checkpoint, task.storage, predict(plain) - plain.bytes)
    collect_grams(task)
    if recipe.size_bytes is None:
        check_budget(task, budget)
    curves = measure_curves(task)
    effects = measure_effects(task)
    size = recipe.size_bytes
    if size is None:
        plans = choose(curves, effects, budget)
    else:
        plans = fit_size(
            size, budget, smallest_bytes(curves), lambda limit: choose(curves, effects, limit), predict
        )
    return Draft(task, curves, effects, plans, sizes, predict(plans[0]) - plans[0].bytes)


def plan_only(recipe: Recipe, progress: Progress = silent) -> Draft:
    """Measure and plan, export nothing; a later run of the same settings goes on with the measurements.

    Raises:
        RecipeError: the recipe's allocation is not the knapsack.
    """
    if not recipe.planned:
        raise RecipeError(f"--allocation {recipe.allocation} has no curves to plan with: use knapsack.")
    checkpoint = open_checkpoint(recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
    for kind in recipe.format:
        check_format(recipe, checkpoint, kind)
    work = work_folder(recipe, checkpoint)
    with kept_when_interrupted(work):
        return draft(recipe, checkpoint, work, progress)


def _model(recipe: Recipe, checkpoint: Checkpoint, files: Mapping[str, Path], work: Path) -> CompressedModel:
    """Linears from their files, tables on their grids, everything else as it was."""
    files = {**files, **_compress_tables(recipe, checkpoint, work)}
    return CompressedModel(
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        matrices=StoredMatrices(files),
        tensors=Without(checkpoint.tensors, {f"{name}.weight" for name in files} | {checkpoint.head_name}),
        tied=checkpoint.tied,
        source=str(checkpoint.folder),
    )


def _compress_block(
    recipe: Recipe,
    checkpoint: Checkpoint,
    allocation: Allocation,
    grams: Mapping[str, Gram],
    layer: int,
    work: Path,
) -> None:
    block = checkpoint.architecture.block_path(layer)
    device = device_of(recipe)
    matrices: dict[str, Matrix] = {}
    unquantized: dict[str, Matrix] = {}
    beside: dict[str, Matrix] = {}
    rival = rival_of(recipe)
    facts = []
    for shared in checkpoint.architecture.inputs:
        whitening = whiten(grams[shared.name].matrix.to(device))
        for path in shared.linears:
            name = f"{block}.{path}"
            weight = checkpoint.weight(name).float().to(device)
            choice = allocation.choices[name]
            factors = factorize_linear(weight, whitening, choice, recipe)
            result = quantize_linear(weight, whitening, choice, recipe, factors)
            matrices[name] = result.matrix
            if result.unquantized is not None:
                unquantized[name] = _halved(result.unquantized)
            if rival is not None:
                beside[name] = quantize_linear(weight, whitening, choice, rival, factors).matrix
            facts.append(asdict(result.facts))
    write_tensors(
        importance_file(work, layer), {name: importance(gram.matrix) for name, gram in grams.items()}, {}
    )
    write_text(facts_file(work, layer), json.dumps(facts, indent=1))
    if rival is not None:
        save_matrices(rival_file(work, layer), beside)
    save_matrices(unquantized_file(work, layer), unquantized if _keeps_unquantized(checkpoint) else {})
    save_matrices(block_file(work, layer), matrices)


def _importance(checkpoint: Checkpoint, work: Path) -> dict[str, torch.Tensor]:
    """How much each input of every linear matters, as the work folder holds it."""
    architecture = checkpoint.architecture
    return {
        f"{architecture.block_path(layer)}.{path}": stored[shared.name]
        for layer in range(checkpoint.layers)
        for stored in (load_file(importance_file(work, layer)),)
        for shared in architecture.inputs
        for path in shared.linears
    }


def _keeps_unquantized(checkpoint: Checkpoint) -> bool:
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    return sum(math.prod(shape_of(checkpoint, name)) for name in names) <= SPLIT_WEIGHTS


def _halved(matrix: Dense) -> Dense:
    """In 16 bits on disk: that rounds by 1e-7 of the power, and factorisation loses 1e-3 and more."""
    return Dense(matrix.weight.half()) if float(matrix.weight.abs().max()) < _LARGEST_HALF else matrix


def _compress_tables(recipe: Recipe, checkpoint: Checkpoint, work: Path) -> dict[str, Path]:
    """The token embedding and, where it is a matrix of its own, the output head; (hidden, vocabulary)."""
    architecture = checkpoint.architecture
    tables = {architecture.embedding: recipe.embeddings}
    if not checkpoint.tied:
        tables[architecture.head] = recipe.head
    files = {}
    for name, precision in tables.items():
        files[name] = work / f"{name.rsplit('.', 1)[-1]}.safetensors"
        if not files[name].exists():
            weight = checkpoint.weight(name).float()
            grid = table_grid(precision)
            table: Matrix = Dense(weight) if grid is None else rtn(weight, None, grid)
            save_matrices(files[name], {name: table})
    return files


@dataclass(frozen=True)
class Plan:
    """An allocation, the recipe that it holds for, and what had to be changed to get it."""

    allocation: Allocation
    recipe: Recipe
    notes: tuple[str, ...] = ()


def allocate(recipe: Recipe, checkpoint: Checkpoint, storage: Storage, progress: Progress = silent) -> Plan:
    """Spread the budget over all linears of all blocks.

    Where groups of 32 atoms are too coarse for the ratio and no group was asked for, groups of 16 are tried,
    and that is noted.

    Raises:
        RecipeError: a ratio that cannot be met, saying which can.
    """
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    if recipe.method == "plain":
        sized = {
            name: Plain(recipe.dictionary_grid).bytes(*shape_of(checkpoint, name), storage) for name in names
        }
        plain = {name: Choice(name, 0, DENSE, size, size) for name, size in sized.items()}
        return Plan(
            Allocation(plain, sum(sized.values())), recipe, ("nothing was factorised: --method plain",)
        )
    spectral = recipe.allocator != "uniform"
    sizes = []
    for number, name in enumerate(names):
        if spectral:
            progress(number, len(names), "Read spectra")
        spectrum = singular_spectrum(checkpoint.weight(name).float()) if spectral else ()
        sizes.append(MatrixSize(name, *shape_of(checkpoint, name), spectrum))
    if spectral:
        progress(len(names), len(names), "Read spectra")

    def attempt(recipe: Recipe) -> Allocation:
        return spread(recipe, sizes, storage)

    try:
        return Plan(attempt(recipe), recipe)
    except RecipeError:
        finer = DEFAULT_GROUP // 2
        grid = recipe.code_grid
        if recipe.code_group is not None or grid is None or grid.table:
            raise
        if not stores(storage, replace(grid, group=finer)):
            raise
        recipe = override(recipe, code_group=finer)
        note = f"groups of {DEFAULT_GROUP} atoms are too coarse for this ratio: codes use groups of {finer}"
        return Plan(attempt(recipe), recipe, (note,))


def _export(
    recipe: Recipe,
    checkpoint: Checkpoint,
    compression: Compression,
    evaluation: Evaluation,
    kind: str,
    target: Path,
    progress: Progress,
) -> Deployment:
    exporter = EXPORTERS[kind]
    options = exporter.options(
        asdict(recipe)
        | {"importance": compression.importance, "provenance": _provenance(recipe, compression.calibration)}
    )
    storage = exporter.storage(options)
    with staged_folder(target, recipe.force) as folder:
        progress(0, 1, f"Write {kind}")
        differences = exporter.write(compression.model, folder, options) or ()
        progress(1, 1, f"Write {kind}")
        (folder / EVALUATION).parent.mkdir(exist_ok=True)
        write_text(folder / EVALUATION, evaluation_json(evaluation))
        write_text(folder / RECIPE, recipe.to_toml())
        choices = compression.allocation.choices
        # What a file rounds is described and judged by what it holds.
        model = exporter.read_model(folder) if multiplies_out(storage) else compression.model
        manifest = write_manifest(
            folder,
            describe(
                model,
                kind,
                storage,
                Provenance(
                    recipe=asdict(recipe),
                    calibration=compression.calibration.digest,
                    seed=recipe.seed,
                    why_dense={name: choice.reason for name, choice in choices.items() if choice.reason},
                    facts={
                        "source": checkpoint.fingerprint,
                        "calibration": compression.calibration.source,
                        "calibration_windows": len(compression.calibration.windows),
                        "calibration_tokens": sum(map(len, compression.calibration.windows)),
                        "notes": [*compression.notes, *(fact.rstrip(".") for fact in differences)],
                        "linears": [asdict(fact) for fact in compression.facts],
                        "frontier": None if compression.frontier is None else asdict(compression.frontier),
                        "effects": dict(compression.effects),
                    },
                ),
            ),
        )
        report = judge_folder(
            folder,
            manifest,
            model,
            checkpoint,
            evaluation,
            gate_of(recipe),
            progress,
            artifact=target.resolve().name,
            unquantized=compression.unquantized,
            unquantized_absent=compression.unquantized_absent,
            rival=compression.rival,
        )
        write_report(folder, report, manifest)
    if recipe.archive:
        write_archive(target, recipe.force)
    return Deployment(target, report)


def _provenance(recipe: Recipe, calibration: TokenWindows) -> dict[str, str]:
    """What a file that stands alone says about where it comes from; the same run writes the same bytes."""
    places = ("out", "force", "archive")
    knobs = {
        name: value for name, value in asdict(recipe).items() if name not in places and value is not None
    }
    return {
        "recipe": json.dumps(knobs, sort_keys=True),
        "calibration": calibration.digest,
        "version": __version__,
    }


def _notes_of_plan(recipe: Recipe, checkpoint: Checkpoint, plan: KnapsackPlan) -> tuple[str, ...]:
    names = [name for entry in plan.chosen for name in entry.names]
    bits = plan.bytes * 8 / sum(math.prod(shape_of(checkpoint, name)) for name in names)
    return (
        f"the plan spends {plan.bytes} of {plan.budget} bytes ({recipe.budget}) on the linears, {bits:.3f} bits "
        "per weight",
    )


def _why_not_planned(recipe: Recipe) -> tuple[str, ...]:
    """Where the spectral rule was nobody's explicit choice: what ruled a plan out, or what would be smaller."""
    if recipe.allocation != "auto" or recipe.method != "compot":
        return ()
    if recipe.quant != "none" and multiplies_out(storage_of(recipe)):
        return (
            "a dense GGUF file stores the products of factors, which are no smaller for it: --gguf-layout sparse "
            "stores the factors, and --method plain with --gguf-type Q4_K or IQ3_XXS is small in every llama.cpp",
        )
    if recipe.quant == "none" or recipe.quantizer == "bnb":
        return ()
    return (
        f"{recipe.why_one_form} settles the form of every factorised matrix, so the ratio was spread by singular "
        "values, as with --allocation spectral; without it, each matrix gets the form that costs the model least for "
        "its bytes, plain integers among them",
    )


def _notes(windows: TokenWindows, facts: tuple[LinearFacts, ...]) -> tuple[str, ...]:
    notes = list(windows.notes)
    escalated = [fact.name for fact in facts if fact.ridge_escalated]
    if escalated:
        largest = max(fact.ridge for fact in facts)
        notes.append(
            f"{len(escalated)} linears had singular Grams; their ridge was raised, up to {largest:g} of the mean "
            f"diagonal (first: {escalated[0]}); more calibration text would help"
        )
    return tuple(notes)
