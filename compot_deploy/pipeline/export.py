"""A compressed model to an evaluated folder, staged, so that nothing half-written is ever in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.listening import Shortening, positions_of
from compot_deploy.accuracy.probes import Probes
from compot_deploy.cluster import ALONE, Workers
from compot_deploy.core.json_files import as_object
from compot_deploy.core.matrix import Matrix
from compot_deploy.core.store import Without, write_text
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.archive import write_archive
from compot_deploy.exporters.artifact import Provenance, describe, write_manifest
from compot_deploy.exporters.signature import SigningKey, sign
from compot_deploy.exporters.staging import staged_folder
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.pipeline.check import Deployment
from compot_deploy.pipeline.compress import Compression
from compot_deploy.pipeline.evaluation import (
    REFERENCE,
    REPORT,
    Subject,
    Watchers,
    evaluate_folder,
    write_report,
)
from compot_deploy.pipeline.limits import least_positions, positions_criterion
from compot_deploy.pipeline.provenance import published, stamp
from compot_deploy.pipeline.reading import ReadingCheck
from compot_deploy.pipeline.reference import reading_of_source, write_reference
from compot_deploy.pipeline.task_accuracy import Questions
from compot_deploy.pipeline.texts import write_evaluation
from compot_deploy.pipeline.workspace import RECIPE, note_finished
from compot_deploy.planning.settings import Settings, options_of
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import Recipe, recipe_to_toml
from compot_deploy.report.document import Report, with_criteria
from compot_deploy.report.json import from_json


def export(
    settings: Settings,
    compression: Compression,
    evaluation: Evaluation,
    gate: Gate,
    kind: str,
    target: Path,
    work: Path,
    progress: Progress = silent,
    workers: Workers = ALONE,
    key: SigningKey | None = None,
    questions: Questions | None = None,
) -> Deployment:
    """Write one format, evaluate it, and put the folder in its place; the work folder keeps that it is finished.

    Args:
        settings: of the run.
        compression: what is written.
        evaluation: what is read.
        gate: limits.
        kind: the format.
        target: the folder.
        work: folder for what is finished.
        progress: told how far the work is.
        workers: who reads the text with models in torch.
        key: that signs the manifest; None leaves it unsigned.
        questions: of tasks, that are asked; None asks nothing.
    """
    recipe, source, exporter = settings.recipe, settings.source, EXPORTERS[kind]
    options = options_of(
        recipe,
        exporter,
        importance=compression.importance,
        provenance=stamp(recipe, compression.calibration.digest),
    )
    with staged_folder(target, recipe.force) as folder:
        progress(0, 1, f"Write {kind}")
        differences = exporter.write(compression.model, folder, options) or ()
        progress(1, 1, f"Write {kind}")
        write_evaluation(folder, evaluation)
        write_text(folder / RECIPE, recipe_to_toml(published(recipe)))
        # What a file rounds is described and evaluated by what it holds; what it leaves out is not described.
        model = exporter.read_model(folder) if exporter.multiplies_out(options) else compression.model
        described = _held(model, exporter.read(folder)) if differences else model
        provenance = _provenance(settings, compression, differences)
        manifest = write_manifest(folder, describe(described, kind, exporter.storage(options), provenance))
        subject = Subject(
            folder=folder,
            manifest=manifest,
            model=model,
            original=source,
            artifact=target.resolve().name,
            factors=compression.unquantized,
            factors_absent=compression.unquantized_absent,
            unhealed=compression.unhealed,
            beside=compression.beside,
            scratch=folder,
            workers=workers,
        )
        if source.task.has_towers:  # what follows is about models of one text
            report = evaluate_folder(subject, evaluation, gate, progress)
        else:
            report = _evaluated(settings, subject, evaluation, gate, progress)
        if questions is not None:
            report = questions.asked(report, folder, kind, source, gate, source.context, progress)
        write_report(folder, report, manifest)
        if key is not None:
            sign(folder, key)
        note_finished(work, recipe, kind, folder)
    if recipe.archive:
        write_archive(target, recipe.force)
    return Deployment(target, report)


def _evaluated(
    settings: Settings, subject: Subject, evaluation: Evaluation, gate: Gate, progress: Progress
) -> Report:
    """The report of a folder of a model that reads text; the original's answers stay in it."""
    recipe, source, folder, manifest = settings.recipe, settings.source, subject.folder, subject.manifest
    context = min(source.context, EXPORTERS[manifest.exporter].context(source.config) or source.context)
    probes = Probes(source.task, evaluation.text.windows, context, source.vocabulary)
    reading = ReadingCheck(reading_of_source(source, evaluation.text), folder, manifest.exporter)
    answers = Shortening(source.task, positions_of(source.task, evaluation.text.windows))
    watchers = Watchers((probes.visit, reading.visit), {"reference": answers})
    report = evaluate_folder(subject, evaluation, gate, progress, watchers)
    least = least_positions(recipe, min(recipe.length, source.context))
    further = [positions_criterion(evaluation, source.task, least)]
    report = with_criteria(report, [*further, *probes.criteria(gate), *reading.criteria()])
    name = str(manifest.recipe.get("model") or "the model that ships with compot-deploy")
    write_reference(folder / REFERENCE, name, source, evaluation, answers)
    return report


def finished(target: Path, recipe: Recipe) -> Deployment:
    """A folder that was put in its place by a run that was stopped behind it, and its archive, which may be there."""
    report = from_json((target / REPORT).read_text(encoding="utf-8"), str(target / REPORT))
    if recipe.archive:
        write_archive(target, force=True)
    return Deployment(target, report)


def _held(model: CompressedModel, matrices: Mapping[str, Matrix]) -> CompressedModel:
    """A model without the matrices that a file leaves out."""
    return replace(model, matrices=Without(model.matrices, model.matrices.keys() - matrices.keys()))


def _provenance(
    settings: Settings, compression: Compression, differences: tuple[str, ...] | tuple[()]
) -> Provenance:
    calibration = compression.calibration
    return Provenance(
        recipe=asdict(published(settings.recipe)),
        calibration=calibration.digest,
        seed=settings.recipe.seed,
        why_dense={
            name: entry.reason for entry in compression.plan.chosen if entry.reason for name in entry.names
        },
        metadata={
            "source": settings.source.fingerprint,
            "task": settings.source.task.kind,
            "calibration": calibration.source,
            "calibration_windows": len(calibration.windows),
            "calibration_tokens": calibration.tokens,
            "notes": [*compression.notes, *(note.rstrip(".") for note in differences)],
            "linears": [asdict(linear) for linear in compression.linears],
            "frontier": None if compression.frontier is None else as_object(compression.frontier),
            "effects": dict(compression.sensitivities),
        },
    )
