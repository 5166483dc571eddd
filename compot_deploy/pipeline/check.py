"""An exported folder checked again, or its report written again; right after export or years later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.gate import Gate, apply_gate
from compot_deploy.accuracy.listening import Comparing
from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.probes import Probes
from compot_deploy.core.store import write_text
from compot_deploy.embedded import MODEL
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.manifest import SIGNATURE, Manifest
from compot_deploy.exporters.signature import SigningKey, sign
from compot_deploy.llama.model import find_gguf
from compot_deploy.llama.probe import probe
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.configuration import CONFIG, context_of, settings_of
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.pipeline.evaluation import (
    HTML,
    JUNIT,
    REPORT,
    Subject,
    Watchers,
    evaluate_folder,
    sizes_of,
    write_report,
)
from compot_deploy.pipeline.integrity import check_matrices, check_signed, unlisted
from compot_deploy.pipeline.limits import (
    FEWEST_POSITIONS,
    gate_of,
    limits_of_check,
    positions_criterion,
)
from compot_deploy.pipeline.reading import ReadingCheck
from compot_deploy.pipeline.reference import Reference, read_reference, reading_of_source
from compot_deploy.pipeline.task_accuracy import questions_of
from compot_deploy.pipeline.terms import Terms, recipe_of
from compot_deploy.pipeline.texts import evaluation_of, read_evaluation
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import Recipe
from compot_deploy.report.document import SCHEMA_MINOR, Report, Sizes, with_criteria
from compot_deploy.report.facts import Origin
from compot_deploy.report.gate import GateRequirements
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import from_json, to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.manifest import frontier_of, layers_of, origin_of


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


def check(
    folder: str | Path,
    *,
    reference: str | None = None,
    export_only: bool = False,
    limits: Mapping[str, float] | None = None,
    requirements: GateRequirements | None = None,
    text: str | Path | None = None,
    min_positions: int = FEWEST_POSITIONS,
    strict: bool = False,
    trusted_key: str | None = None,
    tasks: Sequence[str] = (),
    task_samples: int | None = None,
    progress: Progress = silent,
) -> Deployment:
    """Check an exported folder again: its bytes, its structure, its accuracy. The folder may come from anybody.

    The compressed weights are read back from the files, so nothing but the folder is needed for the export
    loss. The total loss also needs the original model, which is looked for under the name that the recipe gives, here,
    beside the folder, and among what was had from the hub before (nothing else is followed unasked), or its answers in
    a reference file.

    Args:
        folder: written by `deploy`.
        reference: the original model, where it has moved; or a reference file, ``compot/reference.safetensors`` of an
            export, kept where the folder cannot change it.
        export_only: be content with what the folder alone can tell, where the original is not there.
        limits: gate limits that replace those of the recipe, by option.
        requirements: of a gate file and a baseline.
        text: to evaluate on, instead of the folder's own; needs the original model.
        min_positions: tokens that the text has, at least.
        strict: fail for whatever lies in the folder and is not in its manifest.
        trusted_key: public key of minisign that must have signed the manifest: its file, or its line.
        tasks: tasks of lm-eval to be scored, names or files.
        task_samples: most questions of each.
        progress: told how far the work is.

    Raises:
        ArtifactError: a file does not match the manifest, a matrix does not match its description, a file that a
            runtime would read is not listed, or the trusted key did not sign the manifest.
        InputError: a limit needs the original model, and it is not there; or the baseline does not compare.
    """
    terms = Terms(
        reference=reference,
        export_only=export_only,
        limits=limits or {},
        requirements=requirements or GateRequirements(),
        text=None if text is None else Path(text),
        min_positions=min_positions,
        strict=strict,
        trusted_key=trusted_key,
        tasks=tuple(tasks),
        task_samples=task_samples,
    )
    return _check(Path(folder), terms, progress)


def _check(folder: Path, terms: Terms, progress: Progress) -> Deployment:
    signature = check_signed(folder, terms.trusted_key)
    manifest = verify(folder)
    _check_exporter(folder, manifest)
    recipe, unasked = recipe_of(folder, manifest, terms)
    model = EXPORTERS[manifest.exporter].read_model(folder)
    if manifest.exporter == "gguf":
        probe(find_gguf(folder))
    check_matrices(folder, manifest, model)
    strange = unlisted(folder, manifest, strict=terms.strict)
    original, kept, absent = _reference(folder, manifest, model, recipe, terms)
    subject = Subject(folder, manifest, model, original, absent)
    evaluation = _evaluation(subject, kept, terms)
    terms.requirements.check_text(evaluation.text.digest, evaluation.text.source)
    recipe, whose = limits_of_check(recipe, terms.given, subject.task)
    questions = questions_of(terms.tasks, terms.task_samples, subject.task)
    if "min_recovery" in terms.given and original is None:
        raise InputError(
            f"--min-recovery needs the original model, and {absent or 'a file stands for it'}: give it with "
            "--reference MODEL."
        )
    gate = gate_of(recipe, subject.task)
    without = Gate(max_export_nmse=gate.max_export_nmse)

    settings = settings_of(model.config, str(folder / CONFIG), ArtifactError)
    vocabulary = int(settings.get_text_config().vocab_size)
    reads = not subject.task.has_towers  # what is asked beside the losses is about one text
    context = context_of(settings)
    context = min(context, EXPORTERS[manifest.exporter].context(model.config) or context)
    probes = Probes(subject.task, evaluation.text.windows, context, vocabulary)
    reading = None if original is None or not reads else reading_of_source(original, evaluation.text)
    readings = ReadingCheck(kept.reading, folder, manifest.exporter) if kept is not None else None
    if reading is not None:
        readings = ReadingCheck(reading, folder, manifest.exporter)
    comparing = None if kept is None else Comparing(subject.task, kept.answers)
    watchers = Watchers(
        visits=(*((probes.visit,) if reads else ()), *(() if readings is None else (readings.visit,))),
        listeners={} if comparing is None else {"exported": comparing},
    )
    known = original is not None or terms.needs_total
    report = evaluate_folder(
        subject, evaluation, gate if known and kept is None else without, progress, watchers
    )
    if kept is not None and comparing is not None:
        report = _with_total(report, gate, kept, comparing)
    further = []
    if reads:
        further = [positions_criterion(evaluation, subject.task, terms.min_positions), *probes.criteria(gate)]
    further += [] if readings is None else list(readings.criteria())
    report = with_criteria(report, further)
    if questions is not None:
        report = questions.asked(report, folder, manifest.exporter, original, gate, context, progress)
    notes = (*report.notes, whose, *unasked, *(() if kept is None else (_ABOUT_KEPT,)))
    report = replace(report, notes=notes, diagnostics=(*report.diagnostics, *strange, *signature))
    return Deployment(folder, terms.requirements.apply(report))


_ABOUT_KEPT: Final = (
    "the total loss was measured against a reference file: perplexity and choices are exact, the KL divergence is "
    "estimated from the most likely tokens and some that were drawn."
)


def _reference(
    folder: Path, manifest: Manifest, model: CompressedModel, recipe: Recipe, terms: Terms
) -> tuple[ModelSource | None, Reference | None, str]:
    """What the folder is held against: the original, or its answers; and why there is no original.

    Raises:
        InputError: neither is there, and it is needed; or it is of another model.
    """
    source = str(manifest.metadata.get("source"))
    if terms.reference is not None and Path(terms.reference).is_file():
        path = Path(terms.reference)
        kept = read_reference(path, Subject(folder, manifest, model, None).task)
        if kept.fingerprint != source:
            raise _of_another_model(terms.reference, folder, kept.fingerprint, source)
        return None, kept, "its answers are held against the file"
    original: ModelSource | None = None
    try:
        place = terms.reference or _original(folder, recipe.model)
        original = open_source(place, allow_pickle=recipe.allow_pickle, ask_hub=terms.reference is not None)
        absent = ""
    except InputError as error:
        if terms.reference is not None:
            raise
        absent = f"it is not where the recipe says ({str(error).rstrip('.')})"
    if original is not None and original.fingerprint != source:
        if terms.reference is not None:
            raise _of_another_model(terms.reference, folder, original.fingerprint, source)
        original, absent = None, "the model where the recipe says has changed since"
    if original is None and not terms.export_only and not terms.needs_total:
        raise InputError(
            f"{folder}: only its structure and its export can be known without the original model, and {absent}. "
            "Give it with --reference MODEL, a folder or a hub id, or --reference FILE, its answers, which every "
            "export keeps; --export-only is content with less."
        )
    if original is None and terms.requirements.compares_losses:
        raise InputError(
            f"Growth of the loss cannot be measured without the original model: {absent}. Give it with --reference."
        )
    return original, None, absent


def _of_another_model(reference: str, folder: Path, found: str, wanted: str) -> InputError:
    return InputError(
        f"--reference {reference}: this is not the model that {folder} was made from; its fingerprint is "
        f"{found[:12]}, not {wanted[:12]}."
    )


def _evaluation(subject: Subject, kept: Reference | None, terms: Terms) -> Evaluation:
    """What is read: the given text, that of the reference file, or the folder's own."""
    own = read_evaluation(subject.folder, load_tokenizer(subject.folder), subject.model.config)
    if terms.text is not None:
        if subject.original is None:
            raise InputError(
                "--text is turned into tokens as the original does: give it with --reference MODEL."
            )
        recipe = Recipe(evaluation=str(terms.text), model=str(subject.original.folder))
        return evaluation_of(recipe, subject.original, terms.text.parent)
    return own if kept is None else replace(own, text=kept.text, prompts=kept.prompts)


def _with_total(report: Report, gate: Gate, kept: Reference, comparing: Comparing) -> Report:
    """The report with the total loss against kept answers, and the limits on it."""
    accuracy = report.accuracy
    total = Loss(kept.name, accuracy.export_deployed.candidate, comparing.comparison(), ())
    verdict = apply_gate(gate, accuracy.export_reference, accuracy.export_deployed, None, total)
    return replace(report, accuracy=replace(accuracy, total=total, reference_absent=None, gate=verdict))


def _original(folder: Path, name: str | None) -> str | Path:
    """Where the original may be: under its name here or beside the folder; whatever else a folder says is not followed.

    A folder may come from anybody, and its recipe with it: no path of its own leads anywhere, and the hub is not asked.

    Raises:
        InputError: the recipe names a path.
    """
    if name is None:
        return MODEL
    if Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("~"):
        raise InputError(f"{name} is a path, which is not followed unasked")
    beside = folder.resolve().parent / name
    return beside if beside.exists() and beside != folder.resolve() and not Path(name).exists() else name


def _check_exporter(folder: Path, manifest: Manifest) -> None:
    if manifest.exporter not in EXPORTERS:
        raise ArtifactError(
            f"{folder}: its manifest says that the exporter {manifest.exporter!r} wrote it, which has no report of "
            f"this kind; {', '.join(sorted(EXPORTERS))} have one."
        )


def write_report_again(folder: Path, key: SigningKey | None = None) -> Report:
    """Write the report of an existing folder again from its own figures; nothing is measured.

    What an older report does not have and the manifest knows is filled in.

    Args:
        folder: that `deploy` wrote.
        key: that signs the manifest again; a signed folder needs it, for the report is a part of what was signed.

    Raises:
        ArtifactError: not a folder of ours, or damaged.
        InputError: there is no report, or it is of another version; or the folder is signed, and there is no key.
    """
    manifest = verify(folder)
    if key is None and (folder / SIGNATURE).exists():
        raise InputError(
            f"{folder} is signed, and its report with it: give --sign KEY to sign it again, or remove {SIGNATURE}."
        )
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
    if key is not None:
        sign(folder, key)
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
