"""What a manifest tells a report: every matrix, bytes in memory, the frontier of a plan, and the origin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from compot_deploy.core.grid import DENSE, Codebook, Grid, Pattern
from compot_deploy.core.storage import InMemory, Storage
from compot_deploy.errors import InputError
from compot_deploy.exporters.manifest import LeafRecord, Manifest, MatrixRecord
from compot_deploy.recipe import DEFAULT_GROUP
from compot_deploy.report.facts import Frontier, FrontierPoint, LayerFigures, Origin

_BLOCK: Final = re.compile(r"(?:^|\.)(\d+)\.")

_TOWERS: Final = ("encoder", "decoder")


def layers_of(manifest: Manifest) -> tuple[LayerFigures, ...]:
    """One entry per matrix: scheme, bytes, bits, and the errors that the run recorded.

    Raises:
        InputError: the manifest's metadata is not what a run records.
    """
    metadata = manifest.metadata
    errors = {
        _text(entry, "name"): entry for entry in _list(metadata.get("linears") or [], "facts.linears", dict)
    }
    sensitivities = metadata.get("effects") or {}
    if not isinstance(sensitivities, Mapping):
        raise _wrong("facts.effects", "an object")
    shared = _bits_of_groups(manifest.matrices)
    layers = []
    numbered = [record.name for record in manifest.matrices if place(record.name)[0] is not None]
    two_towers = {_tower(name) for name in numbered} == set(_TOWERS)
    for record in manifest.matrices:
        block, role = place(record.name)
        if two_towers and block is not None:  # both count their blocks from 0
            role = f"{_tower(record.name)}.{role}"
        error = errors.get(record.name, {})
        layers.append(
            LayerFigures(
                name=record.name,
                block=block,
                role=role,
                kind=record.kind,
                choice=describe_choice(record),
                inputs=record.inputs,
                outputs=record.outputs,
                bytes=record.bytes,
                plain_int4_bytes=record.plain_int4_bytes,
                bits=shared[record.name],
                error=_number(error.get("error"), f"the error of {record.name}"),
                # A matrix that stays plain was never factorized, so there is nothing before quantization.
                unquantized_error=_number(
                    error.get("unquantized_error"), f"the unquantized error of {record.name}"
                )
                if record.kind == "factorized"
                else None,
                sensitivity=_number(sensitivities.get(record.name), f"the sensitivity of {record.name}"),
                reason=record.why_dense or "",
            )
        )
    return tuple(layers)


def place(name: str) -> tuple[int | None, str]:
    """Block and role of a module path: ``model.layers.3.mlp.up_proj`` is (3, ``mlp.up_proj``)."""
    match = _BLOCK.search(name)
    return (None, name) if match is None else (int(match[1]), name[match.end() :])


def _tower(name: str) -> str | None:
    """Whether a path leads into an encoder or a decoder."""
    return next((part for part in name.split(".") if part in _TOWERS), None)


def describe_choice(record: MatrixRecord) -> str:
    """The scheme of a matrix in words: ``int4/g32``, ``k 96, s 48: int4·int4``."""
    if record.plain is not None:
        return _leaf(record.plain)
    parts = []
    for pair in record.pairs:
        kept = "" if pair.pattern == "dense" else f", {pair.pattern}"
        parts.append(f"k {pair.atoms}{kept}: {_leaf(pair.dictionary)} · {_leaf(pair.codes)}")
    return " + ".join(parts)


def memory_of(manifest: Manifest, storage: Storage) -> int:
    """Bytes of all matrices once they are loaded; a shared dictionary counts once."""
    loaded = InMemory(storage)
    seen: set[tuple[str, int]] = set()
    total = 0
    for record in manifest.matrices:
        if record.plain is not None:
            total += _loaded(record.plain, DENSE, loaded)
        for position, pair in enumerate(record.pairs):
            if (pair.dictionary_name, position) not in seen:
                seen.add((pair.dictionary_name, position))
                total += _loaded(pair.dictionary, DENSE, loaded)
            total += _loaded(pair.codes, Pattern.of_text(pair.pattern), loaded)
    return total


def plain_memory_of(manifest: Manifest, storage: Storage, linears: Iterable[MatrixRecord], bits: int) -> int:
    """The same with every linear plain at `bits`, the rest as in the artifact."""
    loaded, names = InMemory(storage), {record.name for record in linears}
    grid = Grid(bits, DEFAULT_GROUP)
    return sum(
        loaded.leaf_bytes(record.inputs, record.outputs, grid)
        if record.name in names or record.plain is None
        else _loaded(record.plain, DENSE, loaded)
        for record in manifest.matrices
    )


def frontier_of(manifest: Manifest) -> Frontier | None:
    """What the plan could have chosen; None where nothing was planned.

    Raises:
        InputError: the manifest's metadata is not what a run records.
    """
    value = manifest.metadata.get("frontier")
    if value is None:
        return None
    try:
        return Frontier(
            counts=str(value["counts"]),
            budget=int(value["budget"]),
            weights=int(value["weights"]),
            chosen=FrontierPoint(**value["chosen"]),
            all_schemes=tuple(FrontierPoint(**point) for point in value["all_forms"]),
            plain=tuple(FrontierPoint(**point) for point in value["plain"]),
        )
    except (TypeError, KeyError, ValueError):
        raise _wrong("facts.frontier", "a frontier") from None


def origin_of(manifest: Manifest) -> Origin:
    """Calibration and provenance."""
    metadata = manifest.metadata
    return Origin(
        source=_optional(metadata.get("source"), str),
        calibration=_optional(metadata.get("calibration"), str),
        calibration_digest=manifest.calibration,
        calibration_windows=_optional(metadata.get("calibration_windows"), int),
        calibration_tokens=_optional(metadata.get("calibration_tokens"), int),
        seed=manifest.seed,
    )


def _bits_of_groups(records: Sequence[MatrixRecord]) -> dict[str, float]:
    """Bits per weight of each matrix; of all together where they share a dictionary."""
    groups: dict[str, list[MatrixRecord]] = {}
    for record in records:
        key = record.pairs[0].dictionary_name if record.pairs else record.name
        groups.setdefault(key, []).append(record)
    return {
        record.name: sum(one.bytes for one in members) * 8 / sum(one.inputs * one.outputs for one in members)
        for members in groups.values()
        for record in members
    }


def _leaf(leaf: LeafRecord) -> str:
    grid = _grid(leaf)
    return f"float{leaf.bits}" if grid is None else str(grid)


def _loaded(leaf: LeafRecord, pattern: Pattern, storage: Storage) -> int:
    return storage.leaf_bytes(leaf.inputs, leaf.outputs, _grid(leaf), pattern)


def _grid(leaf: LeafRecord) -> Grid | None:
    if leaf.group is None:
        return None
    return Grid(leaf.bits, leaf.group, cast(Codebook, leaf.codebook))


def _list(value: Any, where: str, of: type) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(entry, of) for entry in value):
        raise _wrong(where, "a list of objects")
    return value


def _text(entry: Mapping[str, Any], key: str) -> str:
    if not isinstance(entry.get(key), str):
        raise _wrong(f"facts.linears: {key}", "a text")
    return str(entry[key])


def _number(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(what, "a number")
    return float(value)


def _optional(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None


def _wrong(where: str, wanted: str) -> InputError:
    return InputError(f"The manifest is damaged: {where} is not {wanted}. Export the model again.")
