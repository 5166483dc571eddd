"""Laws of sequential calibration: matrices are made for what the compressed ones before them give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from matrices import same_matrix
from torch import Tensor
from whole_models import hooked_grams, loaded

from compot_deploy.core.grid import Grid
from compot_deploy.core.store import StoredMatrices, load_matrices
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import make_windows
from compot_deploy.models.whole import put_in, whole_model
from compot_deploy.pipeline.compress import compress
from compot_deploy.planning import carry_out as planning
from compot_deploy.planning.candidates import Search
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.knapsack import Plan, plain_plan
from compot_deploy.planning.schemes import GridChoice
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe

KINDS = ("llama", "gpt2", "bert")


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    save = tiny.save if request.param in tiny.KINDS else any_models.save
    return open_source(save(tmp_path_factory.mktemp("model") / request.param, request.param))


def context_of(source: ModelSource, work: Path, sequential: bool) -> PlanningContext:
    exporter = EXPORTERS["onnx"]
    tokens = torch.randint(3, 320, (4, 40), generator=torch.Generator().manual_seed(0))
    work.mkdir()
    return PlanningContext(
        source=source,
        windows=make_windows(list(tokens), "random", 320),
        work=work,
        storage=exporter.storage(exporter.options({})),
        search=Search(GridChoice({2: (32,)})),
        sequential=sequential,
    )


@pytest.fixture
def coarse(source: ModelSource) -> Plan:
    exporter = EXPORTERS["onnx"]
    storage = exporter.storage(exporter.options({}))
    return plain_plan({site.name: site.shape for site in source.layout.sites}, Grid(2, 32), storage)


def test_grams_are_those_of_the_model_with_its_compressed_blocks(
    source: ModelSource, coarse: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(source, tmp_path / "work", sequential=True)
    seen: dict[str, Mapping[str, Tensor]] = {}
    keep = planning._Blocks.keep

    def keep_and_remember(blocks: Any, block: str, grams: Mapping[str, Tensor], made: Any) -> None:
        seen[block] = grams
        keep(blocks, block, grams, made)

    monkeypatch.setattr(planning._Blocks, "keep", keep_and_remember)
    collect_grams(context)
    outcome = planning.carry_out(context, [coarse])
    first, second = source.layout.blocks
    start = source.layout.of(first)[0].name  # nothing stands before it
    torch.testing.assert_close(seen[first][start], context.grams(first)[start])

    matrices = StoredMatrices(outcome.files)
    group = source.layout.of(second)[-1]
    (name,) = group.names

    def compressed(model: Any) -> None:
        with torch.no_grad():
            for other, matrix in matrices.items():
                if other != name:
                    module, weight = model.get_submodule(other), matrix.dequantize()
                    module.weight.copy_(weight if type(module).__name__ == "Conv1D" else weight.T)

    model = loaded(source.folder, source.task.auto_class)
    expected = hooked_grams(model, [name], context.windows.windows, compressed)[name]
    largest = float(expected.abs().max())
    torch.testing.assert_close(seen[second][group.name], expected, rtol=1e-4, atol=1e-4 * largest)
    assert float((context.grams(second)[group.name] - expected).abs().max()) > 0.01 * largest


def test_what_a_model_gives_is_nearer_to_the_original_than_without(
    source: ModelSource, coarse: Plan, tmp_path: Path
) -> None:
    distances = {}
    for sequential in (False, True):
        context = context_of(source, tmp_path / str(sequential), sequential)
        matrices = StoredMatrices(planning.carry_out(context, [coarse]).files)
        original, model = whole_model(source), put_in(whole_model(source), source.sites, matrices)
        with torch.no_grad():
            one, other = (
                torch.cat([source.task.output(each(**batch.arguments)) for batch in context.batches])
                for each in (original, model)
            )
        distances[sequential] = float((one - other).square().mean())
    assert distances[True] < 0.9 * distances[False]


def test_a_run_that_was_stopped_goes_on_to_the_same_matrices(
    source: ModelSource, coarse: Plan, tmp_path: Path
) -> None:
    context = context_of(source, tmp_path / "work", sequential=True)
    whole = planning.carry_out(context, [coarse])
    files = list(dict.fromkeys(whole.files.values()))
    before = load_matrices(files[-1])
    files[-1].unlink()
    again = planning.carry_out(context, [coarse])
    after = load_matrices(files[-1])
    assert list(after) == list(before) and all(same_matrix(after[name], before[name]) for name in before)
    assert again.linears == whole.linears
    # and it is not what the original model's Grams give
    other = context_of(source, tmp_path / "other", sequential=False)
    collect_grams(other)
    apart = planning.carry_out(other, [coarse])
    equal = {
        name: same_matrix(StoredMatrices(whole.files)[name], StoredMatrices(apart.files)[name])
        for name in whole.files
    }
    first, second = source.layout.blocks
    start = source.layout.of(first)[0].names
    assert all(same for name, same in equal.items() if name in start)
    assert not any(same for name, same in equal.items() if name.startswith(second))


def test_a_ratio_can_be_calibrated_block_after_block(source: ModelSource, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("".join(f"{number} {tiny.WORDS}\n" for number in range(100)))
    made = {}
    for sequential in (False, True):
        recipe = Recipe(
            model=str(source.folder),
            calibration=str(text),
            samples=6,
            length=32,
            rounds=3,
            allocation="uniform",
            sequential=sequential,
        )
        work = tmp_path / str(sequential)
        work.mkdir()
        made[sequential] = compress(resolve(recipe, source), work).model.matrices
    start = source.layout.groups[0].names
    for name in source.layout.names:
        assert same_matrix(made[False][name], made[True][name]) is (name in start), name
