"""Laws of sensitivities: one backward pass tells what disturbing each matrix alone does."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from cases import nightly
from torch import Tensor

from compot_deploy.embedded import MODEL
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models import backward
from compot_deploy.models.backward import products_backwards
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import Batch
from compot_deploy.pipeline.compress import context_of
from compot_deploy.planning import sensitivity
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.sensitivity import (
    measure_sensitivities,
    sensitivities_backwards,
    sensitivities_one_by_one,
)
from compot_deploy.planning.settings import resolve
from compot_deploy.planning.table_effects import known_effects
from compot_deploy.recipe import Recipe


def context(model: Path, work: Path, **options: Any) -> PlanningContext:
    work.mkdir(exist_ok=True)
    recipe = Recipe(model=str(model), bits=4.0, calibration=str(words(work)), **options)
    made = context_of(resolve(recipe, open_source(model)), work)
    collect_grams(made)
    return made


def words(folder: Path) -> Path:
    path = folder / "words.txt"
    path.write_text("".join(f"{number} {tiny.WORDS}\n" for number in range(400)))
    return path


@pytest.mark.slow
def test_a_backward_pass_predicts_what_each_matrix_costs(tmp_path: Path) -> None:
    """Half of the linears of the shipped model are within 15 %."""
    recipe = Recipe(bits=2.5, samples=16)
    made = context_of(resolve(recipe, open_source(MODEL)), tmp_path)
    collect_grams(made)
    found, truth = sensitivities_backwards(made), sensitivities_one_by_one(made)
    assert set(found) == set(truth) == set(made.names)
    off = [abs(found[name] / truth[name] - 1) for name in truth]
    assert statistics.median(off) < 0.15
    assert max(off) < 1.0
    assert found == sensitivities_backwards(made), "the draws are those of one seed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", *nightly("bert classes", "bert", "bert masked", "phi3")])
def test_every_task_has_its_own_measure_and_one_pass_finds_it(kind: str, tmp_path: Path) -> None:
    """Of random models, which are anything but linear; the order of the matrices is what a plan needs."""
    made = context(any_models.save(tmp_path / "model", kind), tmp_path / "work", samples=64, length=32)
    found, truth = sensitivities_backwards(made), sensitivities_one_by_one(made)
    names = list(truth)
    ranks = [torch.tensor([one[name] for name in names]).log() for one in (found, truth)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.8
    assert 0.5 < statistics.median(found[name] / truth[name] for name in names) < 2.0


def test_gradients_are_those_of_the_whole_model(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "qwen3")
    source = open_source(folder)
    batches = source.task.batches([torch.randint(3, 320, (length,)) for length in (9, 9, 5)])
    drawn: list[Tensor] = []

    def scalar(output: Tensor, batch: Batch) -> Tensor:
        drawn.append(torch.randn(output.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return (output * drawn[-1]).sum()

    found: dict[str, list[backward.Product]] = {}
    for block, products in products_backwards(source, batches, scalar, draws=2):
        assert all(one.name.startswith(f"{block}.") for one in products)
        for one in products:
            found.setdefault(one.name, []).append(one)
    assert next(iter(found)).startswith(source.layout.blocks[-1]), "the last block comes first"
    assert set(found) == set(source.layout.names)

    from compot_deploy.models.whole import whole_model

    whole = whole_model(source)
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    for draw in range(2):
        whole.zero_grad()
        for number, batch in enumerate(batches):
            (source.task.output(whole(**batch.arguments)) * drawn[2 * number + draw]).sum().backward()
        for name, products in found.items():
            own = [one for position, one in enumerate(products) if position % 2 == draw]
            made = sum(
                (one.gradient.flatten(0, 1).T @ one.values.flatten(0, 1) for one in own), torch.zeros(())
            )
            expected = whole.get_submodule(name).weight.grad
            assert torch.allclose(made, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), name


def test_where_gradients_cannot_be_had_each_matrix_is_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(
        tiny.save(tmp_path / "model", num_hidden_layers=1), tmp_path / "work", samples=4, length=16
    )

    def refused(context: PlanningContext, tables: object) -> dict[str, float]:
        raise UnsupportedModelError("blocks that hand each other something else")

    monkeypatch.setattr(sensitivity, "sensitivities_backwards", refused)
    assert measure_sensitivities(made) == sensitivities_one_by_one(made)
    assert known_effects(made.work) == {}, "nothing is known of the tables then"
