"""Laws of 3-bit integers in an ONNX file: three bits on disk, the exact numbers for the runtime, no node left."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from reference_onnx import (
    MODELS,
    OnnxRun,
    compressed,
    padded_batch,
    reference_nbits_bytes,
    rounded,
    share_dictionaries,
    source_of,
    torch_logits,
    torch_model,
    with_matrices,
)
from torch import Tensor

from compot_deploy.core.diagnostics import errors
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Factorized, FactorPair, Matrix, Quantized
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.expansion import THREE_BITS_TABLE, unfolded_nodes
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.packed_codes import (
    ThreeBits,
    pack_three_bits,
    three_bit_table,
    unpack_three_bits,
)
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.storage import BLOCKS, OnnxStorage
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.recipe import Recipe

EXPORTER = EXPORTERS["onnx"]
PACKED = OnnxOptions(codes="packed")


@st.composite
def matrices(draw: st.DrawFn) -> Quantized:
    grid = Grid(3, draw(st.sampled_from(BLOCKS)))
    rows, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    integers = torch.randint(-4, 4, (rows, outputs), dtype=torch.int8, generator=generator)
    scales = torch.randn(grid.groups(rows), outputs, generator=generator).half()
    return Quantized(integers, scales, grid)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_unpacking_gives_back_every_bit_and_storage_counts_the_bytes(matrix: Quantized) -> None:
    packed = pack_three_bits(matrix)
    assert same_matrix(unpack_three_bits(packed, matrix.shape[0], matrix.grid), matrix)
    written = packed.values.numel() + packed.nibbles.numel() + 2 * packed.scales.numel()
    assert OnnxStorage(codes="packed").leaf_bytes(*matrix.shape, matrix.grid) == written


@settings(max_examples=30, deadline=None)
@given(matrices())
def test_expanded_bytes_are_those_of_the_same_integers_in_four_bits(matrix: Quantized) -> None:
    packed = pack_three_bits(matrix)
    nibbles = torch.stack([packed.nibbles & 15, packed.nibbles >> 4], dim=-1).view(packed.values.shape)
    rows = nibbles[..., 0].long() + 16 * packed.values[..., 0].long()
    expanded = three_bit_table()[rows].view(matrix.shape[1], -1, matrix.grid.group // 2)
    wide = Quantized(matrix.integers, matrix.scales, Grid(4, matrix.grid.group))
    assert [[bytes(block) for block in row] for row in expanded.tolist()] == reference_nbits_bytes(wide)


def test_the_worked_example() -> None:
    integers = torch.zeros(16, 1, dtype=torch.int8)
    integers[:4, 0] = torch.tensor([0, 3, -4, -1])
    packed = pack_three_bits(Quantized(integers, torch.ones(1, 1).half(), Grid(3, 16)))
    number = 4 | 7 << 3 | 0 << 6 | 3 << 9
    assert (number, packed.values[0, 0, 0], packed.nibbles[0] & 15) == (0x63C, 0x63, 12)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="these are on int4/g32"):
        pack_three_bits(rounded(torch.randn(64, 2), Grid(4, 32)))
    wild = Quantized(torch.full((32, 1), 5, dtype=torch.int8), torch.ones(1, 1).half(), Grid(3, 32))
    with pytest.raises(ValueError, match="do not fit int3/g32"):
        pack_three_bits(wild)
    packed = pack_three_bits(rounded(torch.randn(64, 2), Grid(3, 32)))
    with pytest.raises(ValueError, match="96 inputs on int3/g32 are 24 groups of four, and here are 16"):
        unpack_three_bits(packed, 96, Grid(3, 32))
    short = ThreeBits(packed.values, packed.nibbles[:-1], packed.scales)
    with pytest.raises(ValueError, match="nibbles"):
        unpack_three_bits(short, 64, Grid(3, 32))


def test_a_million_integers_take_three_bits_in_the_file_and_four_in_memory() -> None:
    storage = OnnxStorage(codes="packed")
    assert storage.leaf_bytes(1024, 1024, Grid(3, 32)) * 8 == 1024 * 1024 * 3.5
    assert storage.memory_bytes(1024, 1024, Grid(3, 32)) == storage.memory_bytes(1024, 1024, Grid(4, 32))


def scheme(name: str, weight: Tensor) -> Matrix:
    """Plain and factorized in 3 bits, and plain in 4."""
    if "layers" not in name:
        return rounded(weight, Grid(8, 32))
    if "self_attn" in name:
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        codes = sizes[:40, None] * right[:40]
        return Factorized(
            (FactorPair(rounded(left[:, :40], Grid(3, 32)), rounded(codes, Grid(3, 16)), name),)
        )
    return rounded(weight, Grid(4 if "gate" in name else 3, 32))


@pytest.fixture(scope="module")
def model() -> CompressedModel:
    made = compressed(torch_model(MODELS["qwen3"]), scheme)
    block = "model.layers.1.self_attn"
    shared = share_dictionaries(made.matrices, [f"{block}.q_proj", f"{block}.k_proj"], f"{block}.input")
    return CompressedModel(made.architecture, made.config, shared, made.tensors, made.tied, made.source)


@pytest.fixture(scope="module")
def folder(model: CompressedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("three") / "bits"
    path.mkdir()
    EXPORTER.write(model, path, PACKED)
    return path


def test_reading_gives_back_every_matrix_and_the_file_has_the_planned_bytes(
    model: CompressedModel, folder: Path
) -> None:
    found = EXPORTER.read(folder)
    assert list(found) == list(model.matrices)
    for name, matrix in model.matrices.items():
        assert same_matrix(found[name], matrix), name
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    stored = 0
    for tensor in graph.initializer:
        if tensor.name.endswith((".integers", ".scales", ".values", ".nibbles")):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            stored += int(entries["length"]) if entries else len(tensor.raw_data)
    assert stored == sum(matrix_bytes(model.matrices, EXPORTER.storage(PACKED)).values())


def test_onnxruntime_computes_with_these_integers_and_expands_them_once(
    model: CompressedModel, folder: Path
) -> None:
    tokens, mask = padded_batch()
    expected = torch_logits(with_matrices(torch_model(MODELS["qwen3"]), model.matrices), tokens, mask)
    found = OnnxRun(open_session(folder, accuracy_level=0))(tokens, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)
    assert unfolded_nodes(folder) == ()
    left = unfolded_nodes(folder, disabled_optimizers=["ConstantFolding"])
    assert left  # so the check can fail
    assert not errors(EXPORTER.lint(folder))


def test_a_damaged_table_is_found(model: CompressedModel, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for path in (folder / "onnx").iterdir():
        (tmp_path / "onnx" / path.name).write_bytes(path.read_bytes())
    graph = onnx.load(tmp_path / GRAPH, load_external_data=False)
    (table,) = [tensor for tensor in graph.graph.initializer if tensor.name == THREE_BITS_TABLE]
    offset = int({entry.key: entry.value for entry in table.external_data}["offset"])
    with (tmp_path / "onnx/model.onnx_data").open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"\x00")
    assert any("holds other numbers" in diagnostic.sentence for diagnostic in errors(EXPORTER.lint(tmp_path)))


def test_three_bits_are_packed_or_refused(tmp_path: Path) -> None:
    source = source_of(MODELS["llama"], tmp_path)
    grids = {"dictionary": Grid(3, 32)}
    EXPORTER.check(source, grids, PACKED)
    for options in (OnnxOptions(), OnnxOptions(ops="qdq")):
        with pytest.raises(RecipeError, match="not 3"):
            EXPORTER.check(source, grids, options)
    with pytest.raises(RecipeError, match="not 3"):
        EXPORTER.check(source, {"embedding": Grid(3, 32)}, PACKED)
    with pytest.raises(RecipeError, match="for 3-bit integers"):
        Recipe(onnx_codes="packed", allocation="spectral")
    assert Recipe(onnx_codes="packed", bits=3.0).planned and Recipe(onnx_codes="packed").planned
