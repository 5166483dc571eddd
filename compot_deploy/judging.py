"""An exported folder before the gate: its losses, its sizes, its report; right after export or years later."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from compot_deploy import __version__
from compot_deploy.accuracy import Evaluation, Gate, check, measure
from compot_deploy.checkpoint import Checkpoint, open_checkpoint
from compot_deploy.embedded import MODEL
from compot_deploy.errors import InputError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import (
    LeafRecord,
    Manifest,
    library_versions,
    seal,
    verify,
)
from compot_deploy.exporters.model_card import model_card
from compot_deploy.plan import LoadedStorage
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, recipe_from_mapping
from compot_deploy.report import Report, Rival, Sizes, to_json, to_junit
from compot_deploy.runners import RUNNERS, Runner, compressed_runner, torch_runner
from compot_deploy.store import write_text
from compot_deploy.texts import read_evaluation
from compot_deploy.tokens import (
    load_tokenizer,
)
from compot_deploy.weights import CompressedModel, Grid, Matrix, Quantized, leaves, matrix_bytes

REPORT: Final = "compot/report.json"
JUNIT: Final = "compot/report.junit.xml"
CARD: Final = "README.md"


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
    evaluation = read_evaluation(folder, load_tokenizer(folder), model.config)
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
    report = judge_folder(folder, manifest, model, original, evaluation, gate, progress, absent=absent)
    return Deployment(folder, report)


def judge_folder(
    folder: Path,
    manifest: Manifest,
    model: CompressedModel,
    original: Checkpoint | None,
    evaluation: Evaluation,
    gate: Gate,
    progress: Progress,
    absent: str = "",
    rival: Mapping[str, Matrix] | None = None,
) -> Report:
    """Lint a folder, read evaluation text with up to four models, and put everything into a report.

    With a `rival`, the matrices of the same model through another quantizer, a fifth is read beside them.
    """
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
        memory=_loaded_bytes(manifest, storage) if isinstance(storage, LoadedStorage) else None,
    )


def _loaded_bytes(manifest: Manifest, storage: LoadedStorage) -> int:
    """What the tensors of the matrices take once a graph is loaded; a shared dictionary is there once."""
    leaves: dict[tuple[str, str], LeafRecord] = {}
    for record in manifest.matrices:
        if record.plain is not None:
            leaves[record.name, ""] = record.plain
        for position, pair in enumerate(record.pairs):
            leaves[pair.dictionary_name, f"dictionary {position}"] = pair.dictionary
            leaves[record.name, f"codes {position}"] = pair.codes
    return sum(
        storage.memory_bytes(
            leaf.inputs, leaf.outputs, None if leaf.group is None else Grid(leaf.bits, leaf.group)
        )
        for leaf in leaves.values()
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
    """Write report.json, JUnit XML and the model card, and take them into the manifest."""
    write_text(folder / REPORT, to_json(report))
    write_text(folder / JUNIT, to_junit(report))
    write_text(folder / CARD, model_card(report, manifest))
    seal(folder, (REPORT, JUNIT, CARD))
