"""Models of any kind as they are handed to exporters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_models
from reference_onnx import rounded, two_pairs
from torch import Tensor, nn

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.core.store import Without
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.models.source import ModelSource, open_source


def source_of(kind: str, folder: Path, **changes: Any) -> ModelSource:
    """A model folder with a tokenizer, opened."""
    return open_source(any_models.save(folder, kind, **changes))


def some_of_everything(source: ModelSource) -> Callable[[str, Tensor], Matrix]:
    """Pairs, pairs that share a dictionary, plain integers and floats, int8 tables."""
    shared: dict[str, Factorized] = {}
    first = {name: group.sites[0].name for group in source.layout.groups for name in group.names}
    order = {group.sites[0].name: number for number, group in enumerate(source.layout.groups)}

    def scheme(name: str, weight: Tensor) -> Matrix:
        if name not in first:
            return rounded(weight, Grid(8, 32))
        group = order[first[name]] % 4
        if group == 0:
            made = two_pairs(name, weight, first[name])
            pairs = zip(shared.setdefault(first[name], made).pairs, made.pairs, strict=True)
            return Factorized(
                tuple(
                    FactorPair(one.dictionary, own.codes, own.dictionary_name, own.pattern)
                    for one, own in pairs
                )
            )
        if group == 3:
            return Dense(weight)
        return rounded(weight, Grid(8 if group == 1 else 4, 32))

    return scheme


def stand_in(matrix: Matrix) -> Matrix:
    """A matrix of the same shapes and grids without values."""
    if isinstance(matrix, Factorized):
        pairs = [(_stand_in(pair.dictionary), _stand_in(pair.codes), pair) for pair in matrix.pairs]
        return Factorized(tuple(FactorPair(d, c, pair.dictionary_name, pair.pattern) for d, c, pair in pairs))
    return _stand_in(matrix)


def _stand_in(leaf: Leaf) -> Leaf:
    if isinstance(leaf, Quantized):
        return Quantized(leaf.integers.to("meta"), leaf.scales.to("meta"), leaf.grid)
    return Dense(leaf.weight.to("meta"))


def compressed(
    source: ModelSource, scheme: Callable[[str, Tensor], Matrix] | None = None, *, outside: bool = True
) -> CompressedModel:
    """A source as it is handed to an exporter.

    Args:
        source: the model.
        scheme: (name, weight (in, out)) to a matrix; None leaves everything dense.
        outside: linears outside of the blocks are matrices; otherwise tensors, as in a dry run.
    """
    layout = source.layout
    tables = [name for name in (layout.embedding, None if layout.tied else layout.head) if name is not None]
    names = [*layout.names, *tables]
    matrices: dict[str, Matrix] = {}
    for name in names:
        weight = source.weight(name).float().contiguous()
        matrices[name] = scheme(name, weight) if scheme else Dense(weight)
    others = [
        name
        for name, module in source.meta.named_modules()
        if outside and isinstance(module, nn.Linear) and name not in (*names, layout.head)
    ]
    matrices |= {name: Dense(source.weight(name).float().contiguous()) for name in others}
    written = {f"{name}.weight" for name in (*matrices, layout.head) if name is not None}
    return CompressedModel(
        architecture=source.architecture,
        config=source.config,
        matrices=matrices,
        tensors=Without(source.tensors, written),
        tied=layout.tied,
        source=str(source.folder),
        tables=Tables(layout.embedding, layout.head),
        outside=frozenset(others),
    )
