"""The plug-in's nodes, asked about and run as llama.cpp does it, against products of single leaves: equal bits.

Nothing of llama.cpp is needed. A node becomes a function that every thread of a graph calls with its number; here
they are threads of Python, more of them than this machine has cores, so that they are interrupted anywhere.
"""

from __future__ import annotations

import ctypes as C
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from reference_gguf import random_quantized

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf.library import GgmlTensor
from compot_deploy.llama.plugin import Leaf, has_plugin, leaf, load_plugin

pytestmark = pytest.mark.skipif(not has_plugin(), reason="the C plug-in is not built")

MUL_MAT, GET_ROWS, CUSTOM, ADD, MUL = 29, 40, 95, 2, 7
I32, ROWS_ONLY = 26, -2
INPUTS, OUTPUTS, MOST_TOKENS, MOST_THREADS = 330, 75, 9, 5


class CustomParameters(C.Structure):
    """What a CUSTOM node holds in op_params."""

    _fields_ = [("function", C.c_void_p), ("tasks", C.c_int32), ("data", C.c_void_p)]


def integers(inputs: int, outputs: int, grid: Grid, pattern: Pattern = DENSE, seed: int = 0) -> Leaf:
    """A leaf of random integers as planes, or as columns where there are few inputs."""
    quantized = random_quantized(inputs, outputs, grid, pattern, seed)
    form = gguf_planes.PlaneFormat.of(inputs, grid, pattern)
    rows = gguf_planes.pack(quantized.integers.numpy(), quantized.scales.numpy(), form).view(np.uint8)
    return leaf(rows, "columns" if form.narrow else "planes", inputs, outputs, grid, form.pattern)


@dataclass(frozen=True)
class Linear:
    """A matrix that the plug-in multiplies with."""

    name: bytes
    leaves: tuple[Leaf, ...]
    pairs: int
    bundle: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The product of every token by itself, leaf after leaf, in one thread."""
        one = load_plugin().product
        rows = []
        for token in x:
            parts = (
                [one(self.leaves[2 * i + 1], one(self.leaves[2 * i], token[None])) for i in range(self.pairs)]
                if self.pairs
                else [one(self.leaves[0], token[None])]
            )
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            rows.append(total[0])
        return np.stack(rows)


def linears() -> tuple[Linear, ...]:
    """Two matrices of one input share a dictionary, two others share another with a head; the rest is alone."""
    thin, wide = integers(INPUTS, 100, Grid(4, 64), seed=1), integers(INPUTS, 200, Grid(4, 32), seed=2)
    head = integers(INPUTS, 8, Grid(8, 64), seed=3)

    def codes(atoms: int, seed: int, pattern: Pattern = DENSE) -> Leaf:
        return integers(atoms, OUTPUTS, Grid(4, 64), pattern, seed)

    return (
        Linear(b"q", (thin, codes(100, 4, Pattern(2, 4))), 1, 0),
        Linear(b"k", (thin, codes(100, 5)), 1, 0),
        Linear(b"gate", (wide, codes(200, 6, Pattern(4, 8)), head, codes(8, 7)), 2, 1),
        Linear(b"up", (wide, codes(200, 8), head, codes(8, 9)), 2, 1),
        Linear(b"own", (thin, codes(100, 10)), 1, -1),
        Linear(b"other", (wide, codes(200, 11)), 1, -1),
        Linear(b"plain", (integers(INPUTS, OUTPUTS, Grid(3, 64), seed=12),), 0, -1),
    )


@dataclass
class Node:
    """A product in a graph: the tensors that llama.cpp hands over, and the memory behind them."""

    linear: Linear
    x: np.ndarray
    input: GgmlTensor
    y: np.ndarray = field(init=False)
    tensor: GgmlTensor = field(init=False)

    def __post_init__(self) -> None:
        tokens = self.input.ne[1]
        self.y = np.full((tokens, OUTPUTS), np.nan, np.float32)
        self.tensor = matrix(self.y, op=MUL_MAT)
        self._weight = GgmlTensor(name=self.linear.name)
        self.tensor.src[0], self.tensor.src[1] = C.addressof(self._weight), C.addressof(self.input)

    def run(self, threads: int) -> np.ndarray:
        """The whole node."""
        run(self.tensor, threads)
        return self.y


def start(node: GgmlTensor, threads: int, which: Sequence[int]) -> list[threading.Thread]:
    """Begin the work of some of the threads of a graph, as the node says after the plug-in was asked about it."""
    assert node.op == CUSTOM
    parameters = CustomParameters.from_buffer_copy(bytes(node.op_params))
    call = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_int, C.c_void_p)(parameters.function)
    begun = [
        threading.Thread(target=call, args=(C.addressof(node), ith, threads, parameters.data))
        for ith in which
    ]
    for thread in begun:
        thread.start()
    return begun


def run(node: GgmlTensor, threads: int) -> None:
    """The work of all threads."""
    for thread in start(node, threads, range(threads)):
        thread.join()


def matrix(data: np.ndarray, **fields: int) -> GgmlTensor:
    """Rows of float32, as ggml sees them."""
    rows, columns = data.shape
    whole = data.nbytes
    return GgmlTensor(
        ne=(columns, rows, 1, 1), nb=(4, 4 * columns, whole, whole), data=data.ctypes.data, **fields
    )


class Graph:
    """A context of the plug-in and everything that is asked of it."""

    def __init__(self, state: int) -> None:
        self.plugin, self.state = load_plugin(), state
        ask = C.CFUNCTYPE(C.c_bool, C.POINTER(GgmlTensor), C.c_bool, C.c_void_p)
        self._ask = ask(self.plugin.callback)

    def ask_tensor(self, node: GgmlTensor) -> GgmlTensor:
        """Ask about a node before anything is computed, as llama.cpp does."""
        assert not self._ask(C.byref(node), True, self.state)
        return node

    def ask(self, node: Node) -> Node:
        """The same, and nothing is wrong with it."""
        self.ask_tensor(node.tensor)
        assert self.error() == ""
        return node

    def error(self) -> str:
        """What went wrong since the last question."""
        return str(self.plugin.c.compot_plugin_error(self.state).decode())


@contextmanager
def graph(matrices: Sequence[Linear], threads: int = MOST_THREADS) -> Iterator[Graph]:
    """A plug-in with some matrices."""
    c = load_plugin().c
    load_plugin().use(load_plugin().isa)
    state = c.compot_plugin_new(MUL_MAT, GET_ROWS, CUSTOM, ADD, MUL, len(matrices) + 1, MOST_TOKENS, threads)
    for one in matrices:
        array = (Leaf * len(one.leaves))(*one.leaves)
        assert c.compot_plugin_add(state, one.name, one.pairs, array, one.bundle) == 0
    assert c.compot_plugin_ready(state) == 0
    try:
        yield Graph(state)
    finally:
        c.compot_plugin_free(state)


def activations(tokens: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal((tokens, INPUTS)) * 10.0 ** rng.integers(-2, 3)).astype(np.float32)


def test_any_number_of_threads_and_tokens_gives_the_bits_of_one_token_in_one_thread() -> None:
    rng = np.random.default_rng(0)
    with graph(linears()) as context:
        for linear in linears():
            for threads in range(1, MOST_THREADS + 1):
                for tokens in (1, 2, 3, 4, 5, 7, 9):
                    x = activations(tokens, rng)
                    made = context.ask(Node(linear, x, matrix(x))).run(threads)
                    assert np.array_equal(made, linear(x)), (linear.name, threads, tokens)


def test_scratch_of_an_evaluation_never_shows_in_the_next() -> None:
    """Wide inputs and many atoms before narrow ones: what is beyond the narrow ones' ends is left over."""
    narrow = Linear(b"narrow", (integers(40, OUTPUTS, Grid(4, 64), seed=1),), 0, -1)
    few = Linear(
        b"few", (integers(40, 36, Grid(4, 64), seed=2), integers(36, OUTPUTS, Grid(4, 64), seed=3)), 1, 0
    )
    rng = np.random.default_rng(1)
    wide = linears()[3]
    with graph([wide, narrow, few]) as context:
        for tokens in (1, 3):
            for small in (narrow, few):
                large = np.full((tokens, INPUTS), 1e6, np.float32)
                context.ask(Node(wide, large, matrix(large))).run(1)
                x = np.ascontiguousarray(activations(tokens, rng)[:, :40])
                assert np.array_equal(context.ask(Node(small, x, matrix(x))).run(1), small(x))


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 5])
def test_no_thread_goes_on_before_all_have_done_what_it_needs(late: int, tokens: int) -> None:
    """One of three threads begins much later than the others, which must not end before it."""
    rng = np.random.default_rng(2)
    linear = linears()[2]
    with graph(linears()) as context:
        for _ in range(2):  # the second finds what the first left
            x = activations(tokens, rng)
            node = context.ask(Node(linear, x, matrix(x)))
            early = start(node.tensor, 3, [ith for ith in range(3) if ith != late])
            time.sleep(0.02)
            assert all(thread.is_alive() for thread in early) and np.isnan(node.y).all()
            for thread in early + start(node.tensor, 3, [late]):
                thread.join()
            assert np.array_equal(node.y, linear(x))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_reused_only_for_the_same_input_and_dictionary(tokens: int, threads: int) -> None:
    """Evaluations of any order of matrices, over two inputs whose tensors stay where they are while the numbers
    change: whatever the plug-in leaves out, the result is what it is without."""
    rng = np.random.default_rng(3)
    matrices = linears()
    inputs = [np.zeros((tokens, INPUTS), np.float32) for _ in range(2)]
    tensors = [matrix(x) for x in inputs]
    with graph(matrices) as context:
        for _ in range(40):
            for x in inputs:
                x[:] = activations(tokens, rng)
            order = rng.permutation(len(matrices))[: int(rng.integers(1, len(matrices) + 1))]
            sources = [int(rng.integers(0, 2)) for _ in order]
            nodes = [
                context.ask(Node(matrices[number], inputs[source], tensors[source]))
                for number, source in zip(order, sources, strict=True)
            ]
            for node in nodes:
                assert np.array_equal(node.run(threads), node.linear(node.x)), [n.linear.name for n in nodes]


# --- rows of an embedding, and what is refused ------------------------------------------------------------------


def rows_node(table: bytes, ids: np.ndarray, y: np.ndarray) -> GgmlTensor:
    """A GET_ROWS node."""
    node = matrix(y, op=GET_ROWS)
    weight = GgmlTensor(name=table)
    source = GgmlTensor(
        type=I32, ne=(len(ids), 1, 1, 1), nb=(4, ids.nbytes, ids.nbytes, ids.nbytes), data=ids.ctypes.data
    )
    node.src[0], node.src[1] = C.addressof(weight), C.addressof(source)
    node.keep = weight, source  # the node holds only their addresses
    return node


@pytest.mark.parametrize("threads", range(1, MOST_THREADS + 1))
def test_rows_of_an_embedding_are_the_numbers_of_the_file_and_none_beyond_it(threads: int) -> None:
    quantized = random_quantized(INPUTS, 50, Grid(4, 64), seed=5)
    table = Linear(b"embd", (integers(INPUTS, 50, Grid(4, 64), seed=5),), 0, ROWS_ONLY)
    expected = quantized.dequantize().numpy().T
    with graph([table]) as context:
        for ids in ([3], [49, 0, 7, 7, 12, 1, 49, 30]):
            numbers = np.array(ids, np.int32)
            y = np.full((len(ids), INPUTS), np.nan, np.float32)
            run(context.ask_tensor(rows_node(b"embd", numbers, y)), threads)
            assert np.array_equal(y, expected[ids])
            assert context.error() == ""
        for wrong in (50, -1, 2**31 - 1):
            numbers = np.array([4, wrong, 5], np.int32)
            y = np.full((3, INPUTS), np.nan, np.float32)
            run(context.ask_tensor(rows_node(b"embd", numbers, y)), threads)
            assert np.array_equal(y[::2], expected[[4, 5]]) and not y[1].any()
            assert context.error() == "embd: a token id outside the vocabulary"


def test_a_product_in_a_shape_that_is_not_handled_is_refused_and_left_alone() -> None:
    table = Linear(b"embd", (integers(INPUTS, OUTPUTS, Grid(4, 64), seed=5),), 0, ROWS_ONLY)
    x = np.zeros((3, INPUTS), np.float32)
    with graph([*linears(), table]) as context:

        def refused(change: Callable[[Node], object], name: bytes = b"q") -> str:
            node = Node(Linear(name, (), 0, -1), x, matrix(x))
            change(node)
            context.ask_tensor(node.tensor)
            assert node.tensor.op == MUL_MAT
            return context.error()

        handled = "llama.cpp multiplies with the matrix in a shape that is not handled"
        changes: list[Callable[[Node], object]] = [
            lambda node: setattr(node.input, "type", 1),
            lambda node: setattr(node.tensor, "type", 1),
            lambda node: setattr(node.input, "nb", (8, 8 * INPUTS, 1, 1)),
            lambda node: setattr(node.tensor, "nb", (8, 8 * OUTPUTS, 1, 1)),
            lambda node: setattr(node.input, "nb", (4, 4 * INPUTS + 2, 1, 1)),
            lambda node: setattr(node.tensor, "nb", (4, 4 * OUTPUTS + 2, 1, 1)),
            lambda node: setattr(node.input, "ne", (INPUTS + 1, 3, 1, 1)),
            lambda node: setattr(node.tensor, "ne", (OUTPUTS - 1, 3, 1, 1)),
            lambda node: setattr(node.input, "ne", (INPUTS, 3, 2, 1)),
            lambda node: setattr(node.input, "ne", (INPUTS, 3, 1, 2)),
        ]
        for change in changes:
            assert refused(change) == f"q: {handled}"
        assert refused(lambda node: None, b"embd") == f"embd: {handled}"
        most = (INPUTS, MOST_TOKENS + 1, 1, 1)
        assert (
            refused(lambda node: setattr(node.input, "ne", most))
            == "q: more tokens at a time than the context was made for"
        )
        assert refused(lambda node: None, b"of others") == ""


def test_more_threads_than_there_is_scratch_for_compute_nothing() -> None:
    rng = np.random.default_rng(6)
    linear = linears()[0]
    x = activations(2, rng)
    with graph(linears(), threads=2) as context:
        node = context.ask(Node(linear, x, matrix(x)))
        assert np.isnan(node.run(3)).all()
        assert context.error() == "q: more threads than the context was made for"
        assert np.array_equal(node.run(2), linear(x))
