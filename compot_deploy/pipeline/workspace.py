"""Where results go, and where unfinished work is kept until a later run goes on with it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Final

from compot_deploy import __version__
from compot_deploy.errors import InputError, InterruptedRunError
from compot_deploy.models.source import ModelSource
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
        "evaluation",
        "evaluation_tokens",
        "max_perplexity_ratio",
        "max_kl",
        "min_top1",
        "min_cosine",
        "max_export_nmse",
    )
)
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
    # The first format's bytes decide the allocation; text files are told apart by what they hold.
    decisive |= {"model": source.fingerprint, "version": __version__, "storage": recipe.format[0]}
    for name in ("calibration", "evaluation"):
        path = getattr(recipe, name)
        if path and Path(path).is_file():
            decisive[f"{name} text"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if recipe.planned:
        # Measurements serve every budget; what a plan makes of them is named after the plan.
        decisive = {key: value for key, value in decisive.items() if key not in _BUDGETS}
        del decisive["sequential"], decisive["search"]
        decisive["allocation"] = recipe.allocator  # asked for by name or not
    # Evaluating on a file instead of on the end of the calibration text leaves more to calibrate on.
    decisive["held out"] = recipe.evaluation is None
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    out = next(iter(targets_of(recipe).values()))
    out = out if len(set(recipe.format)) == 1 else out.parent
    return out.parent / f".{out.name}.work-{key}"


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
