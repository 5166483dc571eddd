"""The stage between matrices and files: heal what was made, where that was asked for and can be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from compot_deploy.core.store import Instead, StoredMatrices
from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.healing import Course, Patient, affordable_steps, heal, objection, split_texts
from compot_deploy.healing.texts import TOKENS_PER_STEP
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.settings import Settings
from compot_deploy.progress import Progress
from compot_deploy.recipe import Recipe


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
    decided = _decide(recipe, source, windows)
    if decided.steps == 0:
        return Treated(model, notes=(f"not healed: {decided.reason}",))
    blocks = {name: path for name, path in files.items() if name in source.sites}
    others = {name: path for name, path in files.items() if name not in source.sites}
    patient = Patient(source, windows, blocks, others, work, settings.device)
    try:
        healed = heal(patient, decided.steps, recipe.seed, progress)
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


@dataclass(frozen=True)
class _Decided:
    """How many steps are made; for none the reason."""

    steps: int
    reason: str = ""


def _decide(recipe: Recipe, source: ModelSource, windows: TokenWindows) -> _Decided:
    if recipe.heal_steps is not None:
        return _Decided(recipe.heal_steps)
    reason = objection(source) or objection(source, windows)
    if recipe.rounds_again:
        reason = f"--gguf-type {recipe.gguf_type} rounds every weight again"
    if reason is not None:
        return _Decided(0, reason)
    steps = affordable_steps(source, split_texts(source, windows.inputs), recipe.planned)
    return _Decided(steps, "as many steps as are of use would take longer than the rest of the run")


def listens(settings: Settings, windows: TokenWindows) -> bool:
    """Whether calibration keeps what the original says: where it comes to the head, and healing asks for it."""
    recipe, source = settings.recipe, settings.source
    if recipe.heal == "off" or source.layout.head is None or recipe.dtype != "float32":
        return False
    return objection(source, windows) is None and _decide(recipe, source, windows).steps > 0


def expected(recipe: Recipe, context: PlanningContext) -> tuple[str, ...]:
    """What healing a plan's model is going to take, as a note; nothing where it is off."""
    if recipe.heal == "off":
        return ()
    decided = _decide(recipe, context.source, context.windows)
    if decided.steps == 0:
        return (f"it will not be healed: {decided.reason}",)
    return (
        f"it will be healed by {decided.steps} steps of at least {TOKENS_PER_STEP:,} tokens of the calibration text, "
        "scales and norms only: the same bytes",
    )


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
