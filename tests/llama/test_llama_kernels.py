"""The C kernels against a float64 product over the same rounded activations."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
import pytest
import torch
from reference_gguf import product, random_quantized, rounded_activations

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.llama.plugin import KINDS, Leaf, Plugin, has_plugin, leaf, load_plugin

pytestmark = pytest.mark.skipif(not has_plugin(), reason="the C plug-in is not built")

TOLERANCE = 2e-6  # of the sum of absolute terms: float32 sums of a few hundred terms
PATTERNS = (DENSE, Pattern(2, 4), Pattern(4, 8))
GRIDS = tuple(Grid(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 96, 128))
INPUTS = (33, 64, 65, 90, 127, 192, 257, 640)


@pytest.fixture(params=["scalar", "avx2", "avx512", "neon"])
def plugin(request: pytest.FixtureRequest) -> Plugin:
    loaded = load_plugin()
    if loaded.use(request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    return loaded


def planes_leaf(quantized: Quantized, pattern: Pattern) -> Leaf:
    form = gguf_planes.PlaneFormat.of(quantized.shape[0], quantized.grid, pattern)
    payload = gguf_planes.pack(quantized.integers.numpy(), quantized.scales.numpy(), form)
    kind = "columns" if form.narrow else "planes"
    return leaf(payload.view(np.uint8), kind, *quantized.shape, quantized.grid, form.pattern)


def blocks_leaf(quantized: Quantized) -> Leaf:
    kind = gguf_blocks.block_type(quantized.grid)
    inputs, outputs = quantized.shape
    padded = -(-inputs // 32) * 32
    integers = np.zeros((padded, outputs), np.int8)
    integers[:inputs] = quantized.integers.numpy()
    rows = gguf_blocks.pack_blocks(integers, quantized.scales.numpy(), quantized.grid.group, kind)
    return leaf(rows, kind, inputs, outputs)


def activations(tokens: int, inputs: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, inputs)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)


def assert_product(plugin: Plugin, of: Leaf, quantized: Quantized, x: np.ndarray) -> None:
    expected, size = product(quantized, x)
    error = np.abs(plugin.product(of, x) - expected)
    assert (error <= TOLERANCE * size + 1e-30).all(), (error / (size + 1e-30)).max()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_planes_equal_the_slow_product(plugin: Plugin, grid: Grid, pattern: Pattern) -> None:
    for inputs in INPUTS:
        for tokens in (1, 3, 5):
            quantized = random_quantized(inputs, 7, grid, pattern, seed=inputs + tokens)
            assert_product(
                plugin, planes_leaf(quantized, pattern), quantized, activations(tokens, inputs, inputs)
            )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [1, 4, 8, 31, 32])
def test_columns_multiply_unrounded_activations(plugin: Plugin, bits: int, inputs: int) -> None:
    quantized = random_quantized(inputs, 133, Grid(bits, 64), seed=inputs)
    x = activations(3, inputs, inputs)
    weight = quantized.dequantize().double().numpy()
    expected, size = x.astype(np.float64) @ weight, np.abs(x).astype(np.float64) @ np.abs(weight)
    assert (np.abs(plugin.product(planes_leaf(quantized, DENSE), x) - expected) <= TOLERANCE * size).all()


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(4, 32), Grid(4, 64), Grid(8, 32), Grid(8, 128)], ids=str)
def test_standard_blocks_equal_the_slow_product(plugin: Plugin, grid: Grid) -> None:
    for inputs in (32, *INPUTS):
        for tokens in (1, 4):
            quantized = random_quantized(inputs, 6, grid, seed=inputs)
            assert_product(plugin, blocks_leaf(quantized), quantized, activations(tokens, inputs, inputs))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floating_leaves_are_multiplied_without_rounding(plugin: Plugin, kind: str) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    for inputs in (1, 7, 8, 65, 130):
        weight = torch.randn(5, inputs).to(dtype)
        raw = weight.view(torch.uint8) if kind != "BF16" else weight.view(torch.int16).view(torch.uint8)
        of = leaf(raw.numpy(), kind, inputs, 5)
        x = activations(3, inputs, inputs)
        expected = x.astype(np.float64) @ weight.double().numpy().T
        size = np.abs(x).astype(np.float64) @ np.abs(weight.double().numpy().T)
        assert (np.abs(plugin.product(of, x) - expected) <= TOLERANCE * size).all()


@pytest.mark.parametrize("grid", [Grid(2, 64), Grid(3, 64), Grid(4, 32), Grid(4, 64), Grid(8, 64)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_extreme_values_do_not_saturate(plugin: Plugin, grid: Grid, pattern: Pattern) -> None:
    """Every integer and every activation at the end of its range, with one sign: the worst int16 sums."""
    for sign in (-1.0, 1.0):
        quantized = random_quantized(320, 9, grid, pattern, extreme=True)
        x = np.full((5, 320), sign * 3.0, np.float32)
        assert_product(plugin, planes_leaf(quantized, pattern), quantized, x)
        assert_product(plugin, planes_leaf(quantized, pattern), quantized, x[:1])
    lowest = Quantized(torch.full_like(quantized.integers, grid.lowest), quantized.scales, grid)
    if pattern.is_dense:
        assert_product(plugin, planes_leaf(lowest, pattern), lowest, x)
        assert_product(plugin, blocks_leaf(lowest), lowest, x[:1])


def test_a_unit_that_is_not_finite_makes_its_results_nan_and_no_others(plugin: Plugin) -> None:
    quantized = random_quantized(128, 4, Grid(4, 64))
    of = planes_leaf(quantized, DENSE)
    for bad in (np.nan, np.inf, -np.inf):
        x = activations(2, 128, 1)
        x[0, 70] = bad
        y = plugin.product(of, x)
        assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_activations_are_rounded_to_the_nearest_of_127_steps_of_their_own_64(plugin: Plugin) -> None:
    """Seen through the identity: each moves by 1/254 of the largest of its unit at most, and ties go to even."""
    rng = np.random.default_rng(0)
    for inputs in (33, 40, 64, 65, 127, 200):
        identity = Quantized(torch.eye(inputs, dtype=torch.int8), torch.ones(1, inputs).half(), Grid(8, 256))
        of = planes_leaf(identity, DENSE)
        for magnitude in (-29, -20, -6, 0, 6, 30):
            x = (rng.standard_normal((5, inputs)) * 10.0**magnitude).astype(np.float32)
            assert np.array_equal(plugin.product(of, x), rounded_activations(x).astype(np.float32))
        halves = (rng.integers(-254, 255, (5, inputs)) / 2).astype(np.float32)
        halves[:, ::64] = 127 * rng.choice([-1, 1], halves[:, ::64].shape)  # a step of one
        assert np.array_equal(plugin.product(of, halves), np.rint(halves))
        peaks = np.repeat(np.abs(halves[:, ::64]), 64, axis=1)[:, :inputs]
        assert (np.abs(plugin.product(of, halves) - halves) <= peaks / 254).all()


def test_zero_and_tiny_activations_give_zero(plugin: Plugin) -> None:
    of = planes_leaf(random_quantized(128, 4, Grid(4, 64)), DENSE)
    assert (plugin.product(of, np.zeros((1, 128), np.float32)) == 0).all()
    assert (plugin.product(of, np.full((1, 128), 1e-38, np.float32)) == 0).all()


def test_results_of_a_row_do_not_depend_on_its_neighbours(plugin: Plugin) -> None:
    quantized = random_quantized(192, 13, Grid(4, 64), Pattern(2, 4))
    form = gguf_planes.PlaneFormat.of(192, quantized.grid, Pattern(2, 4))
    payload = gguf_planes.pack(quantized.integers.numpy(), quantized.scales.numpy(), form).view(np.uint8)
    for tokens in (1, 6):
        x = activations(tokens, 192, 3)
        whole = plugin.product(leaf(payload, "planes", 192, 13, quantized.grid, form.pattern), x)
        for row in range(13):
            single = np.ascontiguousarray(payload[row : row + 1])
            alone = plugin.product(leaf(single, "planes", 192, 1, quantized.grid, form.pattern), x)
            assert np.array_equal(alone[:, 0], whole[:, row])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_all_instruction_sets_and_batch_sizes_give_the_same_bits(pattern: Pattern) -> None:
    loaded = load_plugin()
    names = [name for name in ("scalar", "avx2", "avx512", "neon") if loaded.use(name) == name]
    try:
        for grid in (
            Grid(2, 32),
            Grid(2, 256),
            Grid(3, 64),
            Grid(3, 256),
            Grid(4, 96),
            Grid(4, 128),
            Grid(8, 64),
        ):
            of = planes_leaf(random_quantized(330, 21, grid, pattern, seed=3), pattern)
            x = activations(6, 330, 5)
            loaded.use("scalar")
            expected = loaded.product(of, x)
            for name in names:
                loaded.use(name)
                assert np.array_equal(loaded.product(of, x), expected), (name, grid)
                for token in range(6):
                    alone = loaded.product(of, x[token : token + 1])
                    assert np.array_equal(alone[0], expected[token]), (name, grid, token)
    finally:
        loaded.use(loaded.isa)


def test_only_a_neutral_node_in_place_is_left_out() -> None:
    """A node that multiplies with ones in place becomes nothing; another tensor, or another target, does not."""
    from compot_deploy.exporters.gguf.library import GgmlTensor

    plugin = load_plugin()
    state = plugin.c.compot_plugin_new(29, 40, 95, 2, 7, 1, 4, 1)
    pair = (Leaf * 1)(planes_leaf(random_quantized(64, 8, Grid(4, 64)), DENSE))
    assert plugin.c.compot_plugin_add(state, b"q", 0, pair, -1) == 0
    assert plugin.c.compot_plugin_ready(state) == 0
    for name in (b"z.scale", b"a.scale", b"m.bias"):
        assert plugin.c.compot_plugin_neutral(state, name) == 0
    ask = C.CFUNCTYPE(C.c_bool, C.POINTER(GgmlTensor), C.c_bool, C.c_void_p)(plugin.callback)

    def op_after(op: int, by: bytes, target: int = 4096, **fields: Any) -> int:
        value = GgmlTensor(ne=(8, 1, 1, 1), nb=(4, 32, 32, 32), data=4096)
        factor = GgmlTensor(name=by)
        node = GgmlTensor(**{"op": op, "ne": (8, 1, 1, 1), "nb": (4, 32, 32, 32), "data": target} | fields)
        node.src[0], node.src[1] = C.addressof(value), C.addressof(factor)
        assert not ask(C.byref(node), True, state)
        return int(node.op)

    assert op_after(7, b"a.scale") == op_after(2, b"m.bias") == op_after(7, b"z.scale") == 0
    assert op_after(7, b"b.scale") == 7 and op_after(2, b"m.bia") == 2 and op_after(9, b"a.scale") == 9
    assert op_after(2, b"n.bias") == 2 and op_after(2, b"blk.m.bias") == 2  # the file has those
    assert op_after(2, b"a.scale") == 2 and op_after(7, b"m.bias") == 7  # adds ones, multiplies with zeros
    assert op_after(7, b"a.scale", target=8192) == 7
    for axis in range(4):
        ne, nb = [8, 1, 1, 1], [4, 32, 32, 32]
        ne[axis], nb[axis] = 16, 64
        assert op_after(7, b"a.scale", ne=tuple(ne)) == 7 and op_after(7, b"a.scale", nb=tuple(nb)) == 7
    assert op_after(7, b"a.scale", type=1) == 7
    plugin.c.compot_plugin_free(state)


def test_a_leaf_that_contradicts_its_bytes_is_refused(plugin: Plugin) -> None:
    good = planes_leaf(random_quantized(128, 4, Grid(4, 64)), DENSE)
    x = np.ones((1, 128), np.float32)
    for name, value in [
        ("row_bytes", 1), ("nbytes", 7), ("bits", 5), ("of", 3), ("group", 33), ("inputs", 2**40), ("kind", 9),
        ("outputs", 5), ("inputs", 0), ("data", 0),
    ]:  # fmt: skip
        bad = Leaf.from_buffer_copy(good)
        setattr(bad, name, value)
        with pytest.raises(ValueError, match="refused"):
            plugin.product(bad, x)
    assert set(KINDS) >= {"planes", "columns", "Q4_0", "Q8_0"}


def test_work_is_shared_inside_one_evaluation_and_never_across(plugin: Plugin) -> None:
    """The callback asked as llama.cpp asks it: a second matrix with the same dictionary and input reuses the product,
    but not when a new evaluation begins, even if its tensors lie where the old ones lay."""
    from compot_deploy.exporters.gguf.library import GgmlTensor

    pair = [
        planes_leaf(random_quantized(64, 40, Grid(4, 64)), DENSE),
        planes_leaf(random_quantized(40, 8, Grid(4, 64)), DENSE),
    ]
    state = plugin.c.compot_plugin_new(29, 40, 95, 2, 7, 3, 4, 1)
    for name in (b"q", b"k", b"z"):
        bundle = -1 if name == b"z" else 7
        assert plugin.c.compot_plugin_add(state, name, 1, (Leaf * 2)(*pair), bundle) == 0
    assert plugin.c.compot_plugin_ready(state) == 0
    ask = C.CFUNCTYPE(C.c_bool, C.POINTER(GgmlTensor), C.c_bool, C.c_void_p)(plugin.callback)
    inputs = [GgmlTensor(ne=(64, 1, 1, 1), nb=(4, 256, 256, 256)) for _ in range(2)]

    def variant(name: bytes, of: int) -> bytes:
        weight = GgmlTensor(name=name)
        node = GgmlTensor(op=29, ne=(8, 1, 1, 1), nb=(4, 32, 32, 32))
        node.src[0], node.src[1] = C.addressof(weight), C.addressof(inputs[of])
        assert not ask(C.byref(node), True, state)
        assert node.op == 95
        return bytes(node.op_params)[16:24]

    q, k = variant(b"q", 0), variant(b"k", 0)
    fresh_k = variant(b"k", 1)  # asked again: a new evaluation
    assert fresh_k != k
    assert variant(b"q", 0) == q
    assert variant(b"k", 0) == fresh_k  # asked twice since the last beginning: another new evaluation
    assert plugin.c.compot_plugin_error(state) == b""
    plugin.c.compot_plugin_free(state)
