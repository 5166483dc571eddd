"""The slow, obvious versions that the GGUF exporter and the llama.cpp kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import open_source


def random_quantized(
    inputs: int, outputs: int, grid: Grid, pattern: Pattern = DENSE, seed: int = 0, extreme: bool = False
) -> Quantized:
    """Integers over the whole grid, at most `pattern.kept` non-zeros in each group of `pattern.of` rows."""
    rng = np.random.default_rng(seed)
    integers = rng.integers(grid.lowest, grid.highest + 1, (inputs, outputs)).astype(np.int8)
    if extreme:
        integers = np.where(rng.random(integers.shape) < 0.5, grid.lowest, grid.highest).astype(np.int8)
    if not pattern.is_dense:
        for column in range(outputs):
            for start in range(0, inputs, pattern.of):
                width = min(pattern.of, inputs - start)
                dropped = rng.permutation(width)[: max(0, width - int(rng.integers(0, pattern.kept + 1)))]
                integers[start + dropped, column] = 0
    scales = (rng.random((grid.groups(inputs), outputs)) * 0.02 + 0.001).astype(np.float16)
    return Quantized(torch.from_numpy(integers), torch.from_numpy(scales), grid)


def rounded_activations(x: np.ndarray) -> np.ndarray:
    """Activations as the kernels see them: int8 per 64 inputs, nearest even, times the float32 scale."""
    tokens, inputs = x.shape
    result = np.zeros((tokens, inputs), np.float64)
    for t in range(tokens):
        for start in range(0, inputs, 64):
            part = x[t, start : start + 64].astype(np.float32)
            peak = np.abs(part).max()
            if peak < np.float32(1e-30):
                continue
            integers = np.rint(part * (np.float32(127) / peak))
            result[t, start : start + 64] = integers.astype(np.float64) * float(peak / np.float32(127))
    return result


def product(leaf: Quantized, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``x @ leaf`` with rounded activations in float64, and the sum of the absolute terms, for tolerances."""
    seen = rounded_activations(x)
    weight = leaf.dequantize().double().numpy()
    return seen @ weight, np.abs(seen) @ np.abs(weight)


def quantized_by_rounding(weight: torch.Tensor, grid: Grid) -> Quantized:
    """Round to nearest, scale from the largest magnitude of each group; slow loops, no cleverness."""
    inputs, outputs = weight.shape
    integers = torch.zeros(inputs, outputs, dtype=torch.int8)
    scales = torch.zeros(grid.groups(inputs), outputs, dtype=torch.float16)
    for group in range(grid.groups(inputs)):
        rows = slice(group * grid.group, min((group + 1) * grid.group, inputs))
        scale = (weight[rows].abs().amax(dim=0) / (2 ** (grid.bits - 1) - 0.5)).to(torch.float16)
        scales[group] = scale
        safe = torch.where(scale > 0, scale.float(), torch.ones(()))
        integers[rows] = (weight[rows] / safe).round().clamp(grid.lowest, grid.highest).to(torch.int8)
    return Quantized(integers, scales, grid)


def factorized_by_svd(
    weight: torch.Tensor, atoms: int, name: str, grid: Grid, pattern: Pattern = DENSE, head: int = 0
) -> Factorized:
    """A truncated SVD with quantized factors: not accurate, but a legal factorized matrix.

    With `head`, the strongest atoms become a second pair of 8 bits.
    """
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    codes = (s[:, None] * vt).float()
    first = head
    dictionary, rest = u[:, first : first + atoms].float(), codes[first : first + atoms]
    if not pattern.is_dense:
        rest = rest.clone()
        for start in range(0, len(rest), pattern.of):
            block = rest[start : start + pattern.of]
            keep = min(pattern.kept, len(block))
            weakest = block.abs().argsort(dim=0)[: len(block) - keep]
            block.scatter_(0, weakest, 0.0)
    pairs = [
        FactorPair(quantized_by_rounding(dictionary, grid), quantized_by_rounding(rest, grid), name, pattern),
    ]
    if head:
        wide = Grid(8, grid.group)
        pairs.append(
            FactorPair(
                quantized_by_rounding(u[:, :head].float(), wide),
                quantized_by_rounding(codes[:head], wide),
                f"{name}.head",
            )
        )
    return Factorized(tuple(pairs))


def compressed(
    folder: Path, change: Callable[[str, torch.Tensor], Matrix] | None = None, table: Grid | None = None
) -> CompressedModel:
    """A model folder with every linear passed through `change`; None keeps it in float32."""
    checkpoint = open_source(folder)
    architecture = checkpoint.architecture
    assert architecture is not None
    matrices: dict[str, Matrix] = {}
    tables = [architecture.embedding] + ([] if checkpoint.tied else [architecture.head])
    for name in (*architecture.linear_names(checkpoint.layers), *tables):
        weight = checkpoint.weight(name).float()
        if name in tables:
            matrices[name] = quantized_by_rounding(weight, table) if table else Dense(weight)
        else:
            matrices[name] = change(name, weight) if change else Dense(weight)
    taken = {f"{name}.weight" for name in matrices} | {f"{architecture.head}.weight"}
    tensors = {name: checkpoint.tensors[name].float() for name in checkpoint.tensors if name not in taken}
    return CompressedModel(
        architecture, checkpoint.config, matrices, tensors, checkpoint.tied, str(checkpoint.folder)
    )


def shared_change(
    grid: Grid, pattern: Pattern, fraction: float, head: int = 0, round_to: int = 1
) -> Callable[[str, torch.Tensor], Matrix]:
    """Factorize every linear; q, k and v of a block, and gate and up, get one dictionary as `concatenated` makes it."""
    kept: dict[str, list[tuple[Quantized, torch.Tensor]]] = {}

    def change(name: str, weight: torch.Tensor) -> Matrix:
        block, _, path = name.rpartition(".")
        first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(path, path)
        owner = f"{block}.{first}"
        atoms = max(round_to, int(min(weight.shape) * fraction) // round_to * round_to)
        if owner == name:
            made = factorized_by_svd(weight, atoms, owner, grid, pattern, head)
            kept[owner] = [(p.dictionary, p.dictionary.dequantize()) for p in made.pairs]  # type: ignore[misc]
            return made
        pairs = []
        for position, (dictionary, values) in enumerate(kept[owner]):
            codes = torch.linalg.lstsq(values.double(), weight.double()).solution.float()
            here = pattern if position == 0 else DENSE
            if not here.is_dense:
                for start in range(0, len(codes), here.of):
                    block_codes = codes[start : start + here.of]
                    count = max(0, len(block_codes) - here.kept)
                    block_codes.scatter_(0, block_codes.abs().argsort(dim=0)[:count], 0.0)
            bits = grid if position == 0 else Grid(8, grid.group)
            label = owner if position == 0 else f"{owner}.head"
            pairs.append(FactorPair(dictionary, quantized_by_rounding(codes, bits), label, here))
        return Factorized(tuple(pairs))

    return change


def torch_model(folder: Path, model: CompressedModel) -> Any:
    """transformers' model of a folder with the dequantized matrices of `model` put in."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    state = made.state_dict()
    for name, matrix in model.matrices.items():
        state[f"{name}.weight"].copy_(matrix.dequantize().T)
    return made
