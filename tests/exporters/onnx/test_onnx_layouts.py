"""Laws of the packing: nothing is lost, the bytes are the documented ones, and they are counted right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from reference_onnx import reference_blocked_bytes, reference_nbits_bytes

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.core.storage import Storage
from compot_deploy.exporters.onnx.layouts import (
    QDQ_BITS,
    NBits,
    pack_blocked,
    pack_nbits,
    unpack_blocked,
    unpack_nbits,
)
from compot_deploy.exporters.onnx.storage import BLOCKS, NBITS_BITS, OnnxStorage, unsupported_grid


def random_matrix(rows: int, outputs: int, grid: Grid, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    return Quantized(
        torch.randint(grid.lowest, grid.highest + 1, (rows, outputs), dtype=torch.int8, generator=generator),
        torch.randn(grid.groups(rows), outputs, generator=generator).half(),
        grid,
    )


@st.composite
def matrices(draw: st.DrawFn, bits: tuple[int, ...]) -> Quantized:
    grid = Grid(draw(st.sampled_from(bits)), draw(st.sampled_from(BLOCKS)))
    rows, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 9))
    return random_matrix(rows, outputs, grid, draw(st.integers(0, 1 << 30)))


@settings(max_examples=60, deadline=None)
@given(matrices(NBITS_BITS))
def test_unpacking_nbits_gives_back_every_bit(matrix: Quantized) -> None:
    packed = pack_nbits(matrix)
    assert same_matrix(unpack_nbits(packed, matrix.shape[0], matrix.grid), matrix)


@settings(max_examples=60, deadline=None)
@given(matrices(QDQ_BITS))
def test_unpacking_blocked_gives_back_every_bit(matrix: Quantized) -> None:
    packed = pack_blocked(matrix)
    assert same_matrix(unpack_blocked(packed, matrix.shape[0], matrix.grid), matrix)


@pytest.mark.parametrize("bits", NBITS_BITS)
@pytest.mark.parametrize("rows", [64, 70])
def test_nbits_bytes_are_the_documented_ones(bits: int, rows: int) -> None:
    matrix = random_matrix(rows, 3, Grid(bits, 32))
    blob = pack_nbits(matrix).blob
    found = [[bytes(block.tolist()) for block in output] for output in blob]
    assert found == reference_nbits_bytes(matrix)
    assert torch.equal(pack_nbits(matrix).table[1], blob[1].flatten())


@pytest.mark.parametrize("bits", QDQ_BITS)
@pytest.mark.parametrize("shape", [(32, 4), (33, 3)])
def test_blocked_bytes_are_the_documented_ones(bits: int, shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape, Grid(bits, 16))
    assert bytes(pack_blocked(matrix).data.tolist()) == reference_blocked_bytes(matrix)


def test_the_worked_example() -> None:
    integers = torch.zeros(16, 1, dtype=torch.int8)
    integers[:4, 0] = torch.tensor([0, 1, -8, 7], dtype=torch.int8)
    matrix = Quantized(integers, torch.ones(1, 1).half(), Grid(4, 16))
    assert pack_nbits(matrix).blob[0, 0].tolist() == [0x98, 0xF0] + [0x88] * 6
    assert pack_blocked(matrix).data.tolist() == [0x10, 0x78] + [0] * 6


@pytest.mark.parametrize("bits", NBITS_BITS)
def test_extreme_integers_survive(bits: int) -> None:
    grid = Grid(bits, 16)
    integers = torch.tensor([[grid.lowest], [grid.highest], [0], [-1]], dtype=torch.int8).repeat(8, 2)
    matrix = Quantized(integers, torch.ones(2, 2).half(), grid)
    assert same_matrix(unpack_nbits(pack_nbits(matrix), 32, grid), matrix)


@settings(max_examples=40, deadline=None)
@given(matrices(NBITS_BITS), st.sampled_from(["matmulnbits", "qdq"]))
def test_storage_counts_exactly_the_bytes_that_are_written(matrix: Quantized, ops: str) -> None:
    if ops == "qdq":
        if matrix.grid.bits not in QDQ_BITS:
            return
        blocked = pack_blocked(matrix)
        written = blocked.data.numel() + 2 * blocked.scales.numel()
        assert OnnxStorage("qdq").leaf_bytes(*matrix.shape, matrix.grid) == written
    else:
        packed = pack_nbits(matrix)
        written = packed.blob.numel() + 2 * packed.scales.numel()
        assert OnnxStorage().leaf_bytes(*matrix.shape, matrix.grid) == written


def test_storage_of_floats_and_of_a_million_integers() -> None:
    assert isinstance(OnnxStorage(), Storage)
    assert OnnxStorage().leaf_bytes(1024, 1024, None) == 1024 * 1024 * 4
    assert OnnxStorage(float_bytes=2).leaf_bytes(1024, 1024, None) == 1024 * 1024 * 2
    assert OnnxStorage().leaf_bytes(1024, 1024, Grid(4, 32)) * 8 == 1024 * 1024 * 4.5


def test_packing_leaves_its_argument_unchanged() -> None:
    matrix = random_matrix(50, 5, Grid(4, 32))
    integers, scales = matrix.integers.clone(), matrix.scales.clone()
    pack_nbits(matrix)
    pack_blocked(matrix)
    assert torch.equal(matrix.integers, integers) and torch.equal(matrix.scales, scales)


def test_an_integer_outside_its_grid_is_refused_not_wrapped() -> None:
    matrix = Quantized(torch.full((32, 1), 8, dtype=torch.int8), torch.ones(1, 1).half(), Grid(4, 32))
    for pack in (pack_nbits, pack_blocked):
        with pytest.raises(ValueError, match="from 8 to 8 do not fit int4/g32, which holds -8 to 7"):
            pack(matrix)


def test_bytes_of_another_size_are_refused() -> None:
    packed = pack_nbits(random_matrix(64, 2, Grid(4, 32)))
    with pytest.raises(
        ValueError, match="96 inputs on int4/g32 take 3 blocks of 16 bytes, and here are 2 of"
    ):
        unpack_nbits(packed, 96, Grid(4, 32))
    with pytest.raises(ValueError, match="and here are 2 of 8"):
        unpack_nbits(NBits(packed.blob[..., :8], packed.scales), 64, Grid(4, 32))
    with pytest.raises(ValueError, match="65 x 2 integers"):
        unpack_blocked(pack_blocked(random_matrix(64, 2, Grid(4, 32))), 65, Grid(4, 32))


@pytest.mark.parametrize(
    ("grid", "ops", "embedding", "reason"),
    [
        (Grid(3, 32), "matmulnbits", False, "in 2, 4 or 8 bits, not 3"),
        (Grid(2, 32), "qdq", False, "written as qdq in 4 or 8 bits, not 2"),
        (Grid(3, 32), "matmulnbits", True, "token embeddings in 2, 4 or 8 bits, not 3"),
        (Grid(2, 16), "matmulnbits", False, "2-bit integers in groups of 32, 64 or 128, not 16"),
        (Grid(4, 96), "matmulnbits", False, "groups of 16, 32, 64, 128 or 256, not 96"),
    ],
)
def test_grids_that_the_format_lacks_are_refused_with_a_reason(
    grid: Grid, ops: str, embedding: bool, reason: str
) -> None:
    found = unsupported_grid(grid, ops, embedding)  # type: ignore[arg-type]
    assert found is not None and reason in found
    assert unsupported_grid(Grid(4, 32), "matmulnbits", True) is None
