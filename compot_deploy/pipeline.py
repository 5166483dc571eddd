"""The whole method on one screen: checkpoint → calibration → factors → integers → files → verdict.

Each block is calibrated, factorised and quantized in one go and kept in the work folder as one file, so a
run that was stopped goes on at the first block that is not there. The work folder stands beside the output,
its name derived from everything that decides its content, and is removed when the output is complete.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import lzma
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from compot_deploy import __version__
from compot_deploy.accuracy import Evaluation, Gate, check
from compot_deploy.allocate import (
    ALLOCATIONS,
    Allocation,
    Choice,
    MatrixSize,
    PaperStorage,
    Precision,
    Sparsity,
)
from compot_deploy.calibrate import BlockStream
from compot_deploy.candidates import Search
from compot_deploy.checkpoint import Checkpoint, open_checkpoint
from compot_deploy.compress import LinearFacts, compress_linear
from compot_deploy.embedded import HELD_OUT_TEXT, MODEL, TRAINING_TEXT
from compot_deploy.errors import ArtifactError, InputError, InterruptedRunError, RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.archive import check_archive, write_archive
from compot_deploy.exporters.artifact import (
    Manifest,
    Provenance,
    check_target,
    describe,
    library_versions,
    seal,
    staged_folder,
    verify,
    write_manifest,
)
from compot_deploy.exporters.model_card import model_card
from compot_deploy.factorize import singular_spectrum
from compot_deploy.plan import GridChoice, InMemory, Joint, Plain
from compot_deploy.planning import (
    Draft,
    Task,
    carry_out,
    choose,
    collect_grams,
    measure_curves,
    measure_effects,
)
from compot_deploy.progress import Progress, silent
from compot_deploy.quant import rtn
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, override, recipe_from_mapping
from compot_deploy.report import Report, Sizes, to_json, to_junit
from compot_deploy.runners import RUNNERS, compressed_runner, torch_runner
from compot_deploy.store import StoredMatrices, save_matrices, write_tensors, write_text
from compot_deploy.tokens import (
    HELD_OUT_SHARE,
    SELF,
    Tokenizer,
    TokenWindows,
    load_tokenizer,
    make_windows,
    read_text,
    sample_from_model,
    text_of_dataset,
    windows_of_jsonl,
    windows_of_text,
)
from compot_deploy.weights import DENSE, CompressedModel, Dense, Grid, Matrix, Pattern, Storage
from compot_deploy.whiten import whiten

EVALUATION: Final = "compot/evaluation.json"
RECIPE: Final = "compot/recipe.toml"
REPORT: Final = "compot/report.json"
JUNIT: Final = "compot/report.junit.xml"
CARD: Final = "README.md"

_DOES_NOT_CHANGE_WEIGHTS: Final = frozenset(
    (
        "out",
        "force",
        "format",
        "archive",
        "evaluation",
        "evaluation_tokens",
        "max_perplexity_ratio",
        "max_kl",
        "min_top1",
        "max_export_nmse",
    )
)
_BYTES_PER_LINEAR: Final = 2700
_RECORDS: Final = 29_000
"""About what graph and manifest take for a linear, and report, card and configuration once."""
_BYTES_PER_EVALUATION_TOKEN: Final = 5
_BUDGETS: Final = frozenset(("bits", "size", "ratio"))
_PROMPTS: Final = 3
_PROMPT_TOKENS: Final = 12


@dataclass(frozen=True)
class Compression:
    """A model in its final form, with everything a report wants to know about the way there.

    Attributes:
        model: ready for an exporter; its matrices live in the work folder.
        allocation: who got how many atoms.
        facts: one per linear, in block order.
        calibration: the windows that were used.
        notes: facts about the run that a report must state.
    """

    model: CompressedModel
    allocation: Allocation
    facts: tuple[LinearFacts, ...]
    calibration: TokenWindows
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Deployment:
    """A finished folder and what is known about it.

    Attributes:
        folder: where it is.
        report: sizes, losses, gate.
    """

    folder: Path
    report: Report

    @property
    def passed(self) -> bool:
        """Whether the gate passed."""
        return self.report.passed


# -- the method ----------------------------------------------------------------------------------------


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
    checkpoint = open_checkpoint(recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
    targets = targets_of(recipe)
    for kind, target in targets.items():
        check_target(target, recipe.force)
        if recipe.archive:
            check_archive(target, recipe.force)
        _check_format(recipe, checkpoint, kind)
    check_groups(recipe, checkpoint)

    work = work_folder(recipe, checkpoint)
    with _kept_when_interrupted(work):
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

    label = "Calibrate, factorise, quantize"
    stream: BlockStream | None = None
    for layer in range(checkpoint.layers):
        progress(layer, checkpoint.layers, label)
        if not _block_file(work, layer).exists():
            if stream is None:
                stream = BlockStream(checkpoint, windows, device=device_of(recipe), dtype=recipe.dtype)
                for done in range(layer):
                    stream.advance(done, capture=False)
            _compress_block(recipe, checkpoint, allocation, stream, layer, work)
    progress(checkpoint.layers, checkpoint.layers, label)

    files = {
        f"{checkpoint.architecture.block_path(layer)}.{path}": _block_file(work, layer)
        for layer in range(checkpoint.layers)
        for path in checkpoint.architecture.linears
    }
    facts = tuple(
        LinearFacts(**entry)
        for layer in range(checkpoint.layers)
        for entry in json.loads(_facts_file(work, layer).read_text())
    )
    model = _model(recipe, checkpoint, files, work)
    notes = (*planned.notes, *_notes(windows, facts))
    return Compression(model, allocation, facts, windows, notes)


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
                plain.bytes(*_shape(checkpoint, name), drafted.task.storage),
            )
    ordered = {name: choices[name] for name in outcome.files}
    model = _model(recipe, checkpoint, outcome.files, work)
    bits = outcome.plan.bytes * 8 / sum(math.prod(_shape(checkpoint, name)) for name in ordered)
    notes = (
        f"the plan spends {outcome.plan.bytes} of {outcome.plan.budget} bytes ({recipe.budget}) on the "
        f"linears, {bits:.3f} bits per weight",
        *outcome.notes,
        *_notes(drafted.task.windows, outcome.facts),
    )
    allocation = Allocation(ordered, outcome.plan.budget)
    return Compression(model, allocation, outcome.facts, drafted.task.windows, notes)


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
        progress=progress,
    )
    other = other_bytes(recipe, checkpoint)
    budget = budget_of(recipe, checkpoint, task.storage, other)
    collect_grams(task)
    curves = measure_curves(task)
    effects = measure_effects(task)
    sizes = {name: _shape(checkpoint, name) for name in effects}
    return Draft(task, curves, effects, choose(curves, effects, budget), sizes, other)


def plan_only(recipe: Recipe, progress: Progress = silent) -> Draft:
    """Measure and plan, export nothing; a later run of the same settings goes on with the measurements.

    Raises:
        RecipeError: the recipe's allocation is not the knapsack.
    """
    if not recipe.planned:
        raise RecipeError(f"--allocation {recipe.allocation} has no curves to plan with: use knapsack.")
    checkpoint = open_checkpoint(recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
    for kind in recipe.format:
        _check_format(recipe, checkpoint, kind)
    work = work_folder(recipe, checkpoint)
    with _kept_when_interrupted(work):
        return draft(recipe, checkpoint, work, progress)


def search_of(recipe: Recipe, checkpoint: Checkpoint) -> Search:
    """Which forms are tried: every grid that the format takes, or floating point without quantization.

    Forms with sparse codes are tried only where the format stores them in fewer bytes than dense ones: those
    of --code-pattern, and the strongest of a whole column.
    """
    if recipe.quant == "none":
        shares = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
        return Search(
            GridChoice({}), unquantized=True, floating=shares, floating_per_kept=recipe.atoms_per_nonzero
        )
    exporter = EXPORTERS[recipe.format[0]]
    options = exporter.options(asdict(recipe))

    def takes(grid: Grid) -> bool:
        try:
            exporter.check(checkpoint.architecture, checkpoint.config, {"dictionary": grid}, options)
        except RecipeError:
            return False
        return True

    groups = {
        bits: tuple(group for group in (16, 32, 64, 128) if takes(Grid(bits, group))) for bits in (2, 3, 4, 8)
    }
    grids = GridChoice({bits: found for bits, found in groups.items() if found}, step=16)
    storage = storage_of(recipe)

    def packs(pattern: Pattern) -> bool:
        four = [grid for grid in grids.grids if grid.bits == 4]
        return any(
            storage.leaf_bytes(64, 64, grid, pattern) < storage.leaf_bytes(64, 64, grid) for grid in four
        )

    fixed = recipe.fixed_pattern
    return Search(
        grids,
        head=16,
        unstructured=packs(Pattern(32, 64)),
        patterns=(fixed,) if fixed is not None and packs(fixed) else (),
        unquantized=True,
    )


def budget_of(recipe: Recipe, checkpoint: Checkpoint, storage: Storage, other: int) -> int:
    """Bytes for the linears, from --bits, --size or --ratio.

    Raises:
        RecipeError: a size that the rest of the output uses up.
    """
    shapes = [_shape(checkpoint, name) for name in checkpoint.architecture.linear_names(checkpoint.layers)]
    if recipe.bits is not None:
        return int(recipe.bits * sum(math.prod(shape) for shape in shapes) / 8)
    size = recipe.size_bytes
    if size is not None:
        if size <= other:
            raise RecipeError(
                f"--size {recipe.size}: embeddings, norms, tokenizer and graph alone need about {other} bytes. "
                "Allow more, or store the embedding in fewer bits."
            )
        return size - other
    plain = Plain(recipe.dictionary_grid)
    return math.floor((1 - recipe.ratio) * sum(plain.bytes(*shape, storage) for shape in shapes))


def other_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """About what everything but the linears takes: tables, norms, rotary tables, tokenizer and graph."""
    architecture, storage = checkpoint.architecture, storage_of(recipe)
    names = architecture.linear_names(checkpoint.layers)
    tables = {architecture.embedding: recipe.embeddings}
    if not checkpoint.tied:
        tables[architecture.head] = recipe.head
    total = sum(
        storage.leaf_bytes(*_shape(checkpoint, name), _table_grid(kind)) for name, kind in tables.items()
    )
    matrices = {f"{name}.weight" for name in (*names, *tables)} | {checkpoint.head_name}
    total += sum(4 * checkpoint.tensors[name].numel() for name in checkpoint.tensors if name not in matrices)
    total += 4 * architecture.head_size(checkpoint.config) * checkpoint.context
    total += sum(path.stat().st_size for path in checkpoint.folder.glob("*token*") if path.is_file())
    total += _BYTES_PER_LINEAR * len(names) + _RECORDS
    return total + _BYTES_PER_EVALUATION_TOKEN * recipe.evaluation_tokens


def _model(recipe: Recipe, checkpoint: Checkpoint, files: Mapping[str, Path], work: Path) -> CompressedModel:
    """Linears from their files, tables on their grids, everything else as it was."""
    files = {**files, **_compress_tables(recipe, checkpoint, work)}
    return CompressedModel(
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        matrices=StoredMatrices(files),
        tensors=_Without(checkpoint.tensors, {f"{name}.weight" for name in files} | {checkpoint.head_name}),
        tied=checkpoint.tied,
        source=str(checkpoint.folder),
    )


def _compress_block(
    recipe: Recipe,
    checkpoint: Checkpoint,
    allocation: Allocation,
    stream: BlockStream,
    layer: int,
    work: Path,
) -> None:
    block = checkpoint.architecture.block_path(layer)
    device = device_of(recipe)
    grams = stream.advance(layer)
    matrices: dict[str, Matrix] = {}
    facts = []
    for shared in checkpoint.architecture.inputs:
        whitening = whiten(grams[shared.name].matrix.to(device))
        for path in shared.linears:
            name = f"{block}.{path}"
            weight = checkpoint.weight(name).float().to(device)
            result = compress_linear(weight, whitening, allocation.choices[name], recipe)
            matrices[name] = result.matrix
            facts.append(asdict(result.facts))
    write_text(_facts_file(work, layer), json.dumps(facts, indent=1))
    save_matrices(_block_file(work, layer), matrices)


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
            grid = _table_grid(precision)
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
    spectral = recipe.allocator == "spectral"
    sizes = []
    for number, name in enumerate(names):
        if spectral:
            progress(number, len(names), "Read spectra")
        weight = checkpoint.weight(name)
        spectrum = singular_spectrum(weight.float()) if spectral else ()
        sizes.append(MatrixSize(name, weight.shape[0], weight.shape[1], spectrum))
    if spectral:
        progress(len(names), len(names), "Read spectra")

    def attempt(recipe: Recipe) -> Allocation:
        return ALLOCATIONS[recipe.allocator](
            sizes,
            ratio=recipe.ratio,
            storage=storage,
            precision=Precision(recipe.dictionary_grid, recipe.dictionary_grid, recipe.code_grid),
            sparsity=Sparsity(
                1.0 if recipe.method == "svd-llm" else recipe.atoms_per_nonzero, recipe.fixed_pattern
            ),
        )

    try:
        return Plan(attempt(recipe), recipe)
    except RecipeError:
        finer = DEFAULT_GROUP // 2
        if recipe.code_group is not None or recipe.code_grid is None:
            raise
        recipe = override(recipe, code_group=finer)
        note = f"groups of {DEFAULT_GROUP} atoms are too coarse for this ratio: codes use groups of {finer}"
        return Plan(attempt(recipe), recipe, (note,))


# -- export and check ----------------------------------------------------------------------------------


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
    options = exporter.options(asdict(recipe))
    storage = exporter.storage(options)
    with staged_folder(target, recipe.force) as folder:
        progress(0, 1, f"Write {kind}")
        exporter.write(compression.model, folder, options)
        progress(1, 1, f"Write {kind}")
        (folder / EVALUATION).parent.mkdir(exist_ok=True)
        write_text(folder / EVALUATION, _evaluation_json(evaluation))
        write_text(folder / RECIPE, recipe.to_toml())
        choices = compression.allocation.choices
        # What a file rounds is described and judged by what it holds.
        model = exporter.read_model(folder) if _rounds(kind, options) else compression.model
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
                        "notes": list(compression.notes),
                        "linears": [asdict(fact) for fact in compression.facts],
                    },
                ),
            ),
        )
        report = _judge(
            folder, manifest, compression.model, checkpoint, evaluation, gate_of(recipe), progress
        )
        _write_report(folder, report, manifest)
    if recipe.archive:
        write_archive(target, recipe.force)
    return Deployment(target, report)


def check_folder(
    folder: Path,
    *,
    reference: str | None = None,
    limits: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> Deployment:
    """Check an exported folder again: its bytes, its structure, its accuracy.

    The compressed weights are read back from the files, so nothing but the folder is needed for the export
    loss; method and total loss also need the original model, which is looked for where the recipe says.

    Args:
        folder: written by `deploy`.
        reference: the original model, where it has moved.
        limits: gate limits that replace those of the recipe, by knob.
        progress: told how far the work is.

    Raises:
        ArtifactError: a file does not match the manifest.
        InputError: a limit needs the original model, and it is not there.
    """
    manifest = verify(folder)
    recipe = recipe_from_mapping({**manifest.recipe, **(limits or {})}, origin=f"{folder}'s manifest")
    exporter = EXPORTERS[manifest.exporter]
    model = exporter.read_model(folder)
    evaluation = _read_evaluation(folder, load_tokenizer(folder), model.config)
    original: Checkpoint | None = None
    absent = "the folder does not hold it"
    try:
        original = open_checkpoint(reference or recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
    except InputError as error:
        if reference is not None:
            raise
        absent = f"it is not where the recipe says ({error})"
    if original is not None and original.fingerprint != manifest.facts.get("source"):
        if reference is not None:
            raise InputError(
                f"--reference {reference}: this is not the model that {folder} was made from; its fingerprint "
                f"is {original.fingerprint[:12]}, not {str(manifest.facts.get('source'))[:12]}."
            )
        original, absent = None, "the model where the recipe says has changed since"
    gate = gate_of(recipe)
    if original is None and not limits:
        # Limits that came with the folder cannot be measured here; what can be is.
        gate = Gate(max_export_nmse=gate.max_export_nmse)
    report = _judge(folder, manifest, model, original, evaluation, gate, progress, absent=absent)
    return Deployment(folder, report)


def _rounds(kind: str, options: Any) -> bool:
    """Whether a file holds other numbers than it was given, so that what it holds is what must be judged."""
    return kind == "gguf" and options.layout == "dense"


def _judge(
    folder: Path,
    manifest: Manifest,
    model: CompressedModel,
    original: Checkpoint | None,
    evaluation: Evaluation,
    gate: Gate,
    progress: Progress,
    absent: str = "",
) -> Report:
    exporter = EXPORTERS[manifest.exporter]
    findings = exporter.lint(folder)
    reference = None
    if original is not None:
        reference = torch_runner(
            original.folder, name="original", allow_pickle=any(p.suffix == ".bin" for p in original.files)
        )
    accuracy = check(
        reference,
        compressed_runner(model),
        RUNNERS[manifest.exporter](folder),
        RUNNERS[manifest.exporter](folder, exact=True),
        evaluation,
        gate,
        reference_absent=absent,
        progress=progress,
    )
    return Report(
        model=str(manifest.recipe.get("model") or "the model that ships with compot-deploy"),
        artifact=folder.name,
        format=manifest.exporter,
        package=__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        sizes=sizes_of(manifest),
        accuracy=accuracy,
        findings=findings,
        facts=facts_of(manifest),
        recipe=manifest.recipe,
        versions=library_versions(),
    )


def check_groups(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Refuse a group size, asked for by name, that does not divide the inputs of some linear.

    The default group may leave a shorter last group, which formats pad; a size that somebody chose may not.

    Raises:
        RecipeError: names the linear and a size that works.
    """
    group = recipe.dictionary_group
    if group is None or recipe.quant == "none":
        return
    for name in checkpoint.architecture.linear_names(checkpoint.layers):
        inputs = checkpoint.weight(name).shape[0]
        if inputs % group:
            fitting = [size for size in (16, 32, 64, 128, 256) if inputs % size == 0]
            hint = f"Use {' or '.join(map(str, fitting))}." if fitting else "Leave --dictionary-group out."
            raise RecipeError(f"{name}: {inputs} inputs do not split into groups of {group}. {hint}")


# -- text ----------------------------------------------------------------------------------------------


def calibration_windows(
    recipe: Recipe, checkpoint: Checkpoint, tokenizer: Tokenizer, work: Path, progress: Progress = silent
) -> TokenWindows:
    """The windows to calibrate on; sampled text is kept in the work folder, other text is read again."""
    common: dict[str, Any] = {
        "samples": recipe.samples,
        "length": min(recipe.length, checkpoint.context),
        "seed": recipe.seed,
        "vocabulary": checkpoint.vocabulary,
    }
    source = recipe.calibration
    if source is None and recipe.model is None:
        text = lzma.decompress(TRAINING_TEXT.read_bytes()).decode()
        return windows_of_text(text, tokenizer, source="the shipped model's training text", **common)
    if source is None or source == SELF:
        return _own_text(recipe, checkpoint, tokenizer, work / "calibration.safetensors", progress, common)
    path = Path(source)
    if path.exists() or path.suffix in (".txt", ".jsonl", ".json", ".md"):
        text = read_text(path)
        if path.suffix == ".jsonl":
            return windows_of_jsonl(text, tokenizer, source=str(path), **common)
        if recipe.evaluation is None:
            text = text[: round(len(text) * (1 - HELD_OUT_SHARE))]
        return windows_of_text(text, tokenizer, source=str(path), **common)
    return windows_of_text(text_of_dataset(source), tokenizer, source=source, **common)


def evaluation_windows(
    recipe: Recipe, checkpoint: Checkpoint, tokenizer: Tokenizer, work: Path, progress: Progress = silent
) -> TokenWindows:
    """The windows to judge on: never ones that were calibrated on, unless a note says so."""
    length = min(recipe.length, checkpoint.context)
    common: dict[str, Any] = {
        "samples": max(1, recipe.evaluation_tokens // length),
        "length": length,
        "seed": recipe.seed + 1,
        "vocabulary": checkpoint.vocabulary,
    }
    if recipe.evaluation is not None:
        path = Path(recipe.evaluation)
        reader = windows_of_jsonl if path.suffix == ".jsonl" else windows_of_text
        return reader(read_text(path), tokenizer, source=str(path), **common)
    source = recipe.calibration
    if source is None and recipe.model is None:
        return windows_of_text(
            read_text(HELD_OUT_TEXT), tokenizer, source="the shipped model's held-out text", **common
        )
    if source is not None and source != SELF and Path(source).exists() and Path(source).suffix != ".jsonl":
        text = read_text(Path(source))
        rest = text[round(len(text) * (1 - HELD_OUT_SHARE)) :]
        return windows_of_text(
            rest, tokenizer, source=f"the last {HELD_OUT_SHARE:.0%} of {source}, not calibrated on", **common
        )
    return _own_text(recipe, checkpoint, tokenizer, work / "evaluation.safetensors", progress, common)


def _own_text(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    path: Path,
    progress: Progress,
    common: Mapping[str, Any],
) -> TokenWindows:
    from transformers import AutoModelForCausalLM

    source = "text sampled from the model itself"
    if path.exists():
        return make_windows(list(load_file(path)["windows"]), source, checkpoint.vocabulary)
    progress(0, 1, "Sample text from the model")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    windows = sample_from_model(model.eval().to(device_of(recipe)), tokenizer, **common)
    write_tensors(path, {"windows": torch.stack(windows.windows)}, {})
    progress(1, 1, "Sample text from the model")
    return windows


# -- small print ---------------------------------------------------------------------------------------


def evaluation_of(
    recipe: Recipe, checkpoint: Checkpoint, work: Path, progress: Progress = silent
) -> Evaluation:
    """Windows to judge on, and prompts cut from their beginnings."""
    tokenizer = load_tokenizer(checkpoint.folder)
    windows = evaluation_windows(recipe, checkpoint, tokenizer, work, progress)
    return _evaluation(windows, _prompts(windows), tokenizer, checkpoint.config)


def _prompts(windows: TokenWindows) -> tuple[tuple[int, ...], ...]:
    step = max(1, len(windows.windows) // _PROMPTS)
    chosen = windows.windows[::step][:_PROMPTS]
    return tuple(tuple(window[: min(_PROMPT_TOKENS, len(window))].tolist()) for window in chosen)


def _evaluation(
    windows: TokenWindows,
    prompts: tuple[tuple[int, ...], ...],
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
) -> Evaluation:
    end = config.get("eos_token_id")
    context = int(config.get("max_position_embeddings", 2048))
    return Evaluation(
        text=windows,
        prompts=prompts,
        decode=tokenizer.decode,
        new_tokens=min(48, context - _PROMPT_TOKENS),
        end_tokens=frozenset(end if isinstance(end, list) else [] if end is None else [end]),
    )


def _evaluation_json(evaluation: Evaluation) -> str:
    return json.dumps(
        {
            "source": evaluation.text.source,
            "notes": list(evaluation.text.notes),
            "windows": [window.tolist() for window in evaluation.text.windows],
            "prompts": [list(prompt) for prompt in evaluation.prompts],
        }
    )


def _read_evaluation(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> Evaluation:
    path = folder / EVALUATION
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        windows = make_windows(
            stored["windows"], stored["source"], int(config["vocab_size"]), notes=stored["notes"]
        )
        return _evaluation(windows, tuple(tuple(prompt) for prompt in stored["prompts"]), tokenizer, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); export the model again.") from None


def gate_of(recipe: Recipe) -> Gate:
    """The limits of a recipe."""
    return Gate(
        max_perplexity_ratio=recipe.max_perplexity_ratio,
        max_kl=recipe.max_kl,
        min_top1=recipe.min_top1,
        max_export_nmse=recipe.max_export_nmse,
    )


def sizes_of(manifest: Manifest) -> Sizes:
    """Bytes of an artifact beside the same model without factorisation, as its format would store it."""
    embedding = {record.name for record in manifest.matrices if not _is_linear(record.name)}
    rest = sum(record.bytes for record in manifest.matrices if record.name in embedding)
    linears = [record for record in manifest.matrices if record.name not in embedding]
    weights = sum(record.bytes for record in manifest.matrices)
    storage = EXPORTERS[manifest.exporter].storage(EXPORTERS[manifest.exporter].options(manifest.recipe))
    plain8 = sum(
        storage.leaf_bytes(record.inputs, record.outputs, Grid(8, DEFAULT_GROUP)) for record in linears
    )
    return Sizes(
        artifact=sum(record.bytes for record in manifest.files),
        weights=weights,
        plain_int4=rest + sum(record.plain_int4_bytes for record in linears),
        plain_int8=rest + plain8,
        fp16=2 * sum(record.inputs * record.outputs for record in manifest.matrices),
    )


def facts_of(manifest: Manifest) -> tuple[str, ...]:
    """What a report must say about the run besides figures."""
    linears = [record for record in manifest.matrices if _is_linear(record.name)]
    factorized = [record for record in linears if record.kind == "factorized"]
    facts = [f"{len(factorized)} of {len(linears)} linears are factorised."]
    facts += [f"{record.name} stays dense: {record.why_dense}." for record in linears if record.why_dense]
    return (*facts, *(f"{note}." for note in manifest.facts.get("notes", ())))


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.weight(name).shape
    return rows, columns


def _is_linear(name: str) -> bool:
    return ".layers." in name


def _write_report(folder: Path, report: Report, manifest: Manifest) -> None:
    write_text(folder / REPORT, to_json(report))
    write_text(folder / JUNIT, to_junit(report))
    write_text(folder / CARD, model_card(report, manifest))
    seal(folder, (REPORT, JUNIT, CARD))


def _check_format(recipe: Recipe, checkpoint: Checkpoint, kind: str) -> None:
    if kind not in EXPORTERS:
        raise RecipeError(f"--format {kind}: choose one of {', '.join(EXPORTERS)}.")
    grids = {
        "dictionary": recipe.dictionary_grid,
        "codes": recipe.code_grid,
        "embedding": _table_grid(recipe.embeddings),
        "head": _table_grid(recipe.head),
    }
    exporter = EXPORTERS[kind]
    exporter.check(checkpoint.architecture, checkpoint.config, grids, exporter.options(asdict(recipe)))


def storage_of(recipe: Recipe) -> Storage:
    """What a byte is: the paper's accounting without quantization, the first format's with it."""
    if recipe.quant == "none":
        return PaperStorage()
    exporter = EXPORTERS[recipe.format[0]]
    return exporter.storage(exporter.options(asdict(recipe)))


def _table_grid(precision: str) -> Grid | None:
    return None if precision == "none" else Grid(int(precision.removeprefix("int")), DEFAULT_GROUP)


def device_of(recipe: Recipe) -> str:
    """The device to compute on.

    Raises:
        RecipeError: one that torch does not have here.
    """
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=recipe.device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"--device {recipe.device}: torch cannot use it ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from None
    return recipe.device


def targets_of(recipe: Recipe) -> dict[str, Path]:
    """Output folder of each format: the one asked for, or one inside it per format when there are several."""
    name = Path(recipe.model).resolve().name if recipe.model else "embedded"
    out = Path(recipe.out or f"{name or 'model'}-compot-{recipe.quant}-{'-'.join(recipe.format)}")
    if len(set(recipe.format)) == 1:
        return {recipe.format[0]: out}
    return {kind: out / kind for kind in recipe.format}


def work_folder(recipe: Recipe, checkpoint: Checkpoint) -> Path:
    """Where unfinished work for exactly this model and recipe is kept, beside the output."""
    decisive = {
        knob.name: getattr(recipe, knob.name)
        for knob in fields(recipe)
        if knob.name not in _DOES_NOT_CHANGE_WEIGHTS
    }
    # The first format's bytes decide the allocation; text files are told apart by what they hold.
    decisive |= {"model": checkpoint.fingerprint, "version": __version__, "storage": recipe.format[0]}
    for name in ("calibration", "evaluation"):
        path = getattr(recipe, name)
        if path and Path(path).is_file():
            decisive[f"{name} text"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if recipe.planned:
        # Measurements serve every budget; what a plan makes of them is named after the plan.
        decisive = {key: value for key, value in decisive.items() if key not in _BUDGETS}
    # Judging on a file instead of on the end of the calibration text leaves more to calibrate on.
    decisive["held out"] = recipe.evaluation is None
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    out = next(iter(targets_of(recipe).values()))
    out = out if len(set(recipe.format)) == 1 else out.parent
    return out.parent / f".{out.name}.work-{key}"


@contextmanager
def _kept_when_interrupted(work: Path) -> Iterator[None]:
    """Finished blocks survive an interruption or a failure; a folder in which nothing was finished does not."""
    made = not work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{work.parent} cannot be written: {error.strerror}. Choose another --out."
        ) from None
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"Interrupted. What is finished is kept in {work}; the same command goes on from there."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"The disk is full while writing to {work}. Make room, then run the same command: it goes on "
                "with what is finished."
            ) from None
        raise
    finally:
        if made and work.exists() and not any(work.glob("*.safetensors")):
            shutil.rmtree(work)


def _block_file(work: Path, layer: int) -> Path:
    return work / f"block-{layer:04d}.safetensors"


def _facts_file(work: Path, layer: int) -> Path:
    return work / f"facts-{layer:04d}.json"


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


class _Without(Mapping[str, torch.Tensor]):
    """A mapping less some keys, still lazy."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], without: set[str]) -> None:
        self._tensors = tensors
        self._names = [name for name in tensors if name not in without]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
