"""A recipe: every option of a run, from one frozen value.

`Recipe` has the options; what is here by name is what the rest of the package asks of them.
"""

from compot_deploy.recipe.option_types import option_type
from compot_deploy.recipe.options import (
    DEFAULT_GROUP,
    Recipe,
    default_of,
    one_scheme_options,
    override,
    recipe_options,
    size_in_bytes,
)
from compot_deploy.recipe.reading import recipe_from_mapping, recipe_from_toml, recipe_to_toml, separated

__all__ = [
    "DEFAULT_GROUP",
    "Recipe",
    "default_of",
    "one_scheme_options",
    "option_type",
    "override",
    "recipe_from_mapping",
    "recipe_from_toml",
    "recipe_options",
    "recipe_to_toml",
    "separated",
    "size_in_bytes",
]
