"""A recipe: every knob of a run, from one frozen value.

`Recipe` has the knobs; what is here by name is what the rest of the package asks of them.
"""

from compot_deploy.recipe.knob_types import knob_type
from compot_deploy.recipe.knobs import (
    DEFAULT_GROUP,
    Recipe,
    default_of,
    knobs,
    one_form_options,
    override,
    size_in_bytes,
)
from compot_deploy.recipe.reading import recipe_from_mapping, recipe_from_toml, recipe_to_toml

__all__ = [
    "DEFAULT_GROUP",
    "Recipe",
    "default_of",
    "knob_type",
    "knobs",
    "one_form_options",
    "override",
    "recipe_from_mapping",
    "recipe_from_toml",
    "recipe_to_toml",
    "size_in_bytes",
]
