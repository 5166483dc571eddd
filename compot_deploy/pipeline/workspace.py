"""Where results go, who may write there, and where unfinished work is kept until a later run goes on with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Final

from compot_deploy.accuracy.gate import LOSS_LIMITS
from compot_deploy.core.code_version import code_version
from compot_deploy.core.disk import FULL, disk_errors
from compot_deploy.core.lock import locked
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.errors import InputError, InterruptedRunError
from compot_deploy.exporters.archive import archive_path
from compot_deploy.exporters.manifest import MANIFEST
from compot_deploy.exporters.staging import aside_of, clear_leftovers
from compot_deploy.models.source import TOKENIZER_FILES, ModelSource
from compot_deploy.models.tokens import text_of_dataset
from compot_deploy.pipeline.texts import names_dataset
from compot_deploy.planning.settings import device_of
from compot_deploy.recipe import Recipe

RECIPE: Final = "compot/recipe.toml"
"""Where an output keeps the recipe that it was made from."""

_DOES_NOT_CHANGE_WEIGHTS: Final = frozenset(
    (
        "out",
        "force",
        "format",
        "archive",
        "compare",
        "cluster",
        "sign",
        "heal",  # its files are named after what is healed and how
        "evaluation",
        "evaluation_tokens",
        "min_positions",
        "tasks",
        "task_samples",
        *LOSS_LIMITS,
    )
)
_GOES_ON: Final = "Make room, then run the same command: it goes on with what is finished."
_BUDGETS: Final = frozenset(("bits", "size", "ratio"))


def targets_of(recipe: Recipe) -> dict[str, Path]:
    """Output folder of each format: the one asked for, or one inside it per format when there are several."""
    name = Path(recipe.model).resolve().name if recipe.model else "embedded"
    out = Path(recipe.out or f"{name or 'model'}-compot-{recipe.quant}-{'-'.join(recipe.format)}")
    if len(set(recipe.format)) == 1:
        return {recipe.format[0]: out}
    return {kind: out / kind for kind in recipe.format}


def work_folder(recipe: Recipe, source: ModelSource) -> Path:
    """Where unfinished work for exactly this model and recipe is kept, beside the output."""
    decisive = {
        option.name: getattr(recipe, option.name)
        for option in fields(recipe)
        if option.name not in _DOES_NOT_CHANGE_WEIGHTS
    }
    # The first format's bytes decide the allocation; texts are told apart by what they hold.
    decisive |= {"model": source.fingerprint, "code": code_version(), "storage": recipe.format[0]}
    decisive |= {"tokenizer": _hash_of_tokenizer(source.folder), "device": device_of(recipe)}
    for name in ("calibration", "evaluation"):
        place = getattr(recipe, name)
        if place and Path(place).is_file():
            decisive[f"{name} text"] = hashlib.sha256(Path(place).read_bytes()).hexdigest()
        elif place and Path(place).is_dir():
            decisive[f"{name} files"] = _digest_of_folder(Path(place))
        elif name == "calibration" and place and names_dataset(place):
            decisive["calibration text"] = hashlib.sha256(text_of_dataset(place).encode()).hexdigest()
    if recipe.planned:
        # Measurements serve every budget; what a plan makes of them is named after the plan.
        decisive = {key: value for key, value in decisive.items() if key not in _BUDGETS}
        del decisive["sequential"], decisive["search"]
        decisive["allocation"] = recipe.allocator  # asked for by name or not
    # Evaluating on a file instead of on the end of the calibration text leaves more to calibrate on.
    decisive["held out"] = recipe.evaluation is None
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    out = _base(recipe)
    return out.parent / f".{out.name}.work-{key}"


def _base(recipe: Recipe) -> Path:
    """The output that was asked for; that of several formats holds a folder for each."""
    out = next(iter(targets_of(recipe).values()))
    return out if len(set(recipe.format)) == 1 else out.parent


def _hash_of_tokenizer(folder: Path) -> str:
    """sha256 over the files of a tokenizer: the same text is other tokens with another one."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"\0{name}\0".encode() + (folder / name).read_bytes())
    return digest.hexdigest()


@contextmanager
def reserved(recipe: Recipe, work: Path | None = None) -> Iterator[None]:
    """Be the only run that writes these outputs; what runs that were killed left beside them is removed.

    Args:
        recipe: names the outputs.
        work: a work folder that is not beside the output.

    Raises:
        InputError: another run writes one of them; or their folder cannot be written.
    """
    targets = list(targets_of(recipe).values())
    base = _base(recipe)
    with ExitStack() as stack:
        try:
            with disk_errors(base):
                stack.enter_context(locked([base, *targets, *([] if work is None else [work])]))
        except OSError as error:
            raise InputError(
                f"{base.parent} cannot be written: {error.strerror}. Choose another --out."
            ) from None
        for target in {base, *targets}:
            clear_leftovers(target)
            clear_leftovers(archive_path(target))
        yield


def note_finished(work: Path, recipe: Recipe, kind: str, folder: Path) -> None:
    """Note which folder is about to take its place: the same command takes it as finished, see `is_finished`.

    Args:
        work: folder for what is finished.
        recipe: that is followed.
        kind: format of the folder.
        folder: sealed, not in its place yet.
    """
    write_value(work / f"finished-{kind}.json", [_hash_of_recipe(recipe), _hash_of(folder / MANIFEST)])


def is_finished(work: Path, recipe: Recipe, kind: str, target: Path) -> bool:
    """Whether the folder at a target is what a run of the same recipe put there before it was stopped."""
    path = work / f"finished-{kind}.json"
    if not is_sound(path) or not (target / MANIFEST).is_file():
        return False
    return bool(read_value(path) == [_hash_of_recipe(recipe), _hash_of(target / MANIFEST)])


def remove_work(work: Path, recipe: Recipe) -> None:
    """Remove a work folder that has served; half of it is never taken for work, however this is stopped."""
    rubbish = aside_of(_base(recipe), "staging")
    work.rename(rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def _hash_of_recipe(recipe: Recipe) -> str:
    values = {
        name: value for name, value in asdict(recipe).items() if name not in ("force", "archive", "cluster")
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of_folder(folder: Path) -> str:
    """Of names and contents of every file in it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def kept_when_interrupted(work: Path) -> Iterator[None]:
    """Finished blocks survive an interruption or a failure; a folder in which nothing was finished does not."""
    made = not work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{work.parent} cannot be written: {error.strerror}. Choose another --out."
        ) from None
    try:
        with disk_errors(work, _GOES_ON, FULL):
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"Interrupted. What is finished is kept in {work}; the same command goes on from there."
        ) from None
    finally:
        if made and work.exists() and not any(work.glob("*.safetensors")):
            shutil.rmtree(work)
