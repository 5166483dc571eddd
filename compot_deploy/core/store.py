"""Matrices on disk, exactly: the work folder's file of one block, and a lazy mapping over many of them.

Each file has a digest that is checked before it is read, see `compot_deploy.core.work_files`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.core.disk import put_in_place
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.core.work_files import open_tensors, write_tensors


def save_matrices(path: Path, matrices: Mapping[str, Matrix]) -> None:
    """Write matrices to one file, atomically; `load_matrices` returns them bit for bit.

    A dictionary that several matrices share is written once.
    """
    tensors: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}
    for name, matrix in matrices.items():
        layout[name] = _put(name, matrix, tensors)
    write_tensors(path, tensors, {"matrices": json.dumps(layout)})


def load_matrices(path: Path) -> dict[str, Matrix]:
    """Read what `save_matrices` wrote.

    Raises:
        InputError: it is not there any more, or damaged.
    """
    with open_tensors(path) as reader:
        layout = json.loads(reader.metadata()["matrices"])
        return {name: _get(entry, reader) for name, entry in layout.items()}


def write_text(path: Path, text: str) -> None:
    """Write a small text file under a temporary name, then flush and rename it."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class StoredMatrices(Mapping[str, Matrix]):
    """Matrices over several files, in the order given; reads a file when one of its matrices is asked for.

    Keeps only the file read last, so going through the mapping in order holds one block in memory.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: Path | None = None
        self._block: dict[str, Matrix] = {}

    def __getitem__(self, name: str) -> Matrix:
        path = self._files[name]
        if path != self._open:
            self._block, self._open = load_matrices(path), path
        return self._block[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


Value = TypeVar("Value")


class Without(Mapping[str, Value]):
    """A mapping less some keys, still lazy."""

    def __init__(self, values: Mapping[str, Value], without: Set[str]) -> None:
        self._values = values
        self._names = {name: None for name in values if name not in without}  # ordered, and quick to ask

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Instead(Mapping[str, Value]):
    """A mapping with other values for some of its keys, still lazy."""

    def __init__(self, values: Mapping[str, Value], others: Mapping[str, Value]) -> None:
        self._values, self._others = values, others

    def __getitem__(self, name: str) -> Value:
        return self._others[name] if name in self._others and name in self._values else self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _put(name: str, matrix: Matrix, tensors: dict[str, Tensor]) -> dict[str, Any]:
    match matrix:
        case Dense() | Quantized():
            return _put_leaf(name, matrix, tensors)
        case Factorized():
            pairs = []
            for position, pair in enumerate(matrix.pairs):
                pairs.append(
                    {
                        "dictionary": _put_leaf(
                            f"{pair.dictionary_name}|dictionary{position}", pair.dictionary, tensors
                        ),
                        "codes": _put_leaf(f"{name}|codes{position}", pair.codes, tensors),
                        "name": pair.dictionary_name,
                        "pattern": [pair.pattern.kept, pair.pattern.of],
                    }
                )
            return {"kind": "factorized", "pairs": pairs}
        case _:
            assert_never(matrix)


def _put_leaf(key: str, leaf: Leaf, tensors: dict[str, Tensor]) -> dict[str, Any]:
    match leaf:
        case Dense():
            tensors[key] = leaf.weight
            return {"kind": "dense", "key": key}
        case Quantized():
            tensors[f"{key}|integers"], tensors[f"{key}|scales"] = leaf.integers, leaf.scales
            grid = leaf.grid
            stored = {"kind": "quantized", "key": key, "bits": grid.bits, "group": grid.group}
            return stored if grid.codebook == "integer" else {**stored, "codebook": grid.codebook}
        case _:
            assert_never(leaf)


def _get(entry: Mapping[str, Any], reader: Any) -> Matrix:
    if entry["kind"] != "factorized":
        return _get_leaf(entry, reader)
    return Factorized(
        tuple(
            FactorPair(
                dictionary=_get_leaf(pair["dictionary"], reader),
                codes=_get_leaf(pair["codes"], reader),
                dictionary_name=pair["name"],
                pattern=Pattern(*pair["pattern"]),
            )
            for pair in entry["pairs"]
        )
    )


def _get_leaf(entry: Mapping[str, Any], reader: Any) -> Leaf:
    if entry["kind"] == "dense":
        return Dense(reader.get_tensor(entry["key"]))
    return Quantized(
        integers=reader.get_tensor(f"{entry['key']}|integers"),
        scales=reader.get_tensor(f"{entry['key']}|scales"),
        grid=Grid(entry["bits"], entry["group"], entry.get("codebook", "integer")),
    )
