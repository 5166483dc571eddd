"""The stage between matrices and files: heal what was made, where that was asked for and can be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from compot_deploy.core.store import Instead, StoredMatrices
from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.healing import Course, Patient, affordable_steps, heal, objection, split_texts
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.planning.settings import Settings
from compot_deploy.progress import Progress


@dataclass(frozen=True)
class Treated:
    """A compressed model after this stage.

    Attributes:
        model: healed, or as it was.
        before: as it was, where it was healed; None otherwise.
        notes: what a report must say of it.
    """

    model: CompressedModel
    before: CompressedModel | None = None
    notes: tuple[str, ...] = ()


def check_healing(settings: Settings, windows: TokenWindows) -> None:
    """Refuse steps that were asked for by number and cannot be made, before any work.

    Raises:
        InputError: too little text.
        UnsupportedModelError: a model that cannot be healed.
    """
    if settings.recipe.heal_steps is None:
        return
    reason = objection(settings.source)
    if reason is not None:
        raise UnsupportedModelError(f"--heal {settings.recipe.heal}: {reason}. Leave it out.")
    reason = objection(settings.source, windows)
    if reason is not None:
        raise InputError(
            f"--heal {settings.recipe.heal}: {reason}. Give more --calibration text, or a larger --samples."
        )


def treat(
    settings: Settings,
    model: CompressedModel,
    files: Mapping[str, Path],
    windows: TokenWindows,
    work: Path,
    progress: Progress,
) -> Treated:
    """Heal a model as its recipe says.

    Args:
        settings: resolved.
        model: as it was made.
        files: of all its matrices.
        windows: calibration text.
        work: folder for what is finished.
        progress: told how far the work is.
    """
    recipe, source = settings.recipe, settings.source
    if recipe.heal == "off":
        return Treated(model)
    steps = recipe.heal_steps
    if steps is None:
        reason = objection(source) or objection(source, windows)
        if recipe.rounds_again:
            reason = f"--gguf-type {recipe.gguf_type} rounds every weight again"
        if reason is not None:
            return Treated(model, notes=(f"not healed: {reason}",))
        steps = affordable_steps(source, split_texts(source, windows.inputs), recipe.planned)
        if steps == 0:
            return Treated(model, notes=("not healed: that would take longer than the rest of the run",))
    blocks = {name: path for name, path in files.items() if name in source.sites}
    others = {name: path for name, path in files.items() if name not in source.sites}
    patient = Patient(source, windows, blocks, others, work, settings.device)
    try:
        healed = heal(patient, steps, recipe.seed, progress)
    except UnsupportedModelError as error:
        if recipe.heal_steps is not None:
            raise UnsupportedModelError(f"--heal {recipe.heal}: {error} Leave it out.") from None
        return Treated(model, notes=(f"not healed: {str(error).rstrip('.')}",))
    note = told(healed.course, source.task.unit)
    if healed.course.kept == 0:
        return Treated(model, notes=(note,))
    changed = replace(
        model,
        matrices=StoredMatrices({name: healed.files.get(name, path) for name, path in files.items()}),
        tensors=Instead(model.tensors, healed.vectors),
    )
    return Treated(changed, model, (note,))


def told(course: Course, unit: str) -> str:
    """A course as a note for a report."""
    took = (
        f"{course.done} of {course.steps} steps on {course.tokens:,} tokens, {course.tuned:,} numbers tuned"
    )
    ended = f"; it ended early: {course.stopped}" if course.stopped else ""
    if course.kept == 0:
        return f"healing gained nothing on held-out calibration text and is left out ({took}){ended}"
    gained = 1 - course.after / course.before if course.before > 0 else 0.0
    return (
        f"healed: held-out calibration text loses {course.after:.4g} {unit} instead of {course.before:.4g}, "
        f"{gained:.0%} less, after step {course.kept} ({took}){ended}"
    )
