"""An exported folder checked again, or its report written again; right after export or years later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from compot_deploy.accuracy.gate import Gate
from compot_deploy.core.store import write_text
from compot_deploy.embedded import MODEL
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.manifest import Manifest
from compot_deploy.llama.model import find_gguf
from compot_deploy.llama.probe import probe
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.pipeline.evaluation import (
    HTML,
    JUNIT,
    REPORT,
    Subject,
    evaluate_folder,
    sizes_of,
    write_report,
)
from compot_deploy.pipeline.limits import TOTAL_LIMITS, gate_of
from compot_deploy.pipeline.texts import read_evaluation
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import recipe_from_mapping
from compot_deploy.report.document import SCHEMA_MINOR, Report, Sizes
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
    progress: Progress = silent,
) -> Deployment:
    """Check an exported folder again: its bytes, its structure, its accuracy.

    The compressed weights are read back from the files, so nothing but the folder is needed for the export
    loss; method and total loss also need the original model, which is looked for under the name that the recipe gives,
    here, beside the folder, and among what was had from the hub before. Nothing else is followed unasked.

    Args:
        folder: written by `deploy`.
        reference: the original model, where it has moved.
        export_only: be content with what the folder alone can tell, where the original is not there.
        limits: gate limits that replace those of the recipe, by option.
        requirements: of a gate file and a baseline.
        progress: told how far the work is.

    Raises:
        ArtifactError: a file does not match the manifest.
        InputError: a limit needs the original model, and it is not there; or the baseline does not compare.
    """
    folder = Path(folder)
    requirements = requirements or GateRequirements()
    limits = {**requirements.gate.losses, **(limits or {})}
    manifest = verify(folder)
    _check_exporter(folder, manifest)
    recipe = recipe_from_mapping({**manifest.recipe, **limits}, origin=f"{folder}'s manifest")
    model = EXPORTERS[manifest.exporter].read_model(folder)
    if manifest.exporter == "gguf":
        probe(find_gguf(folder))
    evaluation = read_evaluation(folder, load_tokenizer(folder), model.config)
    requirements.check_text(evaluation.text.digest, evaluation.text.source)
    original: ModelSource | None = None
    absent = "the folder does not hold it"
    try:
        place = reference or _original(folder, recipe.model)
        original = open_source(place, allow_pickle=recipe.allow_pickle, ask_hub=reference is not None)
    except InputError as error:
        if reference is not None:
            raise
        absent = f"it is not where the recipe says ({str(error).rstrip('.')})"
    if original is not None and original.fingerprint != manifest.metadata.get("source"):
        if reference is not None:
            raise InputError(
                f"--reference {reference}: this is not the model that {folder} was made from; its fingerprint "
                f"is {original.fingerprint[:12]}, not {str(manifest.metadata.get('source'))[:12]}."
            )
        original, absent = None, "the model where the recipe says has changed since"
    if (
        original is None
        and not export_only
        and not TOTAL_LIMITS & limits.keys()
        and not requirements.compares_losses
    ):
        raise InputError(
            f"{folder}: only its structure and its export can be known without the original model, and {absent}. "
            "Give it with --reference MODEL, a folder or a hub id; --export-only is content with less."
        )
    if original is None and requirements.compares_losses:
        raise InputError(
            f"Growth of the loss cannot be measured without the original model: {absent}. Give it with --reference."
        )
    subject = Subject(folder, manifest, model, original, absent)
    gate = gate_of(recipe, subject.task)
    if original is None and not TOTAL_LIMITS & limits.keys():
        # Limits that came with the folder cannot be measured here; what can be is.
        gate = Gate(max_export_nmse=gate.max_export_nmse)
    report = evaluate_folder(subject, evaluation, gate, progress)
    return Deployment(folder, requirements.apply(report))


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
    return beside if beside.exists() and not Path(name).exists() else name


def _check_exporter(folder: Path, manifest: Manifest) -> None:
    if manifest.exporter not in EXPORTERS:
        raise ArtifactError(
            f"{folder}: its manifest says that the exporter {manifest.exporter!r} wrote it, which has no report of "
            f"this kind; {', '.join(sorted(EXPORTERS))} have one."
        )


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
