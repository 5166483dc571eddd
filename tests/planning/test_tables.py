"""Laws of tables in a plan: what rounding them costs is known beforehand, and bytes go where they are worth most."""

from __future__ import annotations

import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from cases import nightly
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.embedded import MODEL, TRAINING_TEXT
from compot_deploy.models.backward import products_backwards
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tasks import Batch
from compot_deploy.models.whole import whole_model
from compot_deploy.pipeline.compress import context_of
from compot_deploy.pipeline.provenance import stamp
from compot_deploy.pipeline.size import model_of_stand_ins, other_bytes
from compot_deploy.planning.carry_out import choose
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.knapsack import Chosen, Plan
from compot_deploy.planning.rate_points import Candidate, RatePoints
from compot_deploy.planning.schemes import Plain
from compot_deploy.planning.sensitivity import measure_sensitivities
from compot_deploy.planning.settings import Settings, options_of, resolve
from compot_deploy.planning.table_effects import known_effects
from compot_deploy.planning.tables import (
    SHARE,
    TablePoints,
    head_gram,
    measure_tables,
    round_table,
    table_error,
    with_tables,
)
from compot_deploy.quant import rtn
from compot_deploy.recipe import Recipe

QUICK = {"samples": 6, "length": 32}


def settings_of(folder: Path | str, text: Path | None = None, **options: Any) -> Settings:
    told = {} if text is None else {"calibration": str(text)}
    return resolve(Recipe(model=str(folder), **told, **options), open_source(folder))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{number} {tiny.WORDS}\n" for number in range(200)))
    return path


class Watched:
    """Gradients of the tables as they come by, summed over batches."""

    def __init__(self, source: ModelSource, draws: int) -> None:
        layout = source.layout
        self.tables = {
            name: [torch.zeros(source.shape(name)[::-1]) for _ in range(draws)]
            for name in (layout.embedding, layout.head)
            if name is not None
        }
        self.layout = layout

    def head(self, batch: int, values: Tensor, gradients: Any) -> None:
        for total, gradient in zip(self.tables[str(self.layout.head)], gradients, strict=True):
            total += gradient.T @ values

    def rows(self, batch: int, ids: Tensor, gradients: Any) -> None:
        for total, gradient in zip(self.tables[str(self.layout.embedding)], gradients, strict=True):
            total.index_add_(0, ids, gradient)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert", "bert masked"])
def test_gradients_of_tables_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Through everything that stands before the first block and behind the last one."""
    save = tiny.save if kind in tiny.KINDS else any_models.save
    source = open_source(save(tmp_path / "model", kind))
    batches = source.task.batches([torch.randint(3, 320, (length,)) for length in (9, 9, 5)])
    drawn: list[Tensor] = []

    def scalar(output: Tensor, batch: Batch) -> Tensor:
        drawn.append(torch.randn(output.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return (output * drawn[-1])[batch.real].sum()

    watched = Watched(source, draws=2)
    for _ in products_backwards(source, batches, scalar, draws=2, watch=watched):
        pass
    whole, layout = whole_model(source), source.layout
    weights = {name: whole.get_submodule(name).weight.requires_grad_(True) for name in watched.tables}
    for draw in range(2):
        whole.zero_grad()
        for number, batch in enumerate(batches):
            output = source.task.output(whole(**batch.arguments))
            (output * drawn[2 * number + draw])[batch.real].sum().backward()
        for name, weight in weights.items():
            made = watched.tables[name][draw]
            if layout.tied:
                made = watched.tables[str(layout.embedding)][draw] + watched.tables[str(layout.head)][draw]
            assert torch.allclose(made, weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max())), (
                name
            )


def test_the_gram_of_the_head_is_that_of_what_it_reads(tmp_path: Path, text: Path) -> None:
    """Collected while the blocks are, of all calibration text, and not of padding."""
    for kind in ("llama", "bert masked"):
        save = tiny.save if kind in tiny.KINDS else any_models.save
        settings = settings_of(save(tmp_path / kind, kind), text, bits=4.0, **QUICK)
        (tmp_path / f"{kind}-work").mkdir()
        context = context_of(settings, tmp_path / f"{kind}-work")
        collect_grams(context)
        whole, seen = whole_model(settings.source), []
        head = whole.get_submodule(settings.source.layout.head)
        head.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        for batch in context.batches:
            whole(**batch.arguments)
        rows = torch.cat([one[batch.real] for one, batch in zip(seen, context.batches, strict=True)]).double()
        found = context.head_gram()
        assert found is not None
        assert torch.allclose(found, rows.T @ rows, rtol=1e-4, atol=1e-3)


def measured(folder: Path | str, work: Path, **options: Any) -> tuple[PlanningContext, Settings]:
    work.mkdir(exist_ok=True)
    settings = settings_of(folder, bits=4.0, **options)
    context = context_of(settings, work)
    collect_grams(context)
    measure_sensitivities(context)
    return context, settings


def true_loss(context: PlanningContext, name: str, table: Quantized) -> float:
    """KL divergence of the model with another table, on text that nothing was fitted to."""
    source = context.source
    whole = whole_model(source)
    batches = context.batches[-4:]
    with torch.inference_mode():
        original = [source.task.output(whole(**batch.arguments)) for batch in batches]
        whole.get_submodule(name).weight.data.copy_(table.dequantize().T)
        total = sum(
            source.task.loss(before, source.task.output(whole(**batch.arguments)), batch.real).mean
            for before, batch in zip(original, batches, strict=True)
        )
    return total / len(batches)


@pytest.mark.slow
def test_what_a_table_costs_is_predicted_and_gptq_pays(tmp_path: Path) -> None:
    """On the shipped model, whose table is embedding and head: within a factor of 2 at 3 bits and at 8."""
    text = tmp_path / "text.txt"
    text.write_bytes(lzma.decompress(TRAINING_TEXT.read_bytes())[:200_000])
    context, settings = measured(MODEL, tmp_path / "work", text=text, samples=64)
    (name,) = settings.precisions
    grids = (Grid(3, 64), Grid(8, 32))
    (points,) = measure_tables(context, {name: grids})
    effects = known_effects(context.work)[name]
    assert points.gptq
    for candidate, grid in zip(points.candidates, grids, strict=True):
        gram = effects.gram(head_gram(context, name))
        fitted = round_table(context.source, name, grid, gram)
        truth = true_loss(context, name, fitted)
        assert 0.5 < points.loss(candidate) / truth < 2.0, (grid, points.loss(candidate), truth)
        if grid.bits < 8:
            assert truth < 0.8 * true_loss(context, name, round_table(context.source, name, grid))
        error = table_error(context.source, name, fitted, effects)
        assert 0.3 < error**2 / candidate.errors[0] < 2.0


def points(name: str, *entries: tuple[Grid, int, float]) -> TablePoints:
    candidates = tuple(Candidate(Plain(grid), size, (loss,)) for grid, size, loss in entries)
    return TablePoints(RatePoints((name,), (candidates,)), 1.0, True)


TWO, FOUR, EIGHT = Grid(2, 32), Grid(4, 32), Grid(8, 32)
TABLE = points("table", (TWO, 25, 0.5), (FOUR, 45, 0.04), (EIGHT, 85, 0.001))


def linears(loss: float) -> Plan:
    return Plan((Chosen(("a",), Candidate(Plain(FOUR), 10, (loss,))),), 10, loss)


def test_beside_a_budget_of_linears_tables_may_add_a_twentieth() -> None:
    """The cheapest scheme that adds no more, the best one where none is that good; all plans get the same."""
    for loss, grid in ((10.1, TWO), (9.9, FOUR), (0.81, FOUR), (0.79, EIGHT), (0.0, EIGHT)):
        plan, other = with_tables((linears(loss), linears(2 * loss)), (TABLE,))
        assert [entry.candidate.scheme for entry in plan.tables] == [Plain(grid)]
        assert plan.tables == other.tables
        assert plan.table_loss <= SHARE * loss or grid == EIGHT
        assert (plan.bytes, plan.loss, plan.budget) == (10, loss, 10)
    assert SHARE == 0.05
    assert with_tables((linears(1.0),), ()) == (linears(1.0),)


def test_tables_share_what_they_may_add_by_their_size() -> None:
    small = points("small", (FOUR, 9, 0.011), (EIGHT, 17, 0.0))
    large = points("large", (FOUR, 45, 0.039), (EIGHT, 83, 0.0))
    (plan,) = with_tables((linears(1.0),), (small, large))
    assert [entry.candidate.scheme for entry in plan.tables] == [Plain(EIGHT), Plain(FOUR)]
    assert plan.table_loss <= SHARE * plan.loss


def test_where_a_size_is_the_budget_tables_compete_with_linears() -> None:
    """Bytes go where they save most loss, no more than there are, and more bytes never lose more."""
    a = RatePoints(("a",), ((Candidate(Plain(TWO), 20, (0.3,)), Candidate(Plain(FOUR), 40, (0.02,))),))
    before = math.inf
    for budget, schemes in ((45, (TWO, TWO)), (66, (TWO, FOUR)), (85, (FOUR, FOUR)), (125, (FOUR, EIGHT))):
        plans = choose((a,), {"a": 1.0}, budget, (TABLE,))
        plan = plans[0]
        assert plan.bytes + plan.table_bytes <= budget
        assert plan.budget == budget - plan.table_bytes
        assert all(one.tables == plan.tables and one.bytes <= plan.budget for one in plans)
        assert (plan.chosen[0].candidate.scheme, plan.tables[0].candidate.scheme) == tuple(
            map(Plain, schemes)
        )
        lost = [plan.chosen[0].candidate.errors[0], plan.tables[0].candidate.errors[0]]
        assert [plan.loss, plan.table_loss] == pytest.approx(lost)
        assert plan.total_loss < before
        before = plan.total_loss
    # A linear that the model feels ten times as much gets the bytes before the table does.
    (plan, *_) = choose((a,), {"a": 10.0}, 66, (TABLE,))
    assert (plan.chosen[0].candidate.scheme, plan.tables[0].candidate.scheme) == (Plain(FOUR), Plain(TWO))


@pytest.mark.parametrize("format", ["onnx", "gguf", "huggingface"])
@pytest.mark.parametrize("kind", ["llama", "llama3"])
def test_grids_of_tables_are_those_that_a_format_holds(tmp_path: Path, format: str, kind: str) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    settings = settings_of(folder, format=(format,), bits=4.0, gguf_layout="sparse")
    embedding, *head = settings.table_grids.values()
    assert len(head) == (kind == "llama")
    bits = {grid.bits for grid in embedding}
    assert bits == ({2, 4, 8} if format == "onnx" else {2, 3, 4, 8})
    assert settings_of(folder, format=(format,), method="plain").table_grids == {}
    fixed = settings_of(
        folder, format=(format,), bits=4.0, gguf_layout="sparse", embeddings="int4", head="none"
    )
    assert fixed.table_grids == {"model.embed_tokens": (Grid(4, 32),)}


def with_values(settings: Settings, plan: Plan, tables: dict[str, Quantized]) -> CompressedModel:
    """The model of a plan of plain grids."""
    model = model_of_stand_ins(settings, plan)
    linears = {
        name: rtn(settings.source.weight(name).float(), None, FOUR) for name in settings.source.layout.names
    }
    return replace(model, matrices={name: (linears | tables)[name] for name in model.matrices})


@pytest.mark.parametrize(
    "options",
    [
        {"format": ("onnx",)},
        *nightly({"format": ("onnx",), "onnx_codes": "packed"}),
        {"format": ("gguf",), "gguf_layout": "sparse"},
        *nightly({"format": ("gguf",), "gguf_layout": "dense"}, {"format": ("huggingface",)}),
    ],
    ids=["onnx", "packed", "gguf-sparse", "gguf-dense", "huggingface"],
)
@pytest.mark.parametrize("kind", ["llama", *nightly("llama3")])
def test_tables_of_every_grid_are_written_as_predicted(
    tmp_path: Path, text: Path, kind: str, options: dict[str, Any]
) -> None:
    """To the byte, and read back as they were made: tied and untied, for every grid that a plan may choose."""
    folder = tiny.save(tmp_path / "model", kind)
    settings = settings_of(folder, text, bits=8.0, **options)
    source, exporter = settings.source, settings.exporter
    linear = tuple(
        Chosen((site.name,), Candidate(Plain(FOUR), settings.storage.leaf_bytes(*site.shape, FOUR), (0.0,)))
        for site in source.layout.sites
    )
    for place in range(max(map(len, settings.table_grids.values()))):
        tables, made = [], {}
        for name, grids in settings.table_grids.items():
            grid = grids[min(place, len(grids) - 1)]
            size = settings.storage.leaf_bytes(*source.shape(name), grid)
            tables.append(Chosen((name,), Candidate(Plain(grid), size, (0.0,))))
            made[name] = round_table(source, name, grid)
        plan = Plan(linear, 10**9, 0.0, tables=tuple(tables))
        out = tmp_path / f"out{place}"
        out.mkdir()
        options_made = options_of(settings.recipe, exporter, provenance=stamp(settings.recipe, "0" * 64))
        exporter.write(with_values(settings, plan, made), out, options_made)
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        assert other_bytes(settings, plan) + plan.bytes == written
        found = exporter.read(out)
        for name, table in made.items():
            assert torch.equal(found[name].dequantize(), table.dequantize()), (name, table.grid)
