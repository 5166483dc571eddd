"""Laws of what is divided: pure functions of what can be sent, so that nobody can tell who computed them, and when."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import any_models
import pytest
import torch
from cases import nightly
from divided import Far, recipes_in, result_of
from folders import differences
from places import few_schemes

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.cluster.tensors import packed, unpacked
from compot_deploy.models.block_run import PARTS, parts_of
from compot_deploy.models.sites import Gram
from compot_deploy.models.source import open_source
from compot_deploy.models.streaming import BlockStream
from compot_deploy.pipeline import deploy as deploy_module
from compot_deploy.pipeline.deploy import run
from compot_deploy.recipe import override

EXPECTED = {
    "predicted": {"run_part", "points_of", "errors_of", "make_input"},
    "measured block by block": {"run_part", "points_of", "make_input"},
    "by rule": {"run_part", "spectrum_of", "make_input"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["by rule", *nightly("predicted", "measured block by block")])
def test_everything_can_be_computed_elsewhere_in_any_order(name: str, tmp_path: Path) -> None:
    recipes = recipes_in(tmp_path)
    assert set(recipes) == set(EXPECTED)
    far = Far()
    with few_schemes():
        elsewhere = result_of(recipes[name], tmp_path / "far", far)
        assert elsewhere == result_of(recipes[name], tmp_path / "near")
    assert set(far.asked) - {"smallest_of"} == EXPECTED[name]


@pytest.mark.slow
def test_a_folder_does_not_tell_who_computed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of it, what it says of losses included; the text is read by workers too."""
    far, out = Far(), {name: tmp_path / name / "out" for name in ("near", "far")}
    recipe = recipes_in(tmp_path)["predicted"]
    changed = {"evaluation_tokens": 256, "max_perplexity_ratio": 1e9, "format": ("huggingface",)}
    with few_schemes():
        run(override(recipe, out=str(out["near"]), **changed))
        monkeypatch.setattr(deploy_module, "workers_of", lambda cluster: nullcontext(far))
        run(override(recipe, out=str(out["far"]), cluster="local", **changed))
    assert far.asked.count("read") >= 2
    assert list(differences(out["near"], out["far"])) == []


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "bert", "albert", "gpt2 classes"])
def test_grams_are_the_same_wherever_blocks_run(kind: str, tmp_path: Path) -> None:
    """Also of models whose layers share their weights, which are run as a whole."""
    source = open_source(any_models.save(tmp_path, kind))
    windows = [torch.randint(3, 300, (100 + number,)) for number in range(24)]
    batches = [batch for window in windows for batch in source.task.batches([window])]

    def grams(workers: Workers) -> dict[str, Gram]:
        found: dict[str, Gram] = {}
        heads: list[Gram | None] = []
        with BlockStream(source, batches, at_head=heads.append, workers=workers) as stream:
            for block in source.layout.blocks:
                found |= {f"{block} {name}": gram for name, gram in stream.advance().items()}
        return found | {f"head {number}": head for number, head in enumerate(heads) if head is not None}

    far = Far()
    here, there = grams(ALONE), grams(far)
    assert here.keys() == there.keys() and len(here) >= len(source.layout.groups)
    assert far.asked == ["run_part"] * (PARTS * len(source.layout.blocks) if kind != "albert" else 0)
    for name, gram in here.items():
        assert gram.tokens == there[name].tokens and torch.equal(gram.matrix, there[name].matrix), name


TENSORS: Final = {
    "whole": torch.randn(3, 4),
    "transposed": torch.randn(3, 4).T,
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "a part": torch.randn(6, 8)[1::2, ::2],
    "a part transposed": torch.randn(4, 6)[:, 2:4].T,
    "repeated": torch.randn(4, 1, 3).expand(4, 5, 3),
    "empty": torch.zeros(0, 3),
    "a number": torch.tensor(2.0),
    "bfloat16": torch.randn(5).bfloat16(),
    "truth": torch.tensor([True, False]),
    "small": torch.randint(-9, 9, (3, 3), dtype=torch.int8),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_as_it_was_sent(name: str) -> None:
    tensor = TENSORS[name]
    sent = pickle.dumps(packed(tensor), 5)
    found = unpacked(pickle.loads(sent))
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    if name in ("whole", "transposed", "permuted"):  # dense as they are
        assert found.stride() == tensor.stride()
    assert len(sent) < tensor.numel() * tensor.element_size() + 1000  # not what else lies beside it


def test_a_tensor_without_numbers_arrives_without() -> None:
    tensor = torch.empty(1000, 1000, device="meta").T
    found = unpacked(pickle.loads(pickle.dumps(packed(tensor))))
    assert found.is_meta and found.shape == tensor.shape and found.stride() == tensor.stride()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 100])
def test_parts_follow_each_other_and_are_even(count: int) -> None:
    parts = parts_of(range(count))
    assert [number for part in parts for number in part] == list(range(count))
    assert len(parts) == min(PARTS, count)
    assert max(map(len, parts), default=0) - min(map(len, parts), default=0) <= 1
