"""Modules that stand in a model for its matrices: placeholders to trace, products to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast, get_args

import torch
from torch import Tensor, nn

from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.errors import InputError

PLACEHOLDER_DOMAIN: Final = "compot"
"""Of the placeholders; nothing of it is left in a finished graph."""


class Placeholder(nn.Module):
    """Stands where a matrix belongs, and leaves a node with its name in the graph."""

    def __init__(
        self, operator: str, matrix: str, outputs: int, bias: Tensor | None = None, table: str = ""
    ) -> None:
        super().__init__()
        self.operator, self.outputs, self.bias = operator, outputs, bias
        self.facts: dict[str, Any] = {"matrix": matrix, "table": table}
        # Some models ask a linear for the type of its weight. Nothing can be computed with this one.
        self.weight = torch.empty(0)

    def forward(self, values: Tensor) -> Tensor:
        """The output of a node that computes nothing yet."""
        embeds = self.operator == "Embedding"
        sizes = (*values.shape, self.outputs) if embeds else (*values.shape[:-1], self.outputs)
        value = torch.onnx.ops.symbolic(
            f"{PLACEHOLDER_DOMAIN}::{self.operator}",
            (values,),
            self.facts,
            dtype=torch.float32,
            shape=sizes,
            version=1,
        )
        return value if self.bias is None else value + self.bias


class Product(nn.Module):
    """A linear that multiplies with what a matrix stands for: the reference for a file."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, values: Tensor) -> Tensor:
        """``values @ weight + bias``."""
        value = values @ self.weight
        return value if self.bias is None else value + self.bias


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """`model` with other modules at some paths; afterwards it is as it was."""
    originals = {path: model.get_submodule(path) for path in modules}

    def place(chosen: Mapping[str, nn.Module]) -> None:
        for path, module in chosen.items():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)

    try:
        place(modules)
        yield
    finally:
        place(originals)


@dataclass(frozen=True)
class EmbeddingTables:
    """Where the token embedding is, and the head that reads the same table; None where there is none."""

    embedding: str | None
    tied_head: str | None


def embedding_tables(model: nn.Module) -> EmbeddingTables:
    """Where the token embedding of a model is, and whether its head is tied to it."""
    get_input, get_output = (
        getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output")
    )
    table, head = get_input(), get_output()
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = paths.get(id(table)) if isinstance(table, nn.Embedding) else None
    if not isinstance(table, nn.Embedding) or head is None:
        return EmbeddingTables(embedding, None)
    same = getattr(head, "weight", None) is table.weight
    return EmbeddingTables(embedding, paths.get(id(head)) if same else None)


def matrices_of(model: nn.Module, matrices: Mapping[str, Matrix] | None = None) -> dict[str, Matrix]:
    """Every matrix that will be written, by module path and in the model's order.

    Args:
        model: its factorised modules (those with an attribute ``matrix``) are taken as they are.
        matrices: more of them, or others in their place; (in, out), the token embedding (hidden, vocabulary).

    Raises:
        InputError: a name that is no module of the model, or a matrix of another shape than the module.
    """
    given = dict(matrices or {})
    tables = embedding_tables(model)
    found: dict[str, Matrix] = {}
    for path, module in model.named_modules():
        matrix = given.pop(path, None)
        expected = None if matrix is None else _shape(module)
        if matrix is None:
            matrix = matrix_of_module(module, path)
        if matrix is None and path == tables.embedding and tables.tied_head is not None:
            matrix = Dense(module.weight.detach().T)  # so that the table that both use is stored once
        if matrix is None:
            continue
        if expected is not None and matrix.shape != expected:
            raise InputError(f"{path}: the matrix is {matrix.shape}, and the model has {expected} there.")
        found[path] = matrix
    if given:
        raise InputError(f"{type(model).__name__} has no module {next(iter(given))}.")
    return found


def matrix_of_module(module: nn.Module, path: str) -> Matrix | None:
    """The matrix of a compressed module; None for any other module.

    Args:
        module: with a method ``matrix_of(dictionary_name)`` or an attribute ``matrix``.
        path: of the module, which names a dictionary that is not shared.
    """
    reader = getattr(module, "matrix_of", None)
    if callable(reader):
        return reader(path)
    own = getattr(module, "matrix", None)
    return own if isinstance(own, get_args(Matrix)) else None


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear, (hidden, vocabulary) of an embedding; None where it cannot be told."""
    if not isinstance(module, nn.Linear | nn.Embedding) and type(module).__name__ != "Conv1D":
        return None
    rows, columns = cast(Tensor, module.weight).shape
    # Conv1D of transformers keeps (in, out); nn.Linear and nn.Embedding the transpose.
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


@contextmanager
def dequantized(model: nn.Module, matrices: Mapping[str, Matrix]) -> Iterator[nn.Module]:
    """`model` with every matrix as what it stands for, in float32: the reference that a file is held against."""
    tables = embedding_tables(model)
    modules: dict[str, nn.Module] = {}
    for path, matrix in matrices.items():
        weight = matrix.dequantize()
        if path != tables.embedding:
            modules[path] = Product(weight, getattr(model.get_submodule(path), "bias", None))
            continue
        original = model.get_submodule(path)
        modules[path] = nn.Embedding.from_pretrained(
            weight.T.contiguous(), padding_idx=getattr(original, "padding_idx", None)
        )
        if tables.tied_head is not None and tables.tied_head not in matrices:
            head = model.get_submodule(tables.tied_head)
            modules[tables.tied_head] = Product(weight, getattr(head, "bias", None))
    with replaced(model, modules):
        yield model
