"""The matrices of a model, seen while it runs: which there are, and which read the same input.

Nothing is declared per architecture. A `Products` mode watches the model's own forward pass and notes every product of
an activation with a parameter of a block, however the model spells it: ``nn.Linear``, ``Conv1D``, slices of stacked
experts. Products that read one tensor form an `InputGroup`: they share a Gram, and may share a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compot_deploy.models.experts import routers
from compot_deploy.models.skeleton import ValuesUnknown

WHOLE: Final = ""
"""Path of the one block of a model in which no repeated blocks are found: the model itself."""


@dataclass(frozen=True)
class Site:
    """One matrix that may be compressed: a parameter, or one slice of a stacked one (an expert).

    Attributes:
        parameter: its path, ``model.layers.0.mlp.up_proj.weight``.
        index: number of the slice; None for a matrix of its own.
        inputs: rows of W in ``y = x W``.
        outputs: columns of W.
        transposed: the parameter is kept as (out, in), as ``nn.Linear`` does; ``Conv1D`` keeps (in, out).
    """

    parameter: str
    index: int | None
    inputs: int
    outputs: int
    transposed: bool = True

    @property
    def name(self) -> str:
        """Module path; with the number of the slice where there is one."""
        path = self.parameter.removesuffix(".weight")
        return path if self.index is None else f"{path}.{self.index}"

    @property
    def is_module(self) -> bool:
        """Whether a module holds this matrix and no other one."""
        return self.index is None and self.parameter.endswith(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.inputs, self.outputs


@dataclass(frozen=True)
class InputGroup:
    """Sites that read one tensor.

    Attributes:
        block: path of the block that they belong to.
        sites: in the order in which the model multiplies with them.
    """

    block: str
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """Path of the first site inside the block: unique in it, and the same in every like block."""
        return self.sites[0].name.removeprefix(f"{self.block}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the sites."""
        return tuple(site.name for site in self.sites)


@dataclass(frozen=True)
class Layout:
    """What one forward pass shows of a model.

    Attributes:
        blocks: paths of the repeated blocks, in running order.
        groups: the inputs of all blocks, in running order.
        embedding: path of the token embedding; None for models that read no tokens.
        head: path of the output head; None without one.
        tied: the head multiplies with the embedding.
    """

    blocks: tuple[str, ...]
    groups: tuple[InputGroup, ...]
    embedding: str | None
    head: str | None
    tied: bool

    @property
    def sites(self) -> tuple[Site, ...]:
        """All matrices of all blocks, in running order."""
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(site.name for site in self.sites)

    def of(self, block: str) -> tuple[InputGroup, ...]:
        """The inputs of one block."""
        return tuple(group for group in self.groups if group.block == block)


@dataclass(frozen=True)
class Gram:
    """Second moments of one input; what GPTQ calls the Hessian.

    Attributes:
        matrix: shape (in, in), float64, ``Σ xᵀx``.
        tokens: how many rows x were summed.
    """

    matrix: Float64[Tensor, "inputs inputs"]
    tokens: int


def importance(gram: Float64[Tensor, "inputs inputs"]) -> Float32[Tensor, " inputs"]:
    """Mean square of each input relative to that of all: how much its rounding errors matter.

    The diagonal of the Gram over its mean, which is what llama.cpp calls an importance matrix.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    return (diagonal / mean if mean > 0 else torch.ones_like(diagonal)).float().contiguous()


@dataclass(frozen=True)
class Seen:
    """One product: what was multiplied with what, and what came out where that is kept."""

    site: Site
    values: Tensor
    product: Tensor | None = None


class Products(TorchFunctionMode):
    """Sees every product with a parameter of `module`, and keeps what was multiplied.

    The inputs are kept alive until the mode is dropped, so that no other tensor can take their place in memory.

    Args:
        module: a block.
        path: its path in the model.
        skip: parameters that are no matrices to compress: tables that a head shares.
        keep_products: also keep what comes out.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        skip: Iterable[nn.Parameter] = (),
        *,
        keep_products: bool = False,
    ) -> None:
        super().__init__()
        self._keeps_products = keep_products
        prefix = f"{path}." if path else ""
        left_out = {id(parameter) for parameter in skip}
        self._known = {
            _storage(parameter): (prefix + name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.dim() in (2, 3) and id(parameter) not in left_out
        }
        self.seen: list[Seen] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        seen = None
        if function is nn.functional.linear:
            seen = self._seen(args[0], args[1] if len(args) > 1 else kwargs["weight"], transposed=True)
        elif function is torch.addmm and len(args) > 2:
            seen = self._seen(args[1], args[2], transposed=False)
        result = function(*args, **kwargs)
        if seen is not None:
            self.seen.append(replace(seen, product=result) if self._keeps_products else seen)
        return result

    def _seen(self, values: Tensor, weight: Tensor, *, transposed: bool) -> Seen | None:
        found = self._known.get(_storage(weight))
        if found is None or weight.dim() != 2:
            return None
        name, parameter = found
        index = None
        if parameter.dim() == 3:
            index = weight.storage_offset() // (parameter.shape[1] * parameter.shape[2])
        outputs, inputs = weight.shape if transposed else reversed(weight.shape)
        return Seen(Site(name, index, inputs, outputs, transposed), values)

    def groups(self, block: str) -> list[tuple[InputGroup, Tensor]]:
        """Sites by the tensor that they read, with that tensor; again for every time that a module runs."""
        readers: dict[tuple[int, int, int, int], list[Site]] = {}
        tensors: dict[tuple[int, int, int, int], Tensor] = {}
        for one in self.seen:
            x = one.values
            key = (_storage(x), int(x.storage_offset()), x.numel(), x.shape[-1])
            readers.setdefault(key, []).append(one.site)
            tensors[key] = x
        return [(InputGroup(block, tuple(dict.fromkeys(readers[key]))), tensors[key]) for key in readers]


def real_rows(
    values: Float[Tensor, "*batch inputs"], *masks: Bool[Tensor, "_ _"]
) -> Float[Tensor, "rows inputs"]:
    """The rows of an input that are no padding.

    Args:
        values: what a product reads.
        masks: which tokens of the batch are text, of every tower, no two of one size; rows that do not belong to
            tokens one by one are all kept.
    """
    rows = values.reshape(-1, values.shape[-1])
    for real in masks:
        if len(rows) == real.numel():
            return rows[real.reshape(-1)]
    return rows


def add_gram(sums: dict[str, Gram], name: str, rows: Float[Tensor, "rows inputs"]) -> None:
    """Add the second moments of some rows to those of an input.

    Rows of float32 and less are multiplied in float32, a thousand at a time, and those products summed in float64: the
    rounding of one product does not grow with the text.
    """
    known = sums.get(name)
    inputs = rows.shape[1]
    total = rows.new_zeros(inputs, inputs, dtype=torch.float64) if known is None else known.matrix
    for part in rows.split(MULTIPLIED_AT_ONCE):
        total += _second_moments(part if part.dtype == torch.float64 else part.float())
    sums[name] = Gram(total, len(rows) + (known.tokens if known else 0))


MULTIPLIED_AT_ONCE: Final = 1024
"""Rows of a product in float32, whose sums are in float64."""
_CUT: Final = 256


def _second_moments(rows: Float[Tensor, "rows inputs"]) -> Float[Tensor, "inputs inputs"]:
    """``XᵀX``; what lies below the diagonal is not computed again."""
    product = rows.new_empty(rows.shape[1], rows.shape[1])
    _fill(product, rows, 0, rows.shape[1])
    return product


def _fill(
    product: Float[Tensor, "inputs inputs"], rows: Float[Tensor, "rows inputs"], start: int, stop: int
) -> None:
    """A square on the diagonal. No closure that calls itself: it would keep all rows until cycles are collected."""
    if stop - start <= _CUT:
        part = rows[:, start:stop]
        product[start:stop, start:stop] = part.T @ part
        return
    middle = (start + stop) // 2
    _fill(product, rows, start, middle)
    _fill(product, rows, middle, stop)
    across = rows[:, start:middle].T @ rows[:, middle:stop]
    product[start:middle, middle:stop] = across
    product[middle:stop, start:middle] = across.T


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks of a transformers model; blocks inside of blocks are left out."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(
            path.startswith(f"{f}.") for f in found
        ):
            found.append(path)
    return tuple(found)


def tables_of(model: Any) -> tuple[str | None, str | None, bool]:
    """Paths of the token embedding and of the output head, and whether they are one table."""
    paths = {id(module): path for path, module in model.named_modules()}
    table = _asked(model, "get_input_embeddings")
    head = _asked(model, "get_output_embeddings")
    embedding = paths.get(id(table)) if isinstance(table, nn.Embedding) else None
    found = paths.get(id(head)) if head is not None else None
    tied = embedding is not None and found is not None and head.weight is table.weight
    return _first_name(model, table) or embedding, found, tied


def _first_name(model: Any, table: Any) -> str | None:
    """Of the embeddings that look one table up, the first: checkpoints store it under that name."""
    if not isinstance(table, nn.Embedding) or table._parameters.get("weight") is None:
        return None
    own = table._parameters["weight"]
    return next(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module._parameters.get("weight") is own
    )


def _asked(model: Any, question: str) -> Any:
    try:
        return getattr(model, question)()
    except (AttributeError, NotImplementedError):
        return None


def discover(model: nn.Module, batch: Any) -> Layout:
    """Run a model once and note its blocks and the inputs of their matrices.

    Args:
        model: best on torch's device ``meta``: nothing is computed then, and no weights are needed.
        batch: arguments of its forward pass.
    """
    blocks = blocks_of(model)
    embedding, head, tied = tables_of(model)
    skip = [
        parameter
        for path in (embedding, head)
        if path is not None
        for parameter in model.get_submodule(path).parameters(recurse=False)
    ]
    skip += [model.get_parameter(f"{path}.weight") for path in routers(model)]
    running: list[str] = []
    groups: list[InputGroup] = []

    def watched(path: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            mode = Products(model.get_submodule(path), path, skip)
            with mode:
                result = forward(*args, **kwargs)
            running.append(path)
            groups.extend(group for group, _ in mode.groups(path))
            return result

        return run

    def once(paths: Sequence[str]) -> None:
        own = {path: model.get_submodule(path).forward for path in paths}
        for path, forward in own.items():
            model.get_submodule(path).forward = watched(path, forward)
        try:
            with ValuesUnknown(), torch.no_grad():
                model(**batch)
        finally:
            for path in own:
                del model.get_submodule(path).forward  # the one of its class again

    once(blocks or (WHOLE,))
    if len(set(running)) != len(running):  # blocks that share their weights with each other
        running.clear()
        groups.clear()
        once((WHOLE,))
    return Layout(tuple(running), tuple(_merged(groups)), embedding, head, tied)


def _merged(groups: Iterable[InputGroup]) -> list[InputGroup]:
    """Groups of which no two hold the same site: one that is read twice belongs where it was first."""
    taken: set[str] = set()
    merged = []
    for group in groups:
        sites = tuple(site for site in group.sites if site.name not in taken)
        taken.update(site.name for site in sites)
        if sites:
            merged.append(InputGroup(group.block, sites))
    return merged


def _storage(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor; also of one on the device ``meta``, which has no address."""
    return int(tensor.untyped_storage()._cdata)
