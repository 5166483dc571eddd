"""Laws of sequential calibration: later blocks are made for what the compressed earlier ones give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from matrices import same_matrix
from torch import Tensor

from compot_deploy.accuracy.torch_runner import torch_runner
from compot_deploy.core.grid import Grid
from compot_deploy.core.store import StoredMatrices
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import make_windows
from compot_deploy.pipeline import deploy as pipeline
from compot_deploy.planning import carry_out as planning
from compot_deploy.planning.candidates import Search
from compot_deploy.planning.carry_out import Task
from compot_deploy.planning.knapsack import Plan, plain_plan
from compot_deploy.planning.schemes import GridChoice
from compot_deploy.planning.settings import shape_of
from compot_deploy.recipe import Recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(str(tiny.save(tmp_path_factory.mktemp("model") / "tiny")))


def task_of(checkpoint: ModelSource, work: Path, sequential: bool) -> Task:
    exporter = EXPORTERS["onnx"]
    tokens = torch.randint(3, 320, (4, 40), generator=torch.Generator().manual_seed(0))
    work.mkdir()
    return Task(
        checkpoint=checkpoint,
        windows=make_windows(list(tokens), "random", 320),
        work=work,
        storage=exporter.storage(exporter.options({})),
        search=Search(GridChoice({2: (32,)})),
        sequential=sequential,
    )


@pytest.fixture(scope="module")
def coarse(checkpoint: ModelSource) -> Plan:
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    exporter = EXPORTERS["onnx"]
    storage = exporter.storage(exporter.options({}))
    return plain_plan({name: shape_of(checkpoint, name) for name in names}, Grid(2, 32), storage)


def test_grams_are_those_of_the_model_with_its_compressed_blocks(
    checkpoint: ModelSource, coarse: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(checkpoint, tmp_path / "work", sequential=True)
    seen: dict[int, Mapping[str, Tensor]] = {}
    make = planning._make_block

    def make_and_remember(task: Task, plan: Plan, layer: int, grams: Any, path: Path) -> None:
        seen[layer] = grams
        make(task, plan, layer, grams, path)

    monkeypatch.setattr(planning, "_make_block", make_and_remember)
    planning.collect_grams(task)
    outcome = planning.carry_out(task, [coarse])
    torch.testing.assert_close(seen[0], task.grams(0))  # nothing stands before the first block

    model = torch_runner(checkpoint.folder)._model
    first = {name: matrix for name, matrix in StoredMatrices(outcome.files).items() if ".layers.0." in name}
    with torch.no_grad():
        for name, matrix in first.items():
            model.get_submodule(name).weight.copy_(matrix.dequantize().T)
    inputs = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        for window in task.windows.windows:
            model(window[None])
    rows = torch.cat(inputs)
    expected = rows.T @ rows
    (hidden,) = [entry.name for entry in checkpoint.architecture.inputs if "mlp.down_proj" in entry.linears]
    torch.testing.assert_close(seen[1][hidden], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((task.grams(1)[hidden] - expected).abs().max()) > 0.01 * float(expected.abs().max())


def test_a_run_that_was_stopped_goes_on_to_the_same_matrices(
    checkpoint: ModelSource, coarse: Plan, tmp_path: Path
) -> None:
    task = task_of(checkpoint, tmp_path / "work", sequential=True)
    whole = planning.carry_out(task, [coarse])
    files = list(dict.fromkeys(whole.files.values()))
    before = files[-1].read_bytes()
    files[-1].unlink()
    again = planning.carry_out(task, [coarse])
    assert files[-1].read_bytes() == before
    assert again.facts == whole.facts
    # and it is not what the original model's Grams give
    other = task_of(checkpoint, tmp_path / "other", sequential=False)
    planning.collect_grams(other)
    apart = planning.carry_out(other, [coarse])
    equal = {
        name: same_matrix(StoredMatrices(whole.files)[name], StoredMatrices(apart.files)[name])
        for name in whole.files
    }
    assert all(same for name, same in equal.items() if ".layers.0." in name)
    assert not any(same for name, same in equal.items() if ".layers.1." in name)


def test_a_ratio_can_be_calibrated_block_after_block(checkpoint: ModelSource, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text((tiny.WORDS + "\n") * 100)
    made = {}
    for sequential in (False, True):
        recipe = Recipe(
            model=str(checkpoint.folder),
            calibration=str(text),
            samples=6,
            length=32,
            rounds=3,
            allocation="uniform",
            sequential=sequential,
        )
        work = tmp_path / str(sequential)
        work.mkdir()
        made[sequential] = pipeline.compress(recipe, checkpoint, work).model.matrices
    for name in checkpoint.architecture.linear_names(checkpoint.layers):
        assert same_matrix(made[False][name], made[True][name]) is (".layers.0." in name), name
