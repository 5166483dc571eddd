"""Laws of what a model is: its matrices, its tables, its task, asked of transformers without a weight being read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import any_models
import pytest
import tiny
import torch
from cases import some_by_day
from whole_models import Recorded, loaded

from compot_deploy.models.source import open_source
from compot_deploy.models.whole import whole_model


@pytest.mark.parametrize("kind", some_by_day((*tiny.KINDS, *any_models.KINDS)))
def test_every_matrix_of_the_blocks_is_found_and_turned_the_right_way(kind: str, tmp_path: Path) -> None:
    """`y = x W + b` for every module of the blocks that holds a matrix, and there are no others."""
    source = open_source((tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind))
    model = loaded(source.folder, source.task.auto_class)
    wanted = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name.startswith(source.layout.blocks)
    ]
    assert sorted(source.layout.names) == sorted(wanted)
    assert len(source.layout.blocks) == source.layers == 2
    for name in wanted:
        module, weight = model.get_submodule(name), source.weight(name)
        assert tuple(weight.shape) == source.shape(name) == source.sites[name].shape
        x = torch.randn(3, weight.shape[0])
        y = x @ weight + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)
    embedding, head = source.layout.embedding, source.layout.head
    assert embedding is not None
    assert torch.equal(model.get_input_embeddings().weight, source.weight(embedding).T)
    if source.task.kind in ("generation", "masked"):
        assert head is not None and model.get_submodule(head) is model.get_output_embeddings()
        assert source.tied is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    else:
        assert head is None and not source.tied


@pytest.mark.parametrize("kind", some_by_day((*tiny.KINDS, *any_models.KINDS)))
def test_a_model_says_what_it_is_without_a_weight_being_read(kind: str, tmp_path: Path) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    source = open_source(folder)
    tensors = Recorded(source.tensors)
    source = replace(source, tensors=tensors)
    tensors.read.clear()  # whoever checks types looks at one
    assert [source.shape(name) for name in source.layout.names]
    assert source.vocabulary == 320
    assert not tensors.read


def test_tasks_are_told_apart_by_the_class_that_the_configuration_names(tmp_path: Path) -> None:
    found = {}
    for kind in any_models.KINDS:
        task = open_source(any_models.save(tmp_path / kind, kind)).task
        found[kind] = task.kind
        assert task.generates is (kind in any_models.DECODERS)
        assert task.classifies is (task.kind != "embedding")
    assert {kind: found[kind] for kind in any_models.READERS} == {
        "bert": "embedding",
        "bert masked": "masked",
        "bert classes": "classification",
        "bert token classes": "token-classification",
        "distilbert": "embedding",
        "roberta": "embedding",
        "gpt2 classes": "classification",
    }


@pytest.mark.parametrize("kind", some_by_day((*tiny.KINDS, *any_models.KINDS)))
def test_a_text_as_long_as_the_context_can_be_read(kind: str, tmp_path: Path) -> None:
    source = open_source((tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind))
    assert 200 < source.context <= 256
    tokens = torch.randint(3, 320, (source.context,))
    (batch,) = source.task.batches([tokens])
    with torch.no_grad():
        result = source.task.output(whole_model(source)(**batch.arguments))
    assert bool(torch.isfinite(result).all())
