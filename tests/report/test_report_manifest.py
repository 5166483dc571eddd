"""Laws of what a manifest tells a report: shared dictionaries count once, damage is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.errors import InputError
from compot_deploy.exporters.artifact import describe_matrices
from compot_deploy.exporters.manifest import Manifest
from compot_deploy.exporters.onnx.storage import OnnxStorage
from compot_deploy.report.manifest import frontier_of, layers_of, memory_of, origin_of, place, plain_memory_of

NAMES = ("model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.k_proj")


def quantized(rows: int, columns: int, bits: int) -> Quantized:
    grid = Grid(bits, 32)
    return Quantized(
        torch.ones(rows, columns, dtype=torch.int8),
        torch.ones(grid.groups(rows), columns, dtype=torch.float16),
        grid,
    )


def manifest(metadata: dict[str, Any] | None = None) -> Manifest:
    dictionary = quantized(64, 32, 4)
    matrices: dict[str, Matrix] = {
        name: Factorized((FactorPair(dictionary, quantized(32, columns, 4), "both", Pattern(16, 32)),))
        for name, columns in zip(NAMES, (64, 96), strict=True)
    }
    matrices["model.embed_tokens"] = quantized(64, 320, 8)
    matrices["lm_head"] = Dense(torch.ones(64, 320))
    records = describe_matrices(matrices, OnnxStorage())
    return Manifest(1, "onnx", "0", "llama", False, {}, None, 3, metadata or {}, {}, records, ())


def test_a_shared_dictionary_is_in_memory_once() -> None:
    leaf = OnnxStorage().memory_bytes
    int4, int8 = Grid(4, 32), Grid(8, 32)
    factors = leaf(64, 32, int4) + leaf(32, 64, int4) + leaf(32, 96, int4)
    tables = leaf(64, 320, int8) + leaf(64, 320, None)
    made = manifest()
    assert memory_of(made, OnnxStorage()) == factors + tables
    plain = leaf(64, 64, int8) + leaf(64, 96, int8)
    linears = [record for record in made.matrices if record.name in NAMES]
    assert plain_memory_of(made, OnnxStorage(), linears, 8) == plain + tables


def test_matrices_that_share_a_dictionary_have_the_bits_of_all_of_them() -> None:
    first, second, table, head = layers_of(manifest())
    assert first.bits == second.bits == 8 * (first.bytes + second.bytes) / (64 * 64 + 64 * 96)
    assert first.bytes > second.bytes * 64 / 96  # it carries the dictionary
    assert first.choice == second.choice == "k 32, 16:32: int4/g32 · int4/g32"
    assert (table.choice, table.kind, head.kind) == ("int8/g32", "quantized", "dense")
    assert (first.block, first.role, table.block, head.role) == (2, "self_attn.q_proj", None, "lm_head")


def test_errors_of_plain_matrices_have_nothing_before_quantization() -> None:
    entry = {"error": 0.25, "unquantized_error": 0.0}
    metadata = {
        "linears": [{"name": name, **entry} for name in (NAMES[0], "lm_head")],
        "effects": {NAMES[0]: 3},
    }
    first, second, _, head = layers_of(manifest(metadata))
    assert (first.error, first.unquantized_error, first.sensitivity) == (0.25, 0.0, 3.0)
    assert (second.error, second.unquantized_error, second.sensitivity) == (None, None, None)
    assert (head.error, head.unquantized_error) == (0.25, None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.12.mlp.up_proj", (12, "mlp.up_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("encoder.layer.3.attention.self.query", (3, "attention.self.query")),
        ("lm_head", (None, "lm_head")),
        ("4.auto_model.query", (4, "auto_model.query")),
    ],
)
def test_a_path_is_a_block_and_a_role(name: str, found: tuple[int | None, str]) -> None:
    assert place(name) == found


@pytest.mark.parametrize(
    "metadata",
    [
        {"linears": 3},
        {"linears": ["x"]},
        {"linears": [{"error": 1.0}]},
        {"linears": [{"name": NAMES[0], "error": "big"}]},
        {"effects": [1]},
        {"effects": {NAMES[0]: True}},
        {"frontier": {"counts": "file"}},
        {"frontier": 5},
    ],
)
def test_damaged_metadata_is_named(metadata: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"The manifest is damaged: .* is not a"):
        layers_of(manifest(metadata))
        frontier_of(manifest(metadata))


def test_an_older_manifest_has_less_to_tell() -> None:
    made = manifest()
    assert frontier_of(made) is None and origin_of(made).calibration is None and origin_of(made).seed == 3
    assert origin_of(replace(made, metadata={"calibration_windows": "many"})).calibration_windows is None
