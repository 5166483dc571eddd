"""Laws of packed codes: nothing is lost, the bytes are the documented ones, and they are counted right."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from reference_onnx import reference_nbits_bytes, reference_two_of_four, two_of_four

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.exporters.onnx.layouts import pack_nbits
from compot_deploy.exporters.onnx.packed_codes import (
    POSITIONS,
    TwoOfFour,
    expansion_table,
    pack_two_of_four,
    unpack_two_of_four,
)
from compot_deploy.exporters.onnx.storage import BLOCKS, OnnxStorage

TWO_OF_FOUR = Pattern(2, 4)

# --- the codec


@st.composite
def sparse_matrices(draw: st.DrawFn) -> Quantized:
    """Any integers on at most two places of every four; a kept place may hold a zero."""
    grid = Grid(4, draw(st.sampled_from(BLOCKS)))
    rows, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    groups = -(-rows // 4)
    integers = torch.randint(-8, 8, (groups, 4, outputs), dtype=torch.int8, generator=generator)
    integers *= torch.rand(integers.shape, generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    places = torch.rand(integers.shape, generator=generator).argsort(dim=1)
    integers = torch.where(places < 2, integers, torch.zeros_like(integers)).view(-1, outputs)[:rows]
    scales = torch.randn(grid.groups(rows), outputs, generator=generator).half()
    return Quantized(integers.contiguous(), scales, grid)


@settings(max_examples=60, deadline=None)
@given(sparse_matrices())
def test_unpacking_gives_back_every_bit(matrix: Quantized) -> None:
    packed = pack_two_of_four(matrix)
    assert same_matrix(unpack_two_of_four(packed, matrix.shape[0], matrix.grid), matrix)


@settings(max_examples=40, deadline=None)
@given(sparse_matrices())
def test_the_bytes_are_those_of_trying_every_pattern(matrix: Quantized) -> None:
    packed = pack_two_of_four(matrix)
    values, patterns = reference_two_of_four(matrix)
    assert packed.values[..., 0].tolist() == values
    numbers = [number for output in patterns for number in output]
    assert packed.patterns.tolist() == [
        low + 16 * high for low, high in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    assert torch.equal(packed.scales, pack_nbits(matrix).scales)


@settings(max_examples=40, deadline=None)
@given(sparse_matrices())
def test_storage_counts_exactly_the_bytes_that_are_written(matrix: Quantized) -> None:
    packed = pack_two_of_four(matrix)
    written = packed.values.numel() + packed.patterns.numel() + 2 * packed.scales.numel()
    assert OnnxStorage(codes="packed").leaf_bytes(*matrix.shape, matrix.grid, TWO_OF_FOUR) == written


def test_the_worked_example_and_the_rule_for_open_places() -> None:
    integers = torch.zeros(16, 1, dtype=torch.int8)
    integers[:, 0] = torch.tensor([0, 3, 0, -2, 0, 0, 0, 0, 0, 0, 0, 7, 0, -8, 0, 0])
    packed = pack_two_of_four(Quantized(integers, torch.ones(1, 1).half(), Grid(4, 16)))
    # (1, 3), then nothing: (0, 1); then only the last: (0, 3); then only the second: (0, 1).
    assert packed.patterns.tolist() == [4 | 0 << 4, 2 | 0 << 4]
    assert packed.values.flatten().tolist() == [0x6B, 0x88, 0xF8, 0x08]


def test_whichever_place_of_a_zero_is_written_the_same_integers_are_read() -> None:
    grid = Grid(4, 16)
    for kept, number in itertools.product(range(4), (-8, -1, 0, 7)):
        integers = torch.zeros(16, 1, dtype=torch.int8)
        integers[kept] = number
        matrix = Quantized(integers, torch.ones(1, 1).half(), grid)
        for pattern, places in enumerate(POSITIONS):
            if kept in places:
                codes = [number + 8 if place == kept else 8 for place in places]
                values = torch.tensor([[[codes[0] | codes[1] << 4], [0x88], [0x88], [0x88]]])
                patterns = torch.tensor([pattern, 5 << 4 | 3])
                packed = TwoOfFour(values.to(torch.uint8), patterns.to(torch.uint8), matrix.scales)
                assert same_matrix(unpack_two_of_four(packed, 16, grid), matrix)


def test_the_table_holds_the_bytes_of_every_four_codes() -> None:
    table = expansion_table().tolist()
    for value, (pattern, places) in itertools.product(range(256), enumerate(POSITIONS)):
        four = [0, 0, 0, 0]
        four[places[0]], four[places[1]] = (value & 15) - 8, (value >> 4) - 8
        column = torch.tensor([[number] for number in four + [0] * 12], dtype=torch.int8)
        block = reference_nbits_bytes(Quantized(column, torch.ones(1, 1).half(), Grid(4, 16)))[0][0]
        assert bytes(table[pattern + 6 * value]) == block[:2]


def test_what_is_not_two_of_four_is_refused_not_cut() -> None:
    integers = torch.zeros(64, 3, dtype=torch.int8)
    integers[40:43, 1] = 1
    with pytest.raises(ValueError, match="Output 1 has more than 2 non-zeros among the atoms 40 to 43"):
        pack_two_of_four(Quantized(integers, torch.ones(2, 3).half(), Grid(4, 32)))
    with pytest.raises(ValueError, match="packed at 4 bits, and these integers are on int8/g32"):
        pack_two_of_four(Quantized(integers, torch.ones(2, 3).half(), Grid(8, 32)))


def test_bytes_that_cannot_be_meant_are_refused() -> None:
    packed = pack_two_of_four(two_of_four(torch.randn(64, 2), Grid(4, 32)))
    with pytest.raises(ValueError, match="96 inputs on int4/g32 are 24 groups of four, and here are 16"):
        unpack_two_of_four(packed, 96, Grid(4, 32))
    with pytest.raises(ValueError, match="There is a pattern 6, and they are numbered 0 to 5"):
        unpack_two_of_four(replace(packed, patterns=packed.patterns & 0xF8 | 0x06), 64, Grid(4, 32))


def test_packing_leaves_its_argument_unchanged() -> None:
    matrix = two_of_four(torch.randn(50, 5), Grid(4, 32))
    integers, scales = matrix.integers.clone(), matrix.scales.clone()
    pack_two_of_four(matrix)
    assert torch.equal(matrix.integers, integers) and torch.equal(matrix.scales, scales)


# --- what it costs


def test_a_million_packed_codes_take_three_bits_and_their_scales() -> None:
    storage = OnnxStorage(codes="packed")
    assert storage.leaf_bytes(1024, 1024, Grid(4, 32), TWO_OF_FOUR) * 8 == 1024 * 1024 * 3.5
    assert storage.leaf_bytes(1024, 1024, Grid(4, 128), TWO_OF_FOUR) * 8 == 1024 * 1024 * 3.125
    # 70 atoms are filled up to 96 in blocks of 32.
    assert storage.leaf_bytes(70, 8, Grid(4, 32), TWO_OF_FOUR) == 8 * (96 * 3 // 8 + 3 * 2)


@pytest.mark.parametrize("grid", [None, Grid(2, 32), Grid(4, 32), Grid(8, 32)])
@pytest.mark.parametrize("pattern", [DENSE, Pattern(4, 8), Pattern(32, 64), TWO_OF_FOUR])
@pytest.mark.parametrize("ops", ["matmulnbits", "qdq"])
def test_everything_but_two_of_four_in_four_bits_costs_as_before(
    grid: Grid | None, pattern: Pattern, ops: str
) -> None:
    sizes = [
        OnnxStorage(ops, codes=codes).leaf_bytes(70, 9, grid, pattern)  # type: ignore[arg-type]
        for codes in ("dense", "packed")
    ]
    cheaper = grid == Grid(4, 32) and pattern == TWO_OF_FOUR and ops == "matmulnbits"
    assert (sizes[1] < sizes[0]) if cheaper else (sizes[1] == sizes[0])


@pytest.mark.parametrize("codes", ["dense", "packed"])
def test_memory_is_that_of_dense_integers_and_float32_scales_whatever_the_file(codes: str) -> None:
    storage = OnnxStorage(codes=codes)  # type: ignore[arg-type]
    assert storage.memory_bytes(70, 9, Grid(4, 32), TWO_OF_FOUR) == 9 * 3 * (16 + 4)
    assert storage.memory_bytes(70, 9, Grid(4, 32)) == 9 * 3 * (16 + 4)
    assert storage.memory_bytes(64, 9, Grid(2, 64)) == 9 * (16 + 4)
    assert OnnxStorage(float_bytes=2).memory_bytes(70, 9, None) == 70 * 9 * 4
