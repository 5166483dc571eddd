"""The schemes that a matrix can take: plain on one grid, or dictionaries and codes in tiers of precision.

A scheme is a description without numbers; `compot_deploy.planning.candidates` makes the matrices of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from typing_extensions import assert_never

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.storage import Storage
from compot_deploy.numerics.joint import Tier


@dataclass(frozen=True)
class Plain:
    """A matrix that is not factorized: quantized on one grid, or None: kept as it is."""

    grid: Grid | None

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored."""
        return storage.leaf_bytes(inputs, outputs, self.grid)

    def __str__(self) -> str:
        return "unquantized" if self.grid is None else str(self.grid)


@dataclass(frozen=True)
class Joint:
    """Dictionaries and codes, quantized jointly; see `compot_deploy.numerics.joint`."""

    tiers: tuple[Tier, ...]

    @property
    def is_dense(self) -> bool:
        """Whether all codes are kept."""
        return all(tier.pattern.is_dense for tier in self.tiers)

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored; `outputs` of all matrices together where they share the dictionary."""
        return sum(
            storage.leaf_bytes(inputs, tier.atoms, tier.dictionary)
            + storage.leaf_bytes(tier.atoms, outputs, tier.codes, tier.pattern)
            for tier in self.tiers
        )

    def __str__(self) -> str:
        return " + ".join(map(str, self.tiers))


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


Scheme: TypeAlias = Plain | Joint | Separate


@dataclass(frozen=True)
class GridChoice:
    """Grids that a format holds.

    Attributes:
        groups: sizes of groups by bits.
        step: atoms of a tier come in multiples of this.
    """

    groups: Mapping[int, tuple[int, ...]]
    step: int = 8

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All of them."""
        return tuple(Grid(bits, group) for bits, groups in self.groups.items() for group in groups)


def scheme_to_data(scheme: Scheme) -> dict[str, Any]:
    """A scheme as JSON takes it; `scheme_from_data` is the inverse."""

    def grid(value: Grid | None) -> list[int | str] | None:
        if value is None:
            return None
        return [value.bits, value.group, *([] if value.codebook == "integer" else [value.codebook])]

    match scheme:
        case Plain():
            return {"plain": grid(scheme.grid)}
        case Joint():
            return {
                "joint": [
                    {
                        "atoms": tier.atoms,
                        "dictionary": grid(tier.dictionary),
                        "codes": grid(tier.codes),
                        "pattern": [tier.pattern.kept, tier.pattern.of],
                    }
                    for tier in scheme.tiers
                ]
            }
        case Separate():
            return {
                "separate": {
                    "method": scheme.method,
                    "atoms": scheme.atoms,
                    "pattern": [scheme.pattern.kept, scheme.pattern.of],
                    "dictionary": grid(scheme.dictionary),
                    "codes": grid(scheme.codes),
                    "rounds": scheme.rounds,
                    "paper_exact": scheme.paper_exact,
                }
            }
        case _:
            assert_never(scheme)


def scheme_from_data(data: Mapping[str, Any]) -> Scheme:
    """Read what `scheme_to_data` wrote."""

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
            Tier(tier["atoms"], grid(tier["dictionary"]), grid(tier["codes"]), Pattern(*tier["pattern"]))
            for tier in data["joint"]
        )
    )


def describe(scheme: Scheme) -> str:
    """A few characters for a table: int4/g32, or the atoms and bits of each tier."""
    match scheme:
        case Plain():
            return str(scheme)
        case Joint():
            parts = []
            for tier in scheme.tiers:
                bits = [grid.bits if grid else 32 for grid in (tier.dictionary, tier.codes)]
                sparse = "" if tier.pattern.is_dense else f" {tier.pattern}"
                parts.append(f"{tier.atoms}@{bits[0]}/{bits[1]}{sparse}")
            return "joint " + " ".join(parts)
        case Separate():
            bits = [grid.bits if grid else 32 for grid in (scheme.dictionary, scheme.codes)]
            sparse = "" if scheme.pattern.is_dense else f" {scheme.pattern}"
            return f"{scheme.method} {scheme.atoms}@{bits[0]}/{bits[1]}{sparse}"
        case _:
            assert_never(scheme)
