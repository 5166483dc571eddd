"""The forms that a matrix can take: plain on one grid, or dictionaries and codes in levels of precision.

A form is a description without numbers; `compot_deploy.planning.candidates` makes the matrices of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from typing_extensions import assert_never

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.storage import Storage
from compot_deploy.numerics.joint import Level


@dataclass(frozen=True)
class Plain:
    """A matrix that is not factorised: quantized on one grid, or None: kept as it is."""

    grid: Grid | None

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored."""
        return storage.leaf_bytes(inputs, outputs, self.grid)

    def __str__(self) -> str:
        return "unquantized" if self.grid is None else str(self.grid)


@dataclass(frozen=True)
class Joint:
    """Dictionaries and codes, quantized jointly; see `compot_deploy.numerics.joint`."""

    levels: tuple[Level, ...]

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored; `outputs` of all matrices together where they share the dictionary."""
        return sum(
            storage.leaf_bytes(inputs, level.atoms, level.dictionary)
            + storage.leaf_bytes(level.atoms, outputs, level.codes, level.pattern)
            for level in self.levels
        )

    def __str__(self) -> str:
        return " + ".join(map(str, self.levels))


@dataclass(frozen=True)
class Separate:
    """A dictionary and codes made in floating point, then quantized one after the other, as the papers do.

    Attributes:
        method: how the factors are made.
        atoms: k.
        pattern: which codes are kept.
        dictionary: grid of A; None for floating point.
        codes: grid of S.
        rounds: alternations of coding and dictionary update.
        paper_exact: stop where the paper stops.
    """

    method: Literal["compot", "svd-llm"]
    atoms: int
    pattern: Pattern
    dictionary: Grid | None
    codes: Grid | None
    rounds: int
    paper_exact: bool = False

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored; `outputs` of all matrices together where they share the dictionary."""
        dictionary = storage.leaf_bytes(inputs, self.atoms, self.dictionary)
        return dictionary + storage.leaf_bytes(self.atoms, outputs, self.codes, self.pattern)


Form: TypeAlias = Plain | Joint | Separate


@dataclass(frozen=True)
class GridChoice:
    """Grids that a format holds.

    Attributes:
        groups: sizes of groups by bits.
        step: atoms of a level come in multiples of this.
    """

    groups: Mapping[int, tuple[int, ...]]
    step: int = 8

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All of them."""
        return tuple(Grid(bits, group) for bits, groups in self.groups.items() for group in groups)


def form_to_data(form: Form) -> dict[str, Any]:
    """A form as JSON takes it; `form_from_data` is the inverse."""

    def grid(value: Grid | None) -> list[int | str] | None:
        if value is None:
            return None
        return [value.bits, value.group, *([] if value.codebook == "integer" else [value.codebook])]

    match form:
        case Plain():
            return {"plain": grid(form.grid)}
        case Joint():
            return {
                "joint": [
                    {
                        "atoms": level.atoms,
                        "dictionary": grid(level.dictionary),
                        "codes": grid(level.codes),
                        "pattern": [level.pattern.kept, level.pattern.of],
                    }
                    for level in form.levels
                ]
            }
        case Separate():
            return {
                "separate": {
                    "method": form.method,
                    "atoms": form.atoms,
                    "pattern": [form.pattern.kept, form.pattern.of],
                    "dictionary": grid(form.dictionary),
                    "codes": grid(form.codes),
                    "rounds": form.rounds,
                    "paper_exact": form.paper_exact,
                }
            }
        case _:
            assert_never(form)


def form_from_data(data: Mapping[str, Any]) -> Form:
    """Read what `form_to_data` wrote."""

    def grid(value: Sequence[Any] | None) -> Grid | None:
        return None if value is None else Grid(*value)

    if "plain" in data:
        return Plain(grid(data["plain"]))
    if "separate" in data:
        values = dict(data["separate"])
        values |= {name: grid(values[name]) for name in ("dictionary", "codes")}
        return Separate(**values | {"pattern": Pattern(*values["pattern"])})
    return Joint(
        tuple(
            Level(level["atoms"], grid(level["dictionary"]), grid(level["codes"]), Pattern(*level["pattern"]))
            for level in data["joint"]
        )
    )


def describe(form: Form) -> str:
    """A few characters for a table: int4/g32, or the atoms and bits of each level."""
    match form:
        case Plain():
            return str(form)
        case Joint():
            parts = []
            for level in form.levels:
                bits = [grid.bits if grid else 32 for grid in (level.dictionary, level.codes)]
                sparse = "" if level.pattern.is_dense else f" {level.pattern}"
                parts.append(f"{level.atoms}@{bits[0]}/{bits[1]}{sparse}")
            return "joint " + " ".join(parts)
        case Separate():
            bits = [grid.bits if grid else 32 for grid in (form.dictionary, form.codes)]
            sparse = "" if form.pattern.is_dense else f" {form.pattern}"
            return f"{form.method} {form.atoms}@{bits[0]}/{bits[1]}{sparse}"
        case _:
            assert_never(form)
