"""Laws of seeing matrices: every product with a parameter is noted, by what it was multiplied with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear
from whole_models import hooked_grams, loaded

from compot_deploy.models.sites import (
    Gram,
    InputGroup,
    Products,
    Site,
    add_gram,
    blocks_of,
    discover,
    importance,
    real_rows,
)
from compot_deploy.models.source import open_source
from compot_deploy.models.streaming import BlockStream


def seen(module: nn.Module, *inputs: Tensor) -> list[tuple[str, ...]]:
    """Names of the sites of every input."""
    mode = Products(module, "")
    with mode, torch.no_grad():
        module(*inputs)
    return [group.names for group, _ in mode.groups("")]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)  # the same numbers in the same memory
        return self.out(self.query(x).reshape(-1, 4) * self.key(flat))


def test_matrices_that_read_one_tensor_are_one_group() -> None:
    assert seen(Attention(), torch.randn(2, 3, 6)) == [("query", "key"), ("out",)]


def test_a_conv1d_is_kept_as_in_by_out() -> None:
    from transformers.pytorch_utils import Conv1D

    module = nn.Sequential(Conv1D(5, 3), nn.Linear(5, 2))
    mode = Products(module, "block")
    with mode:
        module(torch.randn(4, 3))
    first, second = (one.site for one in mode.seen)
    assert first == Site("block.0.weight", None, 3, 5, transposed=False)
    assert second == Site("block.1.weight", None, 5, 2, transposed=True)
    assert (first.name, first.shape, second.shape) == ("block.0", (3, 5), (5, 2))


class Experts(nn.Module):
    """Slices of one stacked parameter, each read by some of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x[number::3], self.up[number]) for number in range(3)])


def test_slices_of_a_stacked_parameter_are_matrices_of_their_own() -> None:
    module, x = Experts(), torch.randn(7, 4)
    mode = Products(module, "m")
    with mode:
        module(x)
    assert [one.site for one in mode.seen] == [Site("m.up", number, 4, 5) for number in range(3)]
    assert [one.site.name for one in mode.seen] == ["m.up.0", "m.up.1", "m.up.2"]
    assert [len(one.values) for one in mode.seen] == [3, 2, 2]
    assert len(mode.groups("m")) == 3


class InTurn(nn.Module):
    """Three inputs of one size that are made and forgotten, so that memory would be used again."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for number, part in enumerate(self.parts):
            made = x + number
            total = total + part(made).sum()
            del made
        return total


def test_inputs_that_take_the_same_memory_one_after_the_other_are_told_apart() -> None:
    for _ in range(10):
        assert seen(InTurn(), torch.randn(64, 64)) == [("parts.0",), ("parts.1",), ("parts.2",)]


def test_a_part_of_a_tensor_is_another_input() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2)
            return self.left(first) + self.right(second)

    assert seen(Halves(), torch.randn(6, 4)) == [("left",), ("right",)]


def test_what_is_no_product_with_a_parameter_of_the_block_is_not_seen() -> None:
    other = nn.Linear(4, 4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.norm, self.table = nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(9, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.table(tokens))
            return linear(other(self.own(x)), torch.randn(4, 4))

    assert seen(Block(), torch.tensor([1, 2, 3])) == [("own",)]


def test_a_table_that_is_left_out_is_no_matrix_of_the_block() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))
    mode = Products(module, "", skip=[module[1].weight])
    with mode:
        module(torch.randn(2, 4))
    assert [one.site.name for one in mode.seen] == ["0"]


def test_a_matrix_that_is_read_twice_belongs_where_it_was_first() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.a(y) + self.b(y)

    layout = discover(Twice(), {"x": torch.randn(2, 4)})
    assert layout.blocks == ("",)
    assert [group.names for group in layout.groups] == [("a",), ("b",)]
    assert layout.embedding is None and layout.head is None


def test_names_of_groups_are_the_same_in_every_like_block() -> None:
    sites = (Site("m.layers.3.attn.q.weight", None, 4, 4), Site("m.layers.3.attn.k.weight", None, 4, 4))
    group = InputGroup("m.layers.3", sites)
    assert group.name == "attn.q"
    assert group.names == ("m.layers.3.attn.q", "m.layers.3.attn.k")


def test_looking_leaves_the_model_as_it_was() -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    layout = discover(model, {"input_ids": tokens})
    assert layout.blocks == blocks_of(model) == ("transformer.h.0", "transformer.h.1")
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_is_left_out_where_rows_belong_to_tokens() -> None:
    values = torch.arange(12.0).reshape(2, 3, 2)
    real = torch.tensor([[True, True, False], [True, False, False]])
    assert real_rows(values, real).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert torch.equal(real_rows(values.reshape(6, 2), real), real_rows(values, real))
    pooled = values[:, 0]
    assert torch.equal(real_rows(pooled, real), pooled)
    assert len(real_rows(values)) == 6


def test_grams_are_summed_in_double_precision() -> None:
    sums: dict[str, Gram] = {}
    rows = torch.full((1, 1), 1e4)
    for _ in range(3):
        add_gram(sums, "x", rows)
    add_gram(sums, "x", torch.full((1, 1), 1e-2))
    assert sums["x"].tokens == 4
    assert float(sums["x"].matrix) == pytest.approx(3e8 + 1e-4, rel=1e-15)
    assert float(sums["x"].matrix) != 3e8


def test_importance_is_the_diagonal_relative_to_its_mean() -> None:
    gram = torch.tensor([[1.0, 9.0], [9.0, 3.0]], dtype=torch.float64)
    assert importance(gram).tolist() == [0.5, 1.5]
    assert importance(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [1.0, 1.0]


def test_blocks_that_share_their_weights_are_run_as_one(tmp_path: Path) -> None:
    """ALBERT: one layer, used again and again; its matrices are there once, and see every pass."""
    config = transformers.AlbertConfig(
        vocab_size=320,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.layout.blocks == ("",)
    names = source.layout.names
    assert len(names) == len(set(names)) and any(name.endswith("ffn_output") for name in names)
    windows = [torch.randint(3, 320, (length,)) for length in (20, 9)]
    expected = hooked_grams(loaded(tmp_path, "AutoModel"), names, windows)
    with BlockStream(source, source.task.batches(windows), finish=True) as stream:
        grams = stream.advance()
    for group in source.layout.groups:
        if group.name != "pooler":
            assert grams[group.name].tokens == 29 * (3 if "layers" in group.name else 1)
        torch.testing.assert_close(grams[group.name].matrix, expected[group.names[0]], rtol=1e-4, atol=1e-3)
