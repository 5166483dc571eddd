"""Wrong numbers and graphs that compute something else, everything signed anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from enemy import (
    BLOCK,
    GRAPH,
    edit_constants,
    rewrite,
    scaled,
    shuffled,
    spoil,
    with_matrices,
    with_rows,
)
from signing import sign_again
from torch import Tensor

from compot_deploy.core.matrix import Matrix, Quantized
from compot_deploy.models.compressed import CompressedModel

# --- wrong numbers, everything signed anew


@spoil("all weights are zero", own_limits=True)
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, matrix: scaled(matrix, 0.0)))


@spoil("the embedding is zero")
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, m: scaled(m, 0.0) if "embed" in name else m))


@spoil("every row of the embedding is the same", own_limits=True)
def _(folder: Path) -> None:
    rewrite(
        folder,
        with_matrices(lambda name, m: with_rows(m, torch.zeros(m.shape[1]).long()) if "embed" in name else m),
    )


@spoil("the rows of the embedding have changed places")
def _(folder: Path) -> None:
    rewrite(
        folder, with_matrices(lambda name, m: with_rows(m, shuffled(m.shape[1])) if "embed" in name else m)
    )


@spoil("two matrices of equal shape have changed places")
def _(folder: Path) -> None:
    first, second = "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"

    def swap(model: CompressedModel) -> CompressedModel:
        held = dict(model.matrices)
        return replace(model, matrices={**held, first: held[second], second: held[first]})

    rewrite(folder, swap)


@spoil("gate and up of every block have changed places")
def _(folder: Path) -> None:
    def swap(model: CompressedModel) -> CompressedModel:
        held = dict(model.matrices)
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return replace(
            model,
            matrices={
                name: held[name.rpartition(".")[0] + "." + other.get(name.rpartition(".")[2], "")]
                if name.rpartition(".")[2] in other
                else matrix
                for name, matrix in held.items()
            },
        )

    rewrite(folder, swap)


@spoil("two blocks have changed places")
def _(folder: Path) -> None:
    def other(name: str) -> str:
        for one, two in ((0, 3), (3, 0)):
            if name.startswith(BLOCK.format(one)):
                return BLOCK.format(two) + name.removeprefix(BLOCK.format(one))
        return name

    rewrite(
        folder,
        lambda model: replace(
            model,
            matrices={name: model.matrices[other(name)] for name in model.matrices},
            tensors={name: model.tensors[other(name)] for name in model.tensors},
        ),
    )


@spoil("a matrix is eight times as large")
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, m: scaled(m, 8.0) if name.endswith("0.mlp.down_proj") else m))


@spoil("the signs of all output projections are turned")
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, m: scaled(m, -1.0) if name.endswith("o_proj") else m))


@spoil("the outputs of one matrix have changed places")
def _(folder: Path) -> None:
    rewrite(
        folder,
        with_matrices(
            lambda name, m: with_rows(m, shuffled(m.shape[1])) if name.endswith("3.mlp.down_proj") else m
        ),
    )


@spoil("square matrices lie transposed")
def _(folder: Path) -> None:
    def transposed(name: str, matrix: Matrix) -> Matrix:
        if not isinstance(matrix, Quantized) or matrix.shape[0] != matrix.shape[1]:
            return matrix
        from compot_deploy.quant import rtn

        return rtn(matrix.dequantize().T.contiguous(), None, matrix.grid)

    rewrite(folder, with_matrices(transposed))


@spoil("one block is noise")
def _(folder: Path) -> None:
    def noise(name: str, matrix: Matrix) -> Matrix:
        if not isinstance(matrix, Quantized) or not name.startswith(BLOCK.format(1)):
            return matrix
        generator = torch.Generator().manual_seed(0)
        integers = torch.randint(-128, 128, matrix.shape, dtype=torch.int8, generator=generator)
        return Quantized(integers, matrix.scales, matrix.grid)

    rewrite(folder, with_matrices(noise))


@spoil("a norm is zero")
def _(folder: Path) -> None:
    rewrite(folder, lambda model: replace(model, tensors=_tensors(model, "layers.0.input", lambda v: 0 * v)))


@spoil("the last norm is zero: the logits are constant", own_limits=True)
def _(folder: Path) -> None:
    rewrite(folder, lambda model: replace(model, tensors=_tensors(model, "model.norm", lambda v: 0 * v)))


@spoil("a norm holds NaN")
def _(folder: Path) -> None:
    rewrite(
        folder,
        lambda model: replace(model, tensors=_tensors(model, "layers.2.post", lambda v: v + float("nan"))),
    )


@spoil("a scale is infinite")
def _(folder: Path) -> None:
    def infinite(name: str, matrix: Matrix) -> Matrix:
        assert isinstance(matrix, Quantized)
        if not name.endswith("1.self_attn.q_proj"):
            return matrix
        scales = matrix.scales.clone()
        scales[0, 0] = float("inf")
        return Quantized(matrix.integers, scales, matrix.grid)

    rewrite(folder, with_matrices(infinite))


def _tensors(model: CompressedModel, part: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(value) if part in name else value for name, value in model.tensors.items()}


# --- a graph that computes something else


@spoil("rotations are wrong behind position 300, where no window reaches")
def _(folder: Path) -> None:
    def wrong(values: Tensor) -> Tensor:
        values[300:] = values[300:].flip(-1)
        return values

    edit_constants(folder, ("rotary.cosine", "rotary.sine"), wrong)


@spoil("rotations are NaN behind position 400")
def _(folder: Path) -> None:
    def wrong(values: Tensor) -> Tensor:
        values[400:] = float("nan")
        return values

    edit_constants(folder, ("rotary.cosine",), wrong)


@spoil("no position is rotated")
def _(folder: Path) -> None:
    edit_constants(folder, ("rotary.sine",), lambda values: 0 * values)


@spoil("attention is six times as sharp")
def _(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [attribute for attribute in node.attribute if attribute.name != "scale"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("scale", 1.0)])
    (folder / GRAPH).write_bytes(model.SerializeToString())
    sign_again(folder)


@spoil("a block of the graph reads the weights of another")
def _(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.name == "/model/layers.1/mlp/down_proj/MatMul"]
    node.input[1] = "model.layers.2.mlp.down_proj.weight.integers"
    (folder / GRAPH).write_bytes(model.SerializeToString())
    sign_again(folder)
