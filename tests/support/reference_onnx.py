"""Slow, obvious versions of what the ONNX exporter does, to test against."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.exporters.onnx.shape import portable_config
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.configuration import config_of
from compot_deploy.models.hints import find_architecture
from compot_deploy.models.source import ModelSource, open_source


def reference_nbits_bytes(matrix: Quantized) -> list[list[bytes]]:
    """The MatMulNBits bytes, bit by bit: one number per block, code j shifted by j·bits."""
    rows, outputs = matrix.shape
    bits, group = matrix.grid.bits, matrix.grid.group
    result = []
    for output in range(outputs):
        blocks = []
        for start in range(0, rows, group):
            number = 0
            for j in range(group):
                integer = int(matrix.integers[start + j, output]) if start + j < rows else 0
                number += (integer + 2 ** (bits - 1)) << (j * bits)
            blocks.append(number.to_bytes(group * bits // 8, "little"))
        result.append(blocks)
    return result


def reference_blocked_bytes(matrix: Quantized) -> bytes:
    """The DequantizeLinear bytes: signed integers row by row, one number for all of them."""
    bits = matrix.grid.bits
    number = 0
    for j, integer in enumerate(matrix.integers.flatten().tolist()):
        number += (integer % 2**bits) << (j * bits)
    return number.to_bytes(-(-matrix.integers.numel() * bits // 8), "little")


# --- models to export, and the slow way to run them --------------------------------------------------

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0},
    "llama-llama3-tied": {
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "llama-yarn": {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": YARN},
    "llama-linear": {
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama-dynamic": {
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "llama-biases": {
        "model_type": "llama",
        "rope_theta": 10000.0,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
    },
    "mistral": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 5},
    "qwen2-tied": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "llama-small-heads": {
        "model_type": "llama",
        "rope_theta": 10000.0,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 32},
}
"""Configurations of small decoders, one for each thing that a graph can get wrong."""


def torch_model(settings: Mapping[str, Any]) -> Any:
    """A randomly initialized transformers model in float32; norms and biases random too, so they matter.

    The same settings give the same object: never change it.
    """
    return _torch_model(json.dumps({**_SIZES, **settings}))


@functools.cache
def _torch_model(settings: str) -> Any:
    torch.manual_seed(0)
    values = portable_config(json.loads(settings))
    model_type = values.pop("model_type")
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise + (0.0 if name.endswith("bias") else 1.0))
    return model


def source_of(settings: Mapping[str, Any], folder: Path) -> ModelSource:
    """The model of `torch_model` as it is found on disk, without a tokenizer."""
    torch_model(settings).save_pretrained(folder)
    return open_source(folder)


def compressed(
    model: Any, scheme: Callable[[str, Tensor], Matrix] | None = None, source: Path | None = None
) -> CompressedModel:
    """The model as it would be handed to an exporter.

    Args:
        model: of transformers.
        scheme: (module path, weight (in, out)) to a matrix; None leaves everything dense.
        source: folder with tokenizer files.
    """
    config = config_of(model.config)
    architecture = find_architecture(config)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tied = bool(config["tie_word_embeddings"])
    names = [architecture.embedding, *architecture.linear_names(config["num_hidden_layers"])]
    names += [] if tied else [architecture.head]
    matrices = {}
    for name in names:
        weight = state.pop(f"{name}.weight").T.contiguous()
        matrices[name] = scheme(name, weight) if scheme else Dense(weight)
    state.pop("lm_head.weight", None)
    return CompressedModel(
        architecture=architecture,
        config=config,
        matrices=matrices,
        tensors=state,
        tied=tied,
        source=str(source) if source else "",
    )


def with_matrices(model: Any, matrices: Mapping[str, Matrix]) -> Any:
    """A copy of the model whose weights are the matrices multiplied out: what any runtime should compute."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, matrix in matrices.items():
            other.get_submodule(name).weight.copy_(matrix.dequantize().T)
    return other


def rounded(weight: Tensor, grid: Grid) -> Quantized:
    """Round to nearest, the largest magnitude of each group at the end of the grid."""
    rows, columns = weight.shape
    groups = grid.groups(rows)
    padded = torch.zeros(groups * grid.group, columns)
    padded[:rows] = weight
    blocks = padded.view(groups, grid.group, columns)
    scales = (blocks.abs().amax(dim=1) / max(grid.highest, 1)).half()
    steps = torch.where(scales == 0, 1.0, scales.float())[:, None]
    integers = (blocks / steps).round().clamp(grid.lowest, grid.highest).to(torch.int8)
    return Quantized(integers.view(-1, columns)[:rows].contiguous(), scales, grid)


def projected(weight: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    """A random dictionary and the codes that project on it: a factorization, if not a good one."""
    dictionary = torch.randn(weight.shape[0], atoms) / max(weight.shape[0], atoms) ** 0.5
    return dictionary, dictionary.T @ weight


def two_pairs(name: str, weight: Tensor, dictionary_name: str | None = None) -> Factorized:
    """A head of 16 atoms in 8 bits and a body of 32 atoms in 4 bits, every other code zero."""
    pairs = []
    for atoms, bits, pattern in ((16, 8, DENSE), (32, 4, Pattern(1, 2))):
        dictionary, codes = projected(weight, atoms)
        if not pattern.is_dense:
            keep = torch.zeros_like(codes)
            keep.view(-1, 2, codes.shape[1]).scatter_(
                1, codes.view(-1, 2, codes.shape[1]).abs().argmax(1, keepdim=True), 1.0
            )
            codes = codes * keep
        pair = FactorPair(
            rounded(dictionary, Grid(bits, 32)),
            rounded(codes, Grid(bits, 16)),
            dictionary_name or name,
            pattern,
        )
        weight = weight - pair.dictionary.dequantize() @ pair.codes.dequantize()
        pairs.append(pair)
    return Factorized(tuple(pairs))


def share_dictionaries(
    matrices: Mapping[str, Matrix], names: Sequence[str], shared: str
) -> dict[str, Matrix]:
    """The same matrices, with those named using the dictionaries of the first of them."""
    result = dict(matrices)
    first = result[names[0]]
    assert isinstance(first, Factorized)
    for name in names:
        matrix = result[name]
        assert isinstance(matrix, Factorized)
        result[name] = Factorized(
            tuple(
                FactorPair(one.dictionary, pair.codes, shared, pair.pattern)
                for one, pair in zip(first.pairs, matrix.pairs, strict=True)
            )
        )
    return result


def torch_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of transformers, with the positions that generate() would use for left padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits


@dataclass
class OnnxRun:
    """A session with its key-value cache."""

    session: Any
    past: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits of the new tokens; `mask` covers the past as well."""
        feeds = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
        for entry in self.session.get_inputs():
            if entry.name.startswith("past_key_values"):
                _, heads, _, size = entry.shape
                empty = np.zeros((tokens.shape[0], heads, 0, size), np.float32)
                feeds[entry.name] = self.past.get(entry.name, empty)
        values = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        self.past = {
            name.replace("present", "past_key_values"): value
            for name, value in values.items()
            if name != "logits"
        }
        return torch.from_numpy(values["logits"])


def padded_batch(vocabulary: int = 96) -> tuple[Tensor, Tensor]:
    """Three rows of 12 tokens, two of them padded on the left, and their mask."""
    tokens = torch.randint(3, vocabulary, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    for row, padding in ((1, 3), (2, 7)):
        tokens[row, :padding] = 0
        mask[row, :padding] = 0
    return tokens, mask


def nmse(found: Tensor, expected: Tensor) -> float:
    """Squared error over squared deviation."""
    expected = expected.double()
    return float((found.double() - expected).square().sum() / (expected - expected.mean()).square().sum())


# --- packed codes ------------------------------------------------------------------------------------


def reference_two_of_four(matrix: Quantized) -> tuple[list[list[int]], list[list[int]]]:
    """Values and patterns, by trying every pattern on every four neighbours, the first that fits first."""
    rows, outputs = matrix.shape
    groups = matrix.grid.groups(rows) * matrix.grid.group // 4
    values: list[list[int]] = []
    patterns: list[list[int]] = []
    for output in range(outputs):
        column = matrix.integers[:, output].tolist() + [0] * (4 * groups - rows)
        values.append([])
        patterns.append([])
        for group in range(groups):
            four = column[4 * group : 4 * group + 4]
            for number, (first, second) in enumerate(itertools.combinations(range(4), 2)):
                if not any(four[i] for i in range(4) if i not in (first, second)):
                    values[-1].append((four[first] + 8) + 16 * (four[second] + 8))
                    patterns[-1].append(number)
                    break
            else:
                raise AssertionError(f"{four} has more than two non-zeros")
    return values, patterns


def two_of_four(weight: Tensor, grid: Grid) -> Quantized:
    """Rounded to the grid, with the two largest of every four neighbours kept."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 4) * 4, columns)
    padded[:rows] = weight
    fours = padded.view(-1, 4, columns)
    keep = torch.zeros_like(fours).scatter_(1, fours.abs().topk(2, dim=1).indices, 1.0)
    return rounded((fours * keep).view(-1, columns)[:rows].contiguous(), grid)


def sparse_pair(name: str, weight: Tensor, atoms: int = 48, grid: Grid = Grid(4, 16)) -> Factorized:  # noqa: B008
    """One pair whose codes have the pattern 2:4."""
    dictionary, codes = projected(weight, atoms)
    return Factorized(
        (FactorPair(rounded(dictionary, Grid(4, 32)), two_of_four(codes, grid), name, Pattern(2, 4)),)
    )
