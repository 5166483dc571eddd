"""Laws of predicted sizes: the dry run takes exactly the bytes of the export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from cases import nightly

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.embedded import MODEL
from compot_deploy.errors import RecipeError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.numerics.joint import Tier
from compot_deploy.pipeline.compress import compress
from compot_deploy.pipeline.provenance import stamp
from compot_deploy.pipeline.size import fit_size, model_of_stand_ins, other_bytes
from compot_deploy.planning.knapsack import Chosen, Plan
from compot_deploy.planning.rate_points import Candidate
from compot_deploy.planning.schemes import Joint, Plain, Scheme, Separate
from compot_deploy.planning.settings import options_of, resolve
from compot_deploy.recipe import Recipe

HEAD = Tier(16, Grid(8, 32), Grid(8, 32))
SHARED = Joint((HEAD, Tier(32, Grid(4, 32), Grid(4, 32), Pattern(2, 4))))
PER_MATRIX = Joint((Tier(32, Grid(2, 32), Grid(4, 32)),))
APART = Separate("compot", 32, Pattern(2, 4), Grid(4, 32), Grid(4, 32), rounds=1)


def mixed_plan(source: ModelSource) -> Plan:
    """A bit of everything: q, k, v share a dictionary, o and gate have their own, the rest is plain."""
    chosen = []

    def add(scheme: Scheme, *names: str) -> None:
        chosen.append(Chosen(names, Candidate(scheme, 0, (0.1,) * len(names))))

    for layer, block in enumerate(source.layout.blocks):
        add(SHARED, *(f"{block}.self_attn.{name}_proj" for name in "qkv"))
        add(APART, f"{block}.self_attn.o_proj")
        add(PER_MATRIX, f"{block}.mlp.gate_proj")
        add(Plain(Grid(8, 64)), f"{block}.mlp.up_proj")
        add(Plain(Grid(2, 32)) if layer % 2 else Plain(None), f"{block}.mlp.down_proj")
    return Plan(tuple(chosen), 0, 0.0)


def with_values(model: CompressedModel) -> CompressedModel:
    """The same matrices with random integers; dictionaries of one name are equal."""
    generator = torch.Generator().manual_seed(0)
    dictionaries: dict[tuple[str, int], Leaf] = {}

    def leaf(stand_in: Leaf, pattern: Pattern = Pattern()) -> Leaf:  # noqa: B008
        if not isinstance(stand_in, Quantized):
            return type(stand_in)(torch.randn(*stand_in.shape, generator=generator).half().float())
        grid, (rows, columns) = stand_in.grid, stand_in.shape
        integers = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), generator=generator)
        if not pattern.is_dense:
            integers.view(-1, pattern.of, columns)[:, pattern.kept :] = 0
        scales = torch.rand(stand_in.scales.shape, generator=generator).half()
        return Quantized(integers.to(torch.int8), scales, grid)

    matrices: dict[str, Matrix] = {}
    for name, matrix in model.matrices.items():
        if isinstance(matrix, Factorized):
            pairs = []
            for position, pair in enumerate(matrix.pairs):
                key = pair.dictionary_name, position
                dictionaries.setdefault(key, leaf(pair.dictionary))
                codes = leaf(pair.codes, pair.pattern)
                pairs.append(FactorPair(dictionaries[key], codes, pair.dictionary_name, pair.pattern))
            matrices[name] = Factorized(tuple(pairs))
        else:
            matrices[name] = leaf(matrix)
    return replace(model, matrices=matrices)


ODD = {"hidden_size": 53, "intermediate_size": 77, "vocab_size": 20_001, "tie_word_embeddings": False}
"""Tensors end where the next one may not begin, and the last is large enough to begin with a page."""


@pytest.mark.parametrize("kind", ["qwen3 of odd sizes", *nightly("llama", "qwen3", "the model that ships")])
@pytest.mark.parametrize(
    "recipe_options",
    [
        {"format": ("onnx",)},
        {"format": ("onnx",), "code_pattern": "2:4", "onnx_codes": "packed", "embeddings": "int4"},
        {"format": ("gguf",), "gguf_layout": "sparse"},
        {"format": ("gguf",), "gguf_layout": "dense"},
        {"format": ("huggingface",)},
    ],
    ids=["onnx", "packed", "gguf-sparse", "gguf-dense", "huggingface"],
)
def test_a_dry_run_takes_the_bytes_of_the_export(
    tmp_path: Path, kind: str, recipe_options: dict[str, Any]
) -> None:
    name, *odd = kind.split()
    folder = Path(MODEL) if name == "the" else tiny.save(tmp_path / "model", name, **(ODD if odd else {}))
    settings = resolve(Recipe(model=str(folder), **recipe_options), open_source(folder))
    exporter, plan = settings.exporter, mixed_plan(settings.source)
    options = options_of(settings.recipe, exporter, provenance=stamp(settings.recipe, "0" * 64))
    model = model_of_stand_ins(settings, plan)
    sizes = []
    for name in ("dry", "real"):
        (tmp_path / name).mkdir()
        if name == "dry":
            missing = exporter.dry_run(model, tmp_path / name, options)
        else:
            missing = 0
            exporter.write(with_values(model), tmp_path / name, options)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        sizes.append(missing + sum(path.stat().st_size for path in files))
    assert sizes[0] == sizes[1]
    assert other_bytes(settings, plan) + plan.bytes == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert", *nightly("bert classes", "bert masked")])
@pytest.mark.parametrize("format", ["onnx", "huggingface"])
def test_a_dry_run_of_any_model_takes_the_bytes_of_the_export(tmp_path: Path, kind: str, format: str) -> None:
    """Of a checkpoint in 16 bits, in which what stays as it is takes fewer bytes than what was made."""
    folder = any_models.save(tmp_path / "model", kind)
    any_models.model(kind).bfloat16().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("".join(f"{number} {tiny.WORDS}\n" for number in range(40)))
    recipe = Recipe(
        model=str(folder),
        calibration=str(tmp_path / "text.txt"),
        format=(format,),
        method="plain",
        samples=2,
        length=16,
    )
    settings = resolve(recipe, open_source(folder))
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
    made = compress(settings, tmp_path / "work")
    settings.exporter.write(made.model, tmp_path / "out", options_of(recipe, settings.exporter))
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert other_bytes(settings, made.plan) + made.plan.bytes == written


def plan_of(budget: int) -> tuple[Plan, ...]:
    scheme = Candidate(Plain(Grid(4, 32)), budget // 64 * 64, (1 / budget,))
    return (Plan((Chosen(("w",), scheme),), budget, 1 / budget),)


@pytest.mark.parametrize("cost", [1, 2, 4])
def test_a_size_is_filled_and_never_exceeded(cost: int) -> None:
    """What stands beside the linears grows with the plan, and a byte of the plan may be several of the file."""

    def predict(plan: Plan) -> int:
        return 5000 + cost * plan.bytes + plan.bytes // 50

    for size in (20_000, 77_777, 500_000):
        (plan,) = fit_size(size, size - 9000, 64, plan_of, predict)
        assert 0.99 * size < predict(plan) <= size


def test_every_plan_that_may_be_taken_has_the_size() -> None:
    """The final check may prefer the plain mix, whose output is larger than that of the plan."""

    def two_plans(budget: int) -> tuple[Plan, ...]:
        (plan,) = plan_of(budget)
        return plan, replace(plan, chosen=(Chosen(("plain",), plan.chosen[0].candidate),))

    def predict(plan: Plan) -> int:
        return 5000 + plan.bytes + 3000 * (plan.chosen[0].names == ("plain",))

    for size in (20_000, 77_777):
        plans = fit_size(size, size, 64, two_plans, predict)
        assert 0.99 * size < max(map(predict, plans)) <= size
    with pytest.raises(RecipeError, match="takes 9280 bytes"):
        fit_size(9000, 500, 1280, two_plans, predict)


def test_a_size_that_is_too_small_names_the_smallest() -> None:
    with pytest.raises(RecipeError, match=r"--size: 6000 bytes cannot be met.* takes 6280 bytes"):
        fit_size(6000, 500, 1280, plan_of, lambda plan: 5000 + plan.bytes)
    (plan,) = fit_size(6280, 500, 1280, plan_of, lambda plan: 5000 + plan.bytes)
    assert plan.bytes == 1280
