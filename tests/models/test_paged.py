"""Laws of paged models: they compute what whole ones compute, and hold the weights of one block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from cases import some_by_day
from exported_models import compressed, some_of_everything

from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.errors import InputError
from compot_deploy.models.paged import compressed_to_run, original_to_run
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.whole import model_of, put_in, whole_model

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def outputs(source: ModelSource, model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return source.task.output(model(input_ids=TOKENS))


def weights_there(model: Any, source: ModelSource) -> int:
    """Parameters of blocks that are in memory."""
    blocks = tuple(f"{path}." for path in source.layout.blocks)
    return sum(not value.is_meta for name, value in model.named_parameters() if name.startswith(blocks))


@pytest.fixture(params=some_by_day((*tiny.KINDS, *any_models.KINDS)))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSource:
    save = tiny.save if request.param in tiny.KINDS else any_models.save
    return open_source(save(tmp_path / "model", request.param))


def test_a_paged_original_computes_what_the_whole_one_does(source: ModelSource) -> None:
    paged = original_to_run(source, held=0)
    expected = outputs(source, whole_model(source))
    for _ in range(2):
        assert weights_there(paged, source) == 0
        assert torch.equal(outputs(source, paged), expected)
    make = some_of_everything(source)
    matrices = {name: make(name, source.weight(name)) for name in source.layout.names}
    changed = outputs(source, original_to_run(source, matrices, held=0))
    assert torch.equal(changed, outputs(source, put_in(whole_model(source), source.sites, matrices)))
    assert not torch.equal(changed, expected)


def test_a_paged_compressed_model_computes_what_the_whole_one_does(source: ModelSource) -> None:
    given = compressed(source, some_of_everything(source))
    paged = compressed_to_run(given, held=0)
    expected = outputs(source, model_of(given))
    for _ in range(2):
        assert weights_there(paged, source) == 0
        assert torch.equal(outputs(source, paged), expected)


def test_what_is_small_is_held_as_a_whole(tmp_path: Path) -> None:
    source = open_source(tiny.save(tmp_path / "model", "llama"))
    assert weights_there(original_to_run(source), source) > 0


def test_a_paged_model_writes_with_its_cache(tmp_path: Path) -> None:
    source = open_source(tiny.save(tmp_path / "model", "qwen3"))
    whole, paged = (TorchRunner(model) for model in (whole_model(source), original_to_run(source, held=0)))
    prompts = [(1, 7, 9), (4, 5, 6)]
    assert paged.generate_all(prompts, 8) == whole.generate_all(prompts, 8)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    for one, other in zip(paged.logits(tokens, 2), whole.logits(tokens, 2), strict=True):
        assert torch.equal(one, other)


def test_one_block_is_in_memory_at_a_time_and_none_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny.save(tmp_path / "model", "llama"))
    paged, blocks = original_to_run(source, held=0), source.layout.blocks
    seen: list[int] = []
    for path in blocks:
        paged.get_submodule(path).mlp.register_forward_hook(
            lambda *_: seen.append(weights_there(paged, source))
        )
    outputs(source, paged)
    assert seen == [weights_there(whole_model(source), source) // len(blocks)] * len(blocks)

    def fails(*_: Any, **__: Any) -> None:
        raise InputError("damaged")

    monkeypatch.setattr(paged.get_submodule(blocks[1]).mlp, "forward", fails)
    with pytest.raises(InputError):
        outputs(source, paged)
    assert weights_there(paged, source) == 0
