"""On which terms somebody else's folder is checked: what is given, and what of the folder's own recipe counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compot_deploy.errors import RecipeError
from compot_deploy.exporters.manifest import Manifest
from compot_deploy.pipeline.limits import FEWEST_POSITIONS, TOTAL_LIMITS
from compot_deploy.recipe import Recipe, recipe_from_mapping
from compot_deploy.report.gate import GateRequirements


@dataclass(frozen=True)
class Terms:
    """On which terms a folder is checked; everything that whoever checks says himself.

    Attributes:
        reference: the original model, or a reference file; None looks for the original beside the folder.
        export_only: be content with what the folder alone can tell, where the original is not there.
        limits: gate limits that replace those of the recipe, by option.
        requirements: of a gate file and a baseline.
        text: to evaluate on, instead of the folder's own text; needs the original model.
        min_positions: tokens that the text has, at least.
        strict: whatever lies in the folder unlisted fails.
        trusted_key: that must have signed the manifest, see `compot_deploy.exporters.signature`.
        tasks: to be scored, see `compot_deploy.accuracy.harness`; those of the folder's recipe are not asked unasked.
        task_samples: most questions of each.
    """

    reference: str | None = None
    export_only: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    requirements: GateRequirements = field(default_factory=GateRequirements)
    text: Path | None = None
    min_positions: int = FEWEST_POSITIONS
    strict: bool = False
    trusted_key: str | None = None
    tasks: tuple[str, ...] = ()
    task_samples: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks and ("min_recovery" in self.given or self.task_samples is not None):
            raise RecipeError("--min-recovery and --task-samples are about tasks: give --tasks with them.")
        if self.min_positions < 1:
            raise RecipeError(f"--min-positions {self.min_positions}: give at least 1.")

    @property
    def given(self) -> dict[str, float]:
        """Limits of the command line and of a gate file, which it wins over."""
        return {**self.requirements.gate.losses, **self.limits}

    @property
    def needs_total(self) -> bool:
        """Whether a figure of the total loss is asked for by name."""
        return bool(TOTAL_LIMITS & self.given.keys()) or self.requirements.compares_losses


def recipe_of(folder: Path, manifest: Manifest, terms: Terms) -> tuple[Recipe, tuple[str, ...]]:
    """The folder's recipe with what is given in it, and what of it is not measured unasked.

    Raises:
        RecipeError: what the manifest says is no recipe.
    """
    values = {
        **manifest.recipe,
        **terms.given,
        "tasks": list(terms.tasks),
        "task_samples": terms.task_samples,
    }
    limit, asked = manifest.recipe.get("min_recovery"), manifest.recipe.get("tasks")
    if terms.tasks or limit is None:
        return recipe_from_mapping(values, origin=f"{folder}'s manifest"), ()
    told = f"the folder's own limit --min-recovery {limit} was not measured: give --tasks {asked} and the original."
    return recipe_from_mapping({**values, "min_recovery": None}, origin=f"{folder}'s manifest"), (told,)
