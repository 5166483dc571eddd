"""Laws of whole models: they are the original, other matrices take their place and go again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from cases import some_by_day
from torch import Tensor
from whole_models import loaded

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.store import Without
from compot_deploy.errors import InputError
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.whole import model_of, replaced, whole_model
from compot_deploy.quant import rtn

KINDS = (*tiny.KINDS, *any_models.KINDS)
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@pytest.fixture(params=some_by_day(KINDS))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSource:
    save = tiny.save if request.param in tiny.KINDS else any_models.save
    return open_source(save(tmp_path / "model", request.param))


def run(source: ModelSource, model: Any) -> Tensor:
    with torch.no_grad():
        return source.task.output(model(input_ids=TOKENS))


def test_a_whole_model_is_the_original(source: ModelSource) -> None:
    model = whole_model(source)
    torch.testing.assert_close(run(source, model), run(source, loaded(source.folder, source.task.auto_class)))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert not model.training


def test_replaced_matrices_come_back(source: ModelSource) -> None:
    model = whole_model(source)
    before = run(source, model)
    made = {
        name: rtn(source.weight(name).float().contiguous(), None, Grid(2, 64))
        for name in source.layout.names[-2:]
    }
    with replaced(model, source, made):
        during = run(source, model)
    assert torch.equal(run(source, model), before)
    assert not torch.equal(before, during)

    slow = loaded(source.folder, source.task.auto_class)
    with torch.no_grad():
        for name, matrix in made.items():
            weight = matrix.dequantize()
            conv1d = type(slow.get_submodule(name)).__name__ == "Conv1D"
            slow.get_submodule(name).weight.copy_(weight if conv1d else weight.T)
    torch.testing.assert_close(during, run(source, slow))

    with pytest.raises(ZeroDivisionError), replaced(model, source, made):
        _ = 1 / 0
    assert torch.equal(run(source, model), before)


def compressed(source: ModelSource) -> CompressedModel:
    """Every matrix and table on a grid, everything else as it is; the untied head apart."""
    layout = source.layout
    tables = [name for name in (layout.embedding, None if layout.tied else layout.head) if name]
    matrices: dict[str, Matrix] = {
        name: rtn(source.weight(name).float().contiguous(), None, Grid(4, 32))
        for name in (*layout.names, *tables)
    }
    written = {site.parameter for site in layout.sites}
    written |= {f"{name}.weight" for name in (layout.embedding, layout.head) if name}
    return CompressedModel(
        source.architecture,
        source.config,
        matrices,
        Without(source.tensors, written),
        layout.tied,
        str(source.folder),
        Tables(layout.embedding, layout.head),
    )


def test_a_compressed_model_is_the_original_with_its_matrices_multiplied_out(source: ModelSource) -> None:
    model = compressed(source)
    slow = loaded(source.folder, source.task.auto_class)
    before = run(source, slow)
    with torch.no_grad():
        for name, matrix in model.matrices.items():
            weight = matrix.dequantize()
            conv1d = type(slow.get_submodule(name)).__name__ == "Conv1D"
            slow.get_submodule(name).weight.copy_(weight if conv1d else weight.T)
    found = run(source, model_of(model))
    torch.testing.assert_close(found, run(source, slow))
    assert not torch.allclose(found, before, rtol=1e-2)


def test_what_a_compressed_model_lacks_or_has_too_much_is_named(tmp_path: Path) -> None:
    from dataclasses import replace

    model = compressed(open_source(any_models.save(tmp_path / "model", "gpt2")))
    name = "transformer.h.1.mlp.c_fc"
    less = {key: matrix for key, matrix in model.matrices.items() if key != name}
    with pytest.raises(InputError, match=rf"lacks {name}\.weight"):
        model_of(replace(model, matrices=less))
    wrong = dict(model.matrices) | {name: Dense(torch.zeros(64, 32))}
    with pytest.raises(
        InputError, match=r"c_fc\.weight has the shape \(64, 160\) in the model, not \(64, 32\)"
    ):
        model_of(replace(model, matrices=wrong))
    with pytest.raises(InputError, match=r"has no weight transformer\.h\.7\.mlp\.c_fc\.weight to replace"):
        model_of(
            replace(
                model, matrices=dict(model.matrices) | {"transformer.h.7.mlp.c_fc": Dense(torch.zeros(2, 2))}
            )
        )
    with pytest.raises(InputError, match=r"no tensor transformer\.wrong"):
        model_of(replace(model, tensors={**model.tensors, "transformer.wrong": torch.zeros(2)}))
