"""Laws of --method: what may be chosen, and that it is, whatever the budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from cases import nightly

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.models.source import open_source
from compot_deploy.numerics.joint import Tier
from compot_deploy.pipeline.compress import context_of
from compot_deploy.pipeline.deploy import plan_only
from compot_deploy.planning import settings as settings_module
from compot_deploy.planning.by_rule import plan_by_rule
from compot_deploy.planning.candidates import Search, schemes
from compot_deploy.planning.context import collect_grams
from compot_deploy.planning.draft import Draft
from compot_deploy.planning.measure import measure_rate_points
from compot_deploy.planning.schemes import GridChoice, Joint, Plain, Scheme, Separate
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe

pytestmark = pytest.mark.slow

INT4 = Plain(Grid(4, 32))


@pytest.fixture(autouse=True)
def _few_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a plan takes seconds."""
    monkeypatch.setattr(settings_module, "_GROUPS", {2: (32, 64), 4: (32, 64), 8: (64,)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices get smaller by being factorized, but for two of them, and a text."""
    root = tmp_path_factory.mktemp("place")
    tiny.save(root / "model", num_hidden_layers=1, hidden_size=128, intermediate_size=192, head_dim=16)
    (root / "text.txt").write_text((tiny.WORDS + "\n") * 100)
    return root


def recipe(place: Path, **changes: Any) -> Recipe:
    common = {"samples": 6, "length": 32, "evaluation_tokens": 64, "out": str(place / "out")}
    return Recipe(
        **{"model": str(place / "model"), "calibration": str(place / "text.txt"), **common, **changes}
    )


def listed(drafted: Draft) -> Mapping[str, tuple[Scheme, ...]]:
    """Every scheme of every matrix by itself."""
    context, found = drafted.context, {}
    for group in context.groups:
        whitening = context.whitening(group)
        for name, weight in context.weights(group.names).items():
            found[name] = schemes(weight, whitening, context.storage, context.search)
    return found


@pytest.mark.parametrize("method", ["compot", *nightly("svd-llm")])
@pytest.mark.parametrize("recipe_options", [{"bits": 1.5}, *nightly({"bits": 3.0}, {"ratio": 0.2})], ids=str)
def test_every_matrix_that_gets_smaller_by_it_is_factorized(
    place: Path, method: str, recipe_options: dict[str, Any]
) -> None:
    drafted = plan_only(recipe(place, method=method, **recipe_options))
    (plan,) = drafted.plans
    storage, sizes = drafted.context.storage, drafted.sizes
    everything = listed(drafted)
    chosen = {name: entry for entry in plan.chosen for name in entry.names}
    assert set(chosen) == set(drafted.context.names)
    assert plan.bytes <= plan.budget

    def allowed(scheme: Scheme) -> bool:
        return isinstance(scheme, Joint) and (
            method == "compot" or all(tier.pattern.is_dense for tier in scheme.tiers)
        )

    factorized = 0
    for name, entry in chosen.items():
        scheme = entry.candidate.scheme
        plain = INT4.bytes(*sizes[name], storage)
        smaller = [
            one for one in everything[name] if allowed(one) and one.bytes(*sizes[name], storage) < plain
        ]
        shared = sum(INT4.bytes(*sizes[one], storage) for one in entry.names)
        if len(entry.names) > 1 or smaller:
            assert allowed(scheme), (name, scheme)
            assert entry.candidate.bytes < shared
            factorized += 1
        else:
            assert isinstance(scheme, Plain)
    assert factorized >= 5
    if method == "svd-llm":
        assert not any(tier.pattern != DENSE for points in drafted.rate_points for tier in _tiers(points))


def _tiers(points: Any) -> list[Tier]:
    candidates = [one for entries in (*points.per_matrix, points.shared) for one in entries]
    return [tier for one in candidates if isinstance(one.scheme, Joint) for tier in one.scheme.tiers]


def test_a_matrix_that_does_not_get_smaller_stays_plain_and_the_others_do_not(tmp_path: Path) -> None:
    """A budget that only the smallest schemes keep: k and v of a narrow head are left on a grid."""
    root = tmp_path
    tiny.save(
        root / "model",
        num_hidden_layers=1,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
    )
    (root / "text.txt").write_text((tiny.WORDS + "\n") * 100)
    settings = resolve(recipe(root, method="svd-llm", bits=3.0), open_source(root / "model"))
    assert settings.source.shape("model.layers.0.self_attn.k_proj") == (128, 16)
    drafted = plan_only(settings.recipe)
    everything = listed(drafted)
    storage = drafted.context.storage
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
        size = drafted.sizes[name]
        joint = [scheme for scheme in everything[name] if isinstance(scheme, Joint)]
        points = next(one for one in drafted.rate_points if name in one.names)
        per_matrix = [one.scheme for one in points.per_matrix[points.names.index(name)]]
        if all(scheme.bytes(*size, storage) >= INT4.bytes(*size, storage) for scheme in joint):
            assert per_matrix and all(isinstance(scheme, Plain) for scheme in per_matrix)
        else:
            assert per_matrix and all(isinstance(scheme, Joint) for scheme in per_matrix)


@pytest.mark.parametrize(
    "recipe_options", [{"bits": 3.0}, {"bits": 4.6}, {"ratio": 0.3, "allocation": "knapsack"}], ids=str
)
def test_plain_plans_among_plain_grids_only(place: Path, recipe_options: dict[str, Any]) -> None:
    drafted = plan_only(recipe(place, method="plain", **recipe_options))
    entries = drafted.plans[0].chosen
    assert all(isinstance(entry.candidate.scheme, Plain) for entry in entries)
    assert not any(_tiers(points) or points.shared for points in drafted.rate_points)
    assert drafted.plans[0].bytes <= drafted.plans[0].budget
    # The contenders of a plan that may factorize are plain mixes: the best of them is this one.
    auto = plan_only(recipe(place, method="auto", **recipe_options))
    mixes = [plan for plan in auto.plans if all(isinstance(e.candidate.scheme, Plain) for e in plan.chosen)]
    assert min(plan.loss for plan in mixes) == pytest.approx(drafted.plans[0].loss, rel=1e-9)


def test_auto_chooses_among_everything_and_is_the_default(place: Path) -> None:
    assert recipe(place, bits=2.0) == recipe(place, bits=2.0, method="auto")
    source = open_source(place / "model")
    auto = {
        method: resolve(recipe(place, bits=2.0, method=method), source).search for method in ("auto", "plain")
    }
    # An ONNX file stores zeros of codes like other values: schemes with sparse codes would gain nothing.
    expected = Search(auto["auto"].grids, head=16, unstructured=False, unquantized=True, plain=INT4)
    assert auto["auto"] == expected and auto["auto"].method == expected.method == "auto"
    for scheme in (
        INT4,
        Joint((Tier(8, Grid(4, 32), Grid(4, 32)),)),
        Joint((Tier(8, None, None, Pattern(2, 4)),)),
    ):
        assert auto["auto"].takes(scheme, 100, 1)
        assert auto["plain"].takes(scheme, 1, 100) is isinstance(scheme, Plain)
    drafted = plan_only(recipe(place, bits=2.0))
    assert any(
        isinstance(one.scheme, Plain) for points in drafted.rate_points for one in points.per_matrix[0]
    )
    assert any(
        isinstance(one.scheme, Joint) for points in drafted.rate_points for one in points.per_matrix[0]
    )


@pytest.mark.parametrize(
    ("method", "scheme", "size", "taken"),
    [
        ("compot", Joint((Tier(8, Grid(4, 32), Grid(4, 32), Pattern(2, 4)),)), 99, True),
        ("compot", Joint((Tier(8, Grid(4, 32), Grid(4, 32)),)), 99, True),
        ("compot", Joint((Tier(8, Grid(4, 32), Grid(4, 32)),)), 100, False),
        ("compot", INT4, 50, False),
        ("svd-llm", Joint((Tier(8, Grid(4, 32), Grid(4, 32), Pattern(2, 4)),)), 99, False),
        ("svd-llm", Joint((Tier(8, Grid(4, 32), Grid(4, 32)),)), 99, True),
        ("svd-llm", Joint((Tier(8, Grid(4, 32), Grid(4, 32)),)), 100, False),
        ("plain", Plain(Grid(8, 32)), 999, True),
        ("plain", Joint((Tier(8, Grid(4, 32), Grid(4, 32)),)), 1, False),
    ],
)
def test_what_a_method_lets_be_chosen(method: str, scheme: Scheme, size: int, taken: bool) -> None:
    assert Search(GridChoice({}), method=method, plain=INT4).takes(scheme, size, 100) is taken


@pytest.mark.parametrize("method", nightly("compot", "svd-llm"))
def test_without_quantization_a_method_factorizes_too(place: Path, method: str) -> None:
    drafted = plan_only(recipe(place, method=method, quant="none", ratio=0.4))
    joint = [entry for entry in drafted.plans[0].chosen if isinstance(entry.candidate.scheme, Joint)]
    assert len(joint) == len(drafted.plans[0].chosen)
    dense = [tier.pattern.is_dense for entry in joint for tier in entry.candidate.scheme.tiers]  # type: ignore[union-attr]
    assert all(dense) if method == "svd-llm" else not any(dense)


@pytest.mark.parametrize("method", ["compot", *nightly("svd-llm")])
@pytest.mark.parametrize("rule", ["spectral", "uniform"])
def test_a_rule_gives_every_factorized_matrix_atoms_of_one_scheme(
    place: Path, method: str, rule: str
) -> None:
    settings = resolve(
        recipe(place, method=method, allocation=rule, ratio=0.3, rounds=3), open_source(place / "model")
    )
    plan = plan_by_rule(settings)
    assert tuple(name for entry in plan.chosen for name in entry.names) == settings.source.layout.names
    separate = [entry for entry in plan.chosen if isinstance(entry.candidate.scheme, Separate)]
    plain = [entry for entry in plan.chosen if entry not in separate]
    assert separate
    assert all(entry.candidate.scheme == INT4 and entry.reason for entry in plain)
    for entry in separate:
        scheme = entry.candidate.scheme
        assert isinstance(scheme, Separate)
        assert (scheme.method, scheme.rounds, scheme.dictionary, scheme.codes) == (
            method,
            3,
            Grid(4, 32),
            Grid(4, 32),
        )
        assert scheme.pattern.is_dense is (method == "svd-llm")
        assert entry.candidate.bytes == scheme.bytes(*settings.source.shape(*entry.names), settings.storage)
    if rule == "spectral":
        allowed = int(0.7 * settings.plain_bytes)
    else:  # each matrix on its own; no other one pays for a matrix that stays plain
        size = {
            name: INT4.bytes(*settings.source.shape(name), settings.storage)
            for name in settings.source.layout.names
        }
        allowed = sum(
            size[entry.names[0]] if entry in plain else int(0.7 * size[entry.names[0]])
            for entry in plan.chosen
        )
    assert plan.bytes <= plan.budget == allowed


def test_plain_without_a_budget_gives_every_matrix_the_one_grid(place: Path) -> None:
    settings = resolve(recipe(place, method="plain"), open_source(place / "model"))
    plan = plan_by_rule(settings)
    assert {entry.candidate.scheme for entry in plan.chosen} == {INT4}
    assert plan.bytes == settings.plain_bytes
    assert plan.notes == ("nothing was factorized: --method plain",)


@pytest.mark.nightly
def test_methods_share_calibration_but_no_measurements(place: Path, tmp_path: Path) -> None:
    """Files of points are named after what they depend on; one method's list is not taken for another's."""
    source = open_source(place / "model")
    for method in ("auto", "compot", "plain"):
        settings = resolve(recipe(place, method=method, bits=2.0), source)
        context = context_of(settings, tmp_path)
        if method == "auto":
            collect_grams(context)
        assert all(context.has_grams(block) for block in context.blocks)
        measure_rate_points(context)
    names = [path.name.rsplit("-", 1) for path in tmp_path.glob("points-*.json")]
    inputs = {name for name, _ in names}
    assert len(names) == len({content for _, content in names}) == 3 * len(inputs)
