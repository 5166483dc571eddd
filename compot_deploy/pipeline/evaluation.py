"""A folder before the gate: its losses, its sizes, its report."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from compot_deploy import __version__
from compot_deploy.accuracy.elsewhere import ReadElsewhere
from compot_deploy.accuracy.evaluate import Evaluation, Visit, check, measure
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.listening import Listener, heard
from compot_deploy.accuracy.outcome import AccuracyReport
from compot_deploy.accuracy.runners import RUNNERS, TEXT_RUNNERS
from compot_deploy.accuracy.texts import TorchTexts, check_texts, measure_texts
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.accuracy.towers import TorchTowers
from compot_deploy.cluster import ALONE, Workers
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Factorized, Matrix
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.core.store import write_text
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.archive import transport_bytes
from compot_deploy.exporters.artifact import library_versions, seal
from compot_deploy.exporters.manifest import MANIFEST, SIGNATURE, Manifest
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.paged import compressed_to_run, original_to_run
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Task, task_of
from compot_deploy.pipeline.recordings import RECORDINGS
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import DEFAULT_GROUP
from compot_deploy.report.document import Alternative, Report, Sizes
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.manifest import frontier_of, layers_of, memory_of, origin_of, plain_memory_of
from compot_deploy.report.model_card import model_card

REPORT: Final = "compot/report.json"
JUNIT: Final = "compot/report.junit.xml"
CARD: Final = "README.md"
HTML: Final = "compot/report.html"

REFERENCE: Final = "compot/reference.safetensors"
"""Where an export keeps the answers of its original, see `compot_deploy.pipeline.reference`."""

REPORT_FILES: Final = (REPORT, JUNIT, CARD, HTML)
"""Written last, for people and programs that decide: they do not count as bytes of the artifact."""

UNCOUNTED: Final = (*REPORT_FILES, REFERENCE, RECORDINGS)
"""What no runtime needs."""


@dataclass(frozen=True)
class Subject:
    """A folder that is evaluated, and what is known of it.

    Attributes:
        folder: to evaluate.
        manifest: of the folder.
        model: what the folder holds.
        original: the original; None leaves the method and total loss out.
        absent: why there is no original.
        artifact: name of the folder, where it is not there yet.
        factors: factorized matrices before quantization, multiplied out; they split the method loss.
        factors_absent: why there are none.
        unhealed: the model before it was healed; None where nothing was.
        beside: matrices of the same model compressed otherwise, by what that is called.
        scratch: folder for logits that are kept meanwhile; None takes the system's.
        workers: who reads the text with models in torch.
    """

    folder: Path
    manifest: Manifest
    model: CompressedModel
    original: ModelSource | None
    absent: str = ""
    artifact: str | None = None
    factors: Mapping[str, Matrix] | None = None
    factors_absent: str = "the folder does not hold the factors before quantization"
    unhealed: CompressedModel | None = None
    beside: Mapping[str, Mapping[str, Matrix]] = field(default_factory=dict)
    scratch: Path | None = None
    workers: Workers = ALONE

    @property
    def task(self) -> Task:
        """What the model is for."""
        task = task_of(self.model.config)
        if task is None:
            raise ArtifactError(f"{self.folder}: config.json names no class of a task that is known here.")
        return task


@dataclass(frozen=True)
class Watchers:
    """Who else looks at the models of an evaluation.

    Attributes:
        visits: called with each model once, while it is open.
        listeners: who hears what the model of a role says to the evaluation text.
    """

    visits: tuple[Visit, ...] = ()
    listeners: Mapping[str, Listener] = field(default_factory=dict)

    def visit(self, roles: Sequence[str], runner: Any) -> None:
        """Let all of them look."""
        for one in self.visits:
            one(roles, runner)


def evaluate_folder(
    subject: Subject,
    evaluation: Evaluation,
    gate: Gate,
    progress: Progress = silent,
    watchers: Watchers = Watchers(),
) -> Report:
    """Lint a folder, read evaluation text with up to six models, and put everything into a report."""
    manifest, folder = subject.manifest, subject.folder
    exporter = EXPORTERS[manifest.exporter]
    diagnostics = exporter.lint(folder)
    accuracy = measure_losses(subject, evaluation, gate, progress, watchers)
    return Report(
        model=str(manifest.recipe.get("model") or "the model that ships with compot-deploy"),
        artifact=subject.artifact or folder.resolve().name,
        format=manifest.exporter,
        package=__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        sizes=replace(
            sizes_of(manifest), transport=transport_bytes(folder, without=(*UNCOUNTED, MANIFEST, SIGNATURE))
        ),
        accuracy=accuracy,
        diagnostics=diagnostics,
        notes=notes_of(manifest),
        recipe=manifest.recipe,
        versions=library_versions(),
        layers=layers_of(manifest),
        frontier=frontier_of(manifest),
        origin=origin_of(manifest),
        alternatives=()
        if subject.original is None
        else tuple(
            _beside(subject, subject.original, name, matrices, evaluation)
            for name, matrices in subject.beside.items()
        ),
    )


def measure_losses(
    subject: Subject,
    evaluation: Evaluation,
    gate: Gate,
    progress: Progress = silent,
    watchers: Watchers = Watchers(),
) -> AccuracyReport:
    """Method, export and total loss of a folder, by the measures of its task; one model in memory at a time."""
    task, original, kind = subject.task, subject.original, subject.manifest.exporter

    def open_original() -> Any:
        assert original is not None
        return original_to_run(original)

    def open_factored() -> Any:
        assert original is not None and subject.factors is not None
        return original_to_run(original, subject.factors)

    def open_unhealed() -> Any:
        assert subject.unhealed is not None
        return compressed_to_run(subject.unhealed)

    def open_compressed() -> Any:
        return compressed_to_run(subject.model)

    def watched(role: str, opening: Callable[[], Any]) -> Callable[[], Any]:
        listener = watchers.listeners.get(role)
        return opening if listener is None else heard(task, opening, evaluation.text.windows, listener)

    reference = None
    if original is not None:
        reference = watched("reference", _opening(subject, evaluation, open_original, "original"))
    factored = (
        None
        if original is None or subject.factors is None
        else _opening(subject, evaluation, open_factored, FACTORED)
    )
    unhealed = (
        None
        if original is None or subject.unhealed is None
        else _opening(subject, evaluation, open_unhealed, UNHEALED)
    )
    compressed = _opening(
        subject, evaluation, open_compressed, f"torch {torch.__version__}, dequantized weights"
    )
    absent = {"reference_absent": subject.absent, "factorized_absent": subject.factors_absent}
    if task.generates:
        return check(
            reference,
            compressed,
            watched("exported", lambda: RUNNERS[kind](subject.folder)),
            lambda: RUNNERS[kind](subject.folder, exact=True),
            evaluation,
            gate,
            factorized=factored,
            unhealed=unhealed,
            progress=progress,
            scratch=subject.scratch,
            visit=watchers.visit,
            **absent,
        )
    return check_texts(
        task,
        reference,
        compressed,
        watched("exported", lambda: TEXT_RUNNERS[kind](subject.folder, task)),
        lambda: TEXT_RUNNERS[kind](subject.folder, task, exact=True),
        evaluation,
        gate,
        factorized=factored,
        unhealed=unhealed,
        progress=progress,
        visit=watchers.visit,
        **absent,
    )


def _opening(
    subject: Subject, evaluation: Evaluation, model: Callable[[], Any], name: str
) -> Callable[[], Any]:
    """Opens a model in torch when its turn has come."""
    task, workers = subject.task, subject.workers
    if task.generates and not workers.alone:
        windows, size = evaluation.text.windows, evaluation.batch
        return lambda: ReadElsewhere(TorchRunner(model(), name), workers, windows, size)
    if task.generates:
        return lambda: TorchRunner(model(), name)
    reader = TorchTowers if task.has_towers else TorchTexts
    return lambda: reader(model(), task, name)


FACTORED: Final = "factorized, before quantization"
UNHEALED: Final = "compressed, before healing"


def _beside(
    subject: Subject,
    original: ModelSource,
    name: str,
    matrices: Mapping[str, Matrix],
    evaluation: Evaluation,
) -> Alternative:
    """The same model compressed otherwise, against the original."""
    task, manifest = subject.task, subject.manifest
    model = subject.unhealed or subject.model  # nobody healed what stands beside it
    exporter = EXPORTERS[manifest.exporter]
    sizes = matrix_bytes(matrices, exporter.storage(exporter.options(manifest.recipe)))
    first = _opening(subject, evaluation, lambda: original_to_run(original), "original")
    other = replace(model, matrices=matrices)
    second = _opening(subject, evaluation, lambda: compressed_to_run(other), name)
    if task.generates:
        loss = measure(first, second, evaluation, scratch=subject.scratch)
    else:
        loss = measure_texts(task, first, second, evaluation)
    linears = [path for path in matrices if model.role(path) == "linear"]
    weights = sum(math.prod(matrices[path].shape) for path in linears)
    return Alternative(
        name=name,
        bytes=sum(sizes[record.name] for record in manifest.matrices),  # a file may leave a matrix out
        bits=8 * sum(sizes[path] for path in linears) / weights,
        factorized=sum(isinstance(matrices[path], Factorized) for path in linears),
        linears=len(linears),
        loss=loss,
    )


def sizes_of(manifest: Manifest) -> Sizes:
    """Bytes of an artifact beside the same model without factorization, as its format would store it."""
    rest = sum(record.bytes for record in manifest.matrices if record.role != "linear")
    linears = [record for record in manifest.matrices if record.role == "linear"]
    weights = sum(record.bytes for record in manifest.matrices)
    storage = EXPORTERS[manifest.exporter].storage(EXPORTERS[manifest.exporter].options(manifest.recipe))
    plain8 = sum(
        storage.leaf_bytes(record.inputs, record.outputs, Grid(8, DEFAULT_GROUP)) for record in linears
    )
    return Sizes(
        artifact=sum(record.bytes for record in manifest.files if record.path not in UNCOUNTED),
        weights=weights,
        plain_int4=rest + sum(record.plain_int4_bytes for record in linears),
        plain_int8=rest + plain8,
        fp16=2 * sum(record.inputs * record.outputs for record in manifest.matrices),
        memory=memory_of(manifest, storage),
        memory_int4=plain_memory_of(manifest, storage, linears, 4),
        memory_int8=plain_memory_of(manifest, storage, linears, 8),
        linears=sum(record.bytes for record in linears),
        linear_weights=sum(record.inputs * record.outputs for record in linears),
    )


def notes_of(manifest: Manifest) -> tuple[str, ...]:
    """What a report must say about the run besides figures."""
    linears = [record for record in manifest.matrices if record.role == "linear"]
    factorized = [record for record in linears if record.kind == "factorized"]
    notes = [f"{len(factorized)} of {len(linears)} linears are factorized."]
    notes += [f"{record.name} stays dense: {record.why_dense}." for record in linears if record.why_dense]
    own = manifest.metadata.get("notes") or []
    if not isinstance(own, list):
        raise ArtifactError(
            "The manifest is damaged: facts.notes is not a list of texts. Export the model again."
        )
    return (*notes, *(f"{note}." for note in own))


def write_report(folder: Path, report: Report, manifest: Manifest) -> None:
    """Write report.json, report.html, JUnit XML and the model card, and take them into the manifest."""
    write_text(folder / REPORT, to_json(report))
    write_text(folder / JUNIT, to_junit(report))
    write_text(folder / HTML, to_html(report))
    write_text(folder / CARD, model_card(report, manifest))
    seal(folder, UNCOUNTED)
