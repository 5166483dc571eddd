"""An exported folder before the gate: its losses, its sizes, its report; right after export or years later."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from compot_deploy import __version__
from compot_deploy.accuracy.evaluate import Evaluation, check, measure
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.runner import Runner
from compot_deploy.accuracy.runners import RUNNERS
from compot_deploy.accuracy.torch_runner import TorchRunner, compressed_runner, torch_runner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Matrix, Quantized, leaves
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.core.store import write_text
from compot_deploy.embedded import MODEL
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.archive import transport_bytes
from compot_deploy.exporters.artifact import library_versions, seal, verify
from compot_deploy.exporters.manifest import MANIFEST, Manifest
from compot_deploy.models.checkpoint import Checkpoint, open_checkpoint
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.pipeline.texts import read_evaluation
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, recipe_from_mapping
from compot_deploy.report.document import SCHEMA_MINOR, Report, Rival, Sizes
from compot_deploy.report.facts import Origin
from compot_deploy.report.gate import Demands
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import from_json, to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.manifest import frontier_of, layers_of, memory_of, origin_of, plain_memory_of
from compot_deploy.report.model_card import model_card

REPORT: Final = "compot/report.json"
JUNIT: Final = "compot/report.junit.xml"
CARD: Final = "README.md"
HTML: Final = "compot/report.html"

TOTAL_LIMITS: Final = frozenset(("max_perplexity_ratio", "max_kl", "min_top1"))
"""Limits on the total loss, which need the original model."""

REPORT_FILES: Final = (REPORT, JUNIT, CARD, HTML)
"""Written last, for people and programs that judge: they do not count as bytes of the artifact."""


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


def check_folder(
    folder: Path,
    *,
    reference: str | None = None,
    limits: Mapping[str, float] | None = None,
    demands: Demands | None = None,
    progress: Progress = silent,
) -> Deployment:
    """Check an exported folder again: its bytes, its structure, its accuracy.

    The compressed weights are read back from the files, so nothing but the folder is needed for the export
    loss; method and total loss also need the original model, which is looked for where the recipe says.

    Args:
        folder: written by `deploy`.
        reference: the original model, where it has moved.
        limits: gate limits that replace those of the recipe, by knob.
        demands: of a gate file and a baseline.
        progress: told how far the work is.

    Raises:
        ArtifactError: a file does not match the manifest.
        InputError: a limit needs the original model, and it is not there; or the baseline does not compare.
    """
    demands = demands or Demands()
    limits = {**demands.gate.losses, **(limits or {})}
    manifest = verify(folder)
    _check_exporter(folder, manifest)
    recipe = recipe_from_mapping({**manifest.recipe, **limits}, origin=f"{folder}'s manifest")
    model = EXPORTERS[manifest.exporter].read_model(folder)
    evaluation = read_evaluation(folder, load_tokenizer(folder), model.config)
    demands.check_text(evaluation.text.digest, evaluation.text.source)
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
    if original is None and demands.compares_losses:
        raise InputError(
            f"Growth of the loss cannot be measured without the original model: {absent}. Give it with --reference."
        )
    gate = gate_of(recipe)
    if original is None and not TOTAL_LIMITS & limits.keys():
        # Limits that came with the folder cannot be measured here; what can be is.
        gate = Gate(max_export_nmse=gate.max_export_nmse)
    report = judge_folder(folder, manifest, model, original, evaluation, gate, progress, absent=absent)
    return Deployment(folder, demands.apply(report))


def _check_exporter(folder: Path, manifest: Manifest) -> None:
    if manifest.exporter not in EXPORTERS:
        raise ArtifactError(
            f"{folder}: its manifest says that the exporter {manifest.exporter!r} wrote it, which has no report of "
            f"this kind; {', '.join(sorted(EXPORTERS))} have one."
        )


def judge_folder(
    folder: Path,
    manifest: Manifest,
    model: CompressedModel,
    original: Checkpoint | None,
    evaluation: Evaluation,
    gate: Gate,
    progress: Progress,
    absent: str = "",
    artifact: str | None = None,
    unquantized: Mapping[str, Matrix] | None = None,
    unquantized_absent: str = "the folder does not hold the factors before quantization",
    rival: Mapping[str, Matrix] | None = None,
) -> Report:
    """Lint a folder, read evaluation text with up to five models, and put everything into a report.

    Args:
        folder: to judge.
        manifest: of the folder.
        model: what the folder holds.
        original: the original; None leaves the method and total loss out.
        evaluation: text and prompts.
        gate: limits.
        progress: told how far the work is.
        absent: why there is no original.
        artifact: name of the folder, where it is not there yet.
        unquantized: factorised linears before quantization, multiplied out; they split the method loss.
        unquantized_absent: why there are none.
        rival: the matrices of the same model through another quantizer, which is read beside it.
    """
    exporter = EXPORTERS[manifest.exporter]
    findings = exporter.lint(folder)
    reference = factorized = None
    if original is not None:
        reference = _original_runner(original, "original")
    with ExitStack() as stack:
        if original is not None and unquantized is not None:
            factorized = _original_runner(original, "factorised, before quantization")
            stack.enter_context(factorized.replaced(unquantized))
        accuracy = check(
            reference,
            compressed_runner(model),
            RUNNERS[manifest.exporter](folder),
            RUNNERS[manifest.exporter](folder, exact=True),
            evaluation,
            gate,
            factorized=factorized,
            reference_absent=absent,
            factorized_absent=unquantized_absent,
            progress=progress,
        )
    return Report(
        model=str(manifest.recipe.get("model") or "the model that ships with compot-deploy"),
        artifact=artifact or folder.resolve().name,
        format=manifest.exporter,
        package=__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        sizes=replace(
            sizes_of(manifest), transport=transport_bytes(folder, without=(*REPORT_FILES, MANIFEST))
        ),
        accuracy=accuracy,
        findings=findings,
        facts=facts_of(manifest),
        recipe=manifest.recipe,
        versions=library_versions(),
        layers=layers_of(manifest),
        frontier=frontier_of(manifest),
        origin=origin_of(manifest),
        rival=None
        if rival is None or reference is None
        else _rival(reference, model, rival, evaluation, manifest),
    )


def _rival(
    reference: Runner,
    model: CompressedModel,
    matrices: Mapping[str, Matrix],
    evaluation: Evaluation,
    manifest: Manifest,
) -> Rival:
    beside = replace(model, matrices=matrices)
    exporter = EXPORTERS[manifest.exporter]
    storage = exporter.storage(exporter.options(manifest.recipe))
    grid = next(
        leaf.grid
        for name, matrix in matrices.items()
        if _is_linear(name)
        for leaf in leaves(matrix)
        if isinstance(leaf, Quantized)
    )
    return Rival(
        name=f"gptq {grid}",
        bytes=sum(matrix_bytes(matrices, storage).values()),
        loss=measure(reference, compressed_runner(beside), evaluation),
    )


def _original_runner(original: Checkpoint, name: str) -> TorchRunner:
    pickled = any(path.suffix == ".bin" for path in original.files)
    return torch_runner(original.folder, name=name, allow_pickle=pickled)


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
        artifact=sum(record.bytes for record in manifest.files if record.path not in REPORT_FILES),
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


def facts_of(manifest: Manifest) -> tuple[str, ...]:
    """What a report must say about the run besides figures."""
    linears = [record for record in manifest.matrices if _is_linear(record.name)]
    factorized = [record for record in linears if record.kind == "factorized"]
    facts = [f"{len(factorized)} of {len(linears)} linears are factorised."]
    facts += [f"{record.name} stays dense: {record.why_dense}." for record in linears if record.why_dense]
    return (*facts, *(f"{note}." for note in manifest.facts.get("notes", ())))


def _is_linear(name: str) -> bool:
    return ".layers." in name


def write_report(folder: Path, report: Report, manifest: Manifest) -> None:
    """Write report.json, report.html, JUnit XML and the model card, and take them into the manifest."""
    write_text(folder / REPORT, to_json(report))
    write_text(folder / JUNIT, to_junit(report))
    write_text(folder / HTML, to_html(report))
    write_text(folder / CARD, model_card(report, manifest))
    seal(folder, REPORT_FILES)


def write_report_again(folder: Path) -> Report:
    """Write the report of an existing folder again from its own figures; nothing is measured.

    What an older report does not have and the manifest knows is filled in.

    Raises:
        ArtifactError: not a folder of ours, or damaged.
        InputError: there is no report, or it is of another version.
    """
    manifest = verify(folder)
    _check_exporter(folder, manifest)
    try:
        text = (folder / REPORT).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {REPORT}: a report is written when a model is exported. Export it again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / REPORT} cannot be read: {error}.") from None
    report = from_json(text, str(folder / REPORT))
    known = sizes_of(manifest)
    sizes = replace(
        report.sizes,
        **{
            entry.name: getattr(known, entry.name)
            for entry in fields(Sizes)
            if getattr(report.sizes, entry.name) is None
        },
    )
    report = replace(
        report,
        schema_minor=SCHEMA_MINOR,
        sizes=sizes,
        layers=report.layers or layers_of(manifest),
        frontier=report.frontier or frontier_of(manifest),
        origin=origin_of(manifest) if report.origin == Origin() else report.origin,
    )
    write_report(folder, report, manifest)
    return report


def write_check(folder: Path, report: Report) -> None:
    """Write the files of a report somewhere else than into an artifact, for continuous integration.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            (REPORT, to_json(report)),
            (JUNIT, to_junit(report)),
            (HTML, to_html(report)),
        ):
            write_text(folder / Path(name).name, text)
    except OSError as error:
        raise InputError(f"The report cannot be written to {folder}: {error.strerror}.") from None
