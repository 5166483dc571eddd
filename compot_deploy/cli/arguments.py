"""Arguments to a recipe: one flag for every field of `Recipe`, made from the field itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from compot_deploy import __version__
from compot_deploy.errors import EXIT_CODES, RecipeError
from compot_deploy.recipe import (
    Recipe,
    default_of,
    option_type,
    recipe_from_mapping,
    recipe_from_toml,
    recipe_options,
)

_GROUPS: Final = {
    "model": "what and where",
    "size": "size",
    "method": "method",
    "calibration": "calibration",
    "output": "output",
    "gate": "check and gate",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are our errors."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise RecipeError(f"{message[0].upper()}{message[1:]}. See {self.prog} --help.")


NAMES: Final = ("plan", "supports", "check", "report", "inspect", "run", "keygen", "serve", "demo")
"""Commands that have a name; see `compot_deploy.cli.commands`."""


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """A recipe from command-line arguments; flags win over the file given with --recipe.

    Raises:
        RecipeError: an unknown flag or a value outside its range.
    """
    return recipe_of(
        recipe_parser(
            "compot-deploy",
            "Compress a transformer with COMPOT and quantization, export it, and prove its accuracy. "
            f"Other commands: {', '.join(NAMES)}; see compot-deploy COMMAND --help.",
        ).parse_args(arguments)
    )


def recipe_parser(prog: str, description: str) -> Parser:
    """A parser with one flag for every option of a recipe."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", default=None, metavar="MODEL", help=_help("model"))
    parser.add_argument("--recipe", type=Path, help="TOML file with the same options; flags win over it")
    parser.add_argument("--version", action="version", version=f"compot-deploy {__version__}")
    add_options(parser, only={option.name for option in recipe_options()} - {"model"})
    return parser


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe of parsed arguments."""
    values = {key: value for key, value in vars(options).items() if value is not None}
    path = values.pop("recipe", None)
    if path is not None:
        return recipe_from_toml(path, **values)
    return recipe_from_mapping(values, origin="the command line")


def add_options(parser: argparse.ArgumentParser, only: set[str]) -> None:
    """Flags for some options of a recipe."""
    groups: dict[str, Any] = {}
    for option in recipe_options():
        if option.name not in only:
            continue
        title = _GROUPS[option.metadata["group"]]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        kind, choices, several = option_type(option.name)
        flag = "--" + option.name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action="store_const", const=True, default=None, help=_help(option.name))
        else:
            group.add_argument(
                flag,
                dest=option.name,
                type=kind,
                choices=choices or None,
                action="append" if several else "store",
                default=None,
                metavar=None if choices else kind.__name__.upper(),
                help=_help(option.name),
            )


def _help(name: str) -> str:
    option = next(option for option in recipe_options() if option.name == name)
    text = str(option.metadata["help"]).replace("%", "%%")
    value = default_of(option)
    shown = " ".join(value) if isinstance(value, tuple) else value
    unit = f" {option.metadata['unit']}" if option.metadata["unit"] else ""
    return text if value is None or value is False else f"{text} (default: {shown}{unit})"
