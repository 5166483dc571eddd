"""Packed leaves and the modules made of them: true size, exact numbers, and an nn.Linear to everybody else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from torch import nn

from compot_deploy.core.grid import DENSE, Codebook, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Quantized
from compot_deploy.core.packed import LeafScheme, PackedStorage, dequantize_rows, pack, unpack
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.transformers_plugin.modules import CompotEmbedding, CompotLinear, LeafModule, schemes_of

GRIDS = [Grid(bits, 16) for bits in (2, 3, 4, 8)] + [Grid(4, 16, "nf4"), Grid(4, 32, "fp4")]


def sparse_mask(rows: int, columns: int, pattern: Pattern) -> torch.Tensor:
    """Exactly the pattern: `kept` random entries of every `of` neighbours."""
    groups = -(-rows // pattern.of)
    scores = torch.rand(groups, pattern.of, columns)
    threshold = scores.sort(dim=1, descending=True).values[:, pattern.kept - 1 : pattern.kept]
    return (scores >= threshold).view(-1, columns)[:rows]


def random_leaf(rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> Leaf:
    mask = sparse_mask(rows, columns, pattern)
    if grid is None:
        return Dense(torch.randn(rows, columns) * mask)
    integers = torch.randint(grid.lowest, grid.highest + 1, (rows, columns)) * mask
    scales = (0.1 * torch.randn(grid.groups(rows), columns)).half()
    return Quantized(integers.to(torch.int8), scales, grid)


def random_factorized(
    name: str = "a", inputs: int = 48, atoms: int = 32, outputs: int = 24, pairs: int = 1
) -> Factorized:
    grid, pattern = Grid(4, 16), Pattern(atoms // 2, atoms)
    return Factorized(
        tuple(
            FactorPair(
                random_leaf(inputs, atoms, grid), random_leaf(atoms, outputs, grid, pattern), name, pattern
            )
            for _ in range(pairs)
        )
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 5),
    grid=st.sampled_from([*GRIDS, None]),
    pattern=st.sampled_from([DENSE, Pattern(2, 4), Pattern(4, 8), Pattern(5, 16)]),
)
def test_packing_is_exact_and_takes_what_the_storage_says(
    rows: int, columns: int, grid: Grid | None, pattern: Pattern
) -> None:
    leaf = random_leaf(rows, columns, grid, pattern)
    packed = pack(leaf, pattern)
    scheme = LeafScheme.of(leaf, pattern)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == scheme.tensors
    size = sum(tensor.nbytes for tensor in packed.values())
    assert size == scheme.nbytes == PackedStorage().leaf_bytes(rows, columns, grid, pattern)
    assert same_matrix(unpack(packed, scheme), leaf)
    assert torch.equal(dequantize_rows(packed, scheme).T, leaf.dequantize())


def test_half_of_the_codes_being_zero_is_a_quarter_less_at_four_bits() -> None:
    dense = LeafScheme(64, 8, Grid(4, 32)).nbytes
    sparse = LeafScheme(64, 8, Grid(4, 32), Pattern(32, 64)).nbytes
    assert (dense, sparse) == (8 * (32 + 4), 8 * (16 + 8 + 4))
    assert not LeafScheme(64, 8, Grid(2, 32), Pattern(32, 64)).sparse, "a mask costs what it saves"


def test_zeros_never_lie_in_dense_floats() -> None:
    scheme = LeafScheme(64, 8, None, Pattern(32, 64))
    assert scheme.tensors["values"] == ((8, 32), torch.float32)
    assert scheme.tensors["mask"] == ((8, 8), torch.uint8)


def test_more_codes_than_the_pattern_allows_are_refused() -> None:
    leaf = Dense(torch.ones(8, 2))
    with pytest.raises(ValueError, match="4 of 4 neighbours are non-zero, and the pattern is 2:4"):
        pack(leaf, Pattern(2, 4))


def test_an_integer_outside_its_grid_is_refused() -> None:
    leaf = Quantized(torch.full((4, 1), 9, dtype=torch.int8), torch.ones(1, 1).half(), Grid(4, 16))
    with pytest.raises(ValueError, match="9 do not fit int4/g16"):
        pack(leaf)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ArtifactError, match="-3 x 5 is impossible"):
        LeafScheme(-3, 5)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_integer_zero_of_a_codebook_is_exactly_zero(codebook: Codebook) -> None:
    grid = Grid(4, 16, codebook)
    integers = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.int8)[:, None]
    values = Quantized(integers, torch.ones(1, 1).half(), grid).dequantize().flatten()
    assert [int(i) for i in integers[values == 0]] == [0]
    assert float(values.abs().max()) == 1.0


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_linear_computes_its_factors_and_gives_them_back(pairs: int) -> None:
    matrix, bias = random_factorized(pairs=pairs), torch.randn(24)
    linear, x = CompotLinear.of(matrix, bias), torch.randn(3, 5, 48)
    assert same_matrix(linear.matrix_of("a"), matrix)
    expected = bias + sum(x @ p.dictionary.dequantize() @ p.codes.dequantize() for p in matrix.pairs)
    assert torch.allclose(linear(x), expected, atol=1e-6)
    assert torch.allclose(linear.weight, matrix.dequantize().T, atol=1e-6)
    assert not [name for name, _ in linear.named_parameters() if name != "bias"]


def test_casting_a_model_leaves_integers_and_scales_alone() -> None:
    matrix = random_factorized()
    linear = CompotLinear.of(matrix, torch.randn(24)).to(torch.bfloat16)
    assert same_matrix(linear.matrix_of("a"), matrix)
    assert linear(torch.randn(2, 48).bfloat16()).dtype == torch.bfloat16


def test_floating_factors_follow_a_cast() -> None:
    pattern = Pattern(16, 32)
    pair = FactorPair(random_leaf(48, 32, None), random_leaf(32, 24, None, pattern), "a", pattern)
    linear = CompotLinear.of(Factorized((pair,))).half()
    assert linear.matrix_of("a").dequantize().shape == (48, 24)
    assert linear(torch.randn(2, 48).half()).dtype == torch.float16


def test_a_shared_dictionary_is_stored_once_and_survives_a_deep_copy() -> None:
    first, second = random_factorized(), random_factorized()
    second = Factorized(
        (FactorPair(first.pairs[0].dictionary, second.pairs[0].codes, "a", second.pairs[0].pattern),)
    )
    owner = CompotLinear.of(first)
    model = nn.ModuleDict({"owner": owner, "user": CompotLinear.of(second, owner=owner)})
    assert sorted(name for name in model.state_dict() if "dictionary" in name) == [
        "owner.dictionary0.integers",
        "owner.dictionary0.scales",
    ]
    copied = copy.deepcopy(model)
    model["owner"].dictionary0.integers.zero_()
    x = torch.randn(2, 48)
    expected = CompotLinear.of(second)(x)
    assert torch.equal(copied["user"](x), expected)
    assert not torch.equal(model["user"](x), expected)


def test_the_weight_of_factors_can_be_read_but_never_written() -> None:
    linear = CompotLinear.of(random_factorized())
    with pytest.raises(InputError, match="cannot be changed in place"):
        linear.weight.data += 1
    with pytest.raises(InputError, match="cannot be replaced"):
        linear.weight.data = torch.zeros(24, 48)
    with pytest.raises((KeyError, AttributeError)):
        linear.weight = nn.Parameter(torch.zeros(24, 48))


def test_gradients_pass_through_to_the_input() -> None:
    linear, x = CompotLinear.of(random_factorized()), torch.randn(2, 48, requires_grad=True)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(2, -1), atol=1e-5)


def test_a_table_gives_rows_and_a_tied_head_uses_the_same_numbers() -> None:
    table = random_leaf(48, 30, Grid(8, 16))
    embedding = CompotEmbedding(schemes_of(table)[0])
    embedding.matrix.fill(table)
    head = CompotLinear.of(table, owner=embedding)
    ids = torch.tensor([[3, 0], [29, 3]])
    assert torch.equal(embedding(ids), table.dequantize().T[ids])
    assert not list(head.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(head(x), x @ table.dequantize()) or torch.allclose(head(x), x @ table.dequantize())
    assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_leaf_of_another_scheme_is_refused() -> None:
    module = LeafModule(LeafScheme(8, 4, Grid(4, 16)))
    with pytest.raises(ValueError, match="does not fit the scheme"):
        module.fill(random_leaf(8, 4, Grid(8, 16)))
