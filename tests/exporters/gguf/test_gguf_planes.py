"""Planes and blocks: packing loses nothing, bytes are the promised ones, damage is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_gguf import random_quantized

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf.planes import PlaneFormat, pack, unpack
from compot_deploy.exporters.gguf.storage import GgufStorage

SPARSE = (Pattern(2, 4), Pattern(4, 8))


def arrays(quantized: Quantized) -> tuple[np.ndarray, np.ndarray]:
    return quantized.integers.numpy(), quantized.scales.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("pattern", [DENSE, *SPARSE], ids=str)
def test_unpack_undoes_pack(bits: int, group: int, pattern: Pattern) -> None:
    for inputs in (1, 31, 32, 33, 63, 64, 65, 90, 128, 257):
        grid = Grid(bits, group)
        form = PlaneFormat.of(inputs, grid, pattern)
        integers, scales = arrays(random_quantized(inputs, 5, grid, pattern, seed=inputs))
        payload = pack(integers, scales, form)
        assert payload.shape == form.shape(5) and payload.nbytes == form.nbytes(5)
        back, back_scales = unpack(payload, form, 5)
        assert np.array_equal(back, integers) and np.array_equal(back_scales, scales)


def test_a_record_has_the_documented_bytes() -> None:
    """One output, 64 inputs, 4 bits: scale 1.0, then byte i = (input i + 8) | (input 32 + i + 8) << 4."""
    integers = np.zeros((64, 1), np.int8)
    integers[0], integers[32], integers[63] = -8, 7, 1
    payload = pack(integers, np.ones((1, 1), np.float16), PlaneFormat(Grid(4, 64), DENSE, 64)).view(np.uint8)[
        0
    ]
    assert payload[:2].tolist() == [0x00, 0x3C]
    assert payload[2] == 0 | 15 << 4 and payload[3] == 8 | 8 << 4 and payload[33] == 8 | 9 << 4


def test_a_sparse_record_has_the_documented_bytes() -> None:
    """2:4: group 0 keeps inputs 1 and 3; slot 0 and 1; positions in 2 bits at slot % 8, bit 2 * (slot // 8)."""
    integers = np.zeros((64, 1), np.int8)
    integers[1], integers[3] = 5, -3
    payload = pack(integers, np.ones((1, 1), np.float16), PlaneFormat(Grid(4, 64), Pattern(2, 4), 64)).view(
        np.uint8
    )[0]
    assert len(payload) == 2 + 16 + 8
    assert payload[2] & 15 == 13 and payload[3] & 15 == 5 and payload[4] & 15 == 8
    assert payload[18] & 3 == 1 and payload[19] & 3 == 3
    assert payload[20] & 3 == 0 and payload[21] & 3 == 1  # an empty group keeps its first two zeros


@pytest.mark.parametrize(
    ("grid", "pattern", "expected"),
    [
        (Grid(4, 64), DENSE, 4.25), (Grid(4, 64), Pattern(2, 4), 3.25), (Grid(4, 64), Pattern(4, 8), 3.75),
        (Grid(2, 128), DENSE, 2.125), (Grid(3, 64), DENSE, 3.25), (Grid(4, 32), Pattern(2, 4), 3.5),
    ],
)  # fmt: skip
def test_bits_per_entry(grid: Grid, pattern: Pattern, expected: float) -> None:
    assert GgufStorage("sparse").leaf_bytes(1024, 64, grid, pattern) * 8 / (1024 * 64) == expected


def test_a_group_beyond_the_inputs_is_one_scale_per_output() -> None:
    assert GgufStorage("sparse").leaf_bytes(192, 64, Grid(2, 256)) == 64 * (192 * 2 // 8 + 2)


def test_a_narrow_leaf_has_no_padding() -> None:
    assert GgufStorage("sparse").leaf_bytes(4, 1000, Grid(8, 64)) == 1000 * (2 + 4)


def test_positions_that_do_not_ascend_are_damage() -> None:
    form = PlaneFormat(Grid(4, 64), Pattern(2, 4), 64)
    payload = pack(*arrays(random_quantized(64, 1, Grid(4, 64), Pattern(2, 4))), form)
    payload[0, 18:] = 0
    with pytest.raises(ArtifactError, match="ascend"):
        unpack(payload, form, 1)


def test_a_payload_of_another_size_is_damage() -> None:
    form = PlaneFormat(Grid(4, 64), DENSE, 64)
    with pytest.raises(ArtifactError, match="are needed"):
        unpack(np.zeros((3, 5), np.int8), form, 3)


def test_codes_outside_their_pattern_are_refused() -> None:
    integers = np.ones((64, 2), np.int8)
    with pytest.raises(ValueError, match="more non-zeros"):
        pack(integers, np.ones((1, 2), np.float16), PlaneFormat(Grid(4, 64), Pattern(2, 4), 64))


def test_integers_outside_their_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.full((64, 2), 4, np.int8), np.ones((1, 2), np.float16), PlaneFormat(Grid(3, 64), DENSE, 64))


@pytest.mark.parametrize("layout", ["factorized", "sparse"])
def test_groups_that_cannot_be_stored_are_refused_with_those_that_can(layout: str) -> None:
    storage = GgufStorage(layout)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="32, 64 or 128"):
        storage.check(256, Grid(4, 48))
    storage.check(40, Grid(4, 48))  # one group per column is fine


@pytest.mark.parametrize(
    ("grid", "kind"), [(Grid(2, 64), "Q4_0"), (Grid(4, 32), "Q4_0"), (Grid(8, 128), "Q8_0")]
)
def test_blocks_hold_integers_exactly_and_ggml_reads_the_same_numbers(grid: Grid, kind: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    quantized = random_quantized(160, 6, grid)
    rows = gguf_blocks.pack_blocks(*arrays(quantized), grid.group, kind)
    integers, scales = gguf_blocks.unpack_blocks(rows, 160, grid.group, kind)
    assert np.array_equal(integers, quantized.integers.numpy()) and np.array_equal(
        scales, quantized.scales.numpy()
    )
    values = dequantize(rows, GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(values.T.copy()), quantized.dequantize())


def test_blocks_of_one_group_with_different_scales_are_damage() -> None:
    quantized = random_quantized(64, 2, Grid(4, 64))
    rows = gguf_blocks.pack_blocks(*arrays(quantized), 64, "Q4_0")
    rows[0, 18] ^= 1
    with pytest.raises(ArtifactError, match="different scales"):
        gguf_blocks.unpack_blocks(rows, 64, 64, "Q4_0")
