"""Laws of the recipe: one definition for flags, keywords and TOML; nonsense is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compot_deploy.core.grid import Grid
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.recipe import Recipe, override, recipe_from_toml, recipe_options, recipe_to_toml


def test_a_recipe_written_and_read_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = Recipe(
        model='odd "name" \\ with\ttab', ratio=0.35, max_kl=0.5, format=("onnx",), force=True, samples=7
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(path) == recipe


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("ratio = 0.3\nsamples = 5\n")
    assert recipe_from_toml(path, ratio=0.4) == Recipe(ratio=0.4, samples=5)


def test_every_option_says_what_it_is() -> None:
    assert all(option.metadata["help"] for option in recipe_options())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ratio": 0.0}, "--ratio 0"),
        ({"ratio": 1.0}, "--ratio 1"),
        ({"ratio": float("nan")}, "--ratio nan"),
        ({"samples": 0}, "--samples 0"),
        ({"length": 1}, "--length 1"),
        ({"code_bits": 3}, "--code-bits 3"),
        ({"code_bits": 4, "quant": "none"}, "contradicts"),
        ({"dictionary_group": 96}, "--dictionary-group 96"),
        ({"atoms_per_nonzero": 0.5}, "--atoms-per-nonzero 0.5"),
        ({"min_top1": 1.5}, "--min-top1 1.5"),
        ({"max_kl": -1.0}, "--max-kl -1"),
        ({"format": ()}, "--format"),
    ],
)
def test_a_option_outside_its_range_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Recipe(**changes)
    with pytest.raises(RecipeError, match=named):
        override(Recipe(), **changes)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ratoi = 0.2", "unknown key 'ratoi'"),
        ("ratio = 'much'", "ratio = 'much' is not a number"),
        ("quant = 'int5'", "quant = 'int5' is not one of none, int8, int4"),
        ("samples = 2.5", "samples = 2.5 is not a whole number"),
        ("force = 1", "force = 1 is not true or false"),
        ("ratio = ", "cannot be read"),
    ],
)
def test_a_recipe_file_with_nonsense_is_refused(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        recipe_from_toml(path)


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml does not exist"):
        recipe_from_toml(tmp_path / "nowhere.toml")


def test_bits_per_factor_override_the_common_precision() -> None:
    recipe = Recipe(quant="int4", dictionary_bits=8, code_group=64)
    assert recipe.dictionary_grid == Grid(8, 32)
    assert recipe.code_grid == Grid(4, 64)
    assert Recipe(quant="none").code_grid is None


_ONE_SCHEME: list[dict[str, Any]] = [
    {"dictionary_bits": 8},
    {"code_bits": 2},
    {"dictionary_group": 64},
    {"code_group": 64},
    {"atoms_per_nonzero": 3.0},
    {"rounds": 5},
    {"paper_exact": True},
]


@pytest.mark.parametrize("given", [{}, {"ratio": 0.6}, {"bits": 2.2}, {"size": "1MB"}, {"quant": "none"}])
def test_every_budget_is_planned_unless_a_rule_is_named(given: dict[str, Any]) -> None:
    assert Recipe(**given).planned and Recipe(**given).allocator == "knapsack"
    if "bits" not in given and "size" not in given:
        assert Recipe(allocation="spectral", **given).allocator == "spectral"
        assert Recipe(allocation="uniform", **given).allocator == "uniform"
        assert Recipe(**given).counting_atoms() == Recipe(allocation="spectral", **given)
    else:
        assert Recipe(**given).counting_atoms().planned


@pytest.mark.parametrize("settled", [*_ONE_SCHEME, {"code_pattern": "2:4"}])
def test_a_scheme_that_is_settled_by_hand_leaves_a_ratio_to_singular_values(settled: dict[str, Any]) -> None:
    recipe = Recipe(**settled)
    assert not recipe.planned
    assert recipe.allocator == ("spectral by value" if recipe.paper_exact else "spectral")
    (option,) = settled
    assert option.replace("_", "-") in recipe.why_one_scheme


@pytest.mark.parametrize("settled", _ONE_SCHEME, ids=lambda given: next(iter(given)))
@pytest.mark.parametrize("asked", [{"bits": 2.2}, {"size": "1MB"}, {"allocation": "knapsack"}])
def test_a_settled_scheme_beside_a_plan_is_refused_by_both_names(
    settled: dict[str, Any], asked: dict[str, Any]
) -> None:
    (option,), (budget,) = settled, asked
    with pytest.raises(RecipeError, match=f"--{option.replace('_', '-')}.*--{budget}"):
        Recipe(**settled, **asked)


def test_a_pattern_is_one_more_scheme_for_a_plan_and_without_quantization_so_is_k_over_s() -> None:
    assert Recipe(bits=2.2, code_pattern="2:4").planned
    assert Recipe(quant="none", allocation="knapsack", atoms_per_nonzero=3.0).planned


def test_a_dense_gguf_file_is_not_planned_by_a_ratio_and_others_are() -> None:
    assert not Recipe(format=("gguf",)).planned
    assert Recipe(format=("gguf",), gguf_layout="sparse").planned
    assert Recipe(format=("gguf",), bits=4.5).planned
    assert Recipe(format=("onnx", "gguf")).planned
