"""Laws of predicted errors: a sample tells what a grid costs, and what a plan chooses is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.store import StoredMatrices
from compot_deploy.numerics.joint import Tier, joint
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.pipeline.deploy import plan_only
from compot_deploy.planning.candidates import Search, energies_of, realize
from compot_deploy.planning.carry_out import carry_out
from compot_deploy.planning.draft import Draft
from compot_deploy.planning.prediction import sampled_errors, spectral_errors
from compot_deploy.planning.schemes import GridChoice, Joint, Plain
from compot_deploy.planning.sensitivity import ReplacedLoss
from compot_deploy.recipe import Recipe

GRIDS = GridChoice({2: (32, 64), 4: (32, 64), 8: (64,)})
PLAIN = [Plain(grid) for grid in GRIDS.grids]
TRIED = Plain(Grid(2, 32)), Plain(Grid(4, 32))
"""The finest grid of 4 bits, and the coarsest with groups as small."""


def matrices(outputs: dict[str, int], inputs: int = 128) -> tuple[dict[str, Tensor], Whitening]:
    """Weights of different sizes on correlated inputs; outputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    values = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    weights = {
        name: torch.randn(inputs, count, generator=generator) * torch.rand(count, generator=generator).exp()
        for name, count in outputs.items()
    }
    return weights, whiten(values.T @ values)


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_a_sample_of_everything_is_the_measurement(quantizer: str) -> None:
    from compot_deploy.quant import QUANTIZERS

    weights, whitening = matrices({"q": 64, "k": 32})
    found = sampled_errors([*PLAIN, Plain(None)], weights, whitening, quantizer)
    for scheme in PLAIN:
        made = realize(scheme, weights, whitening, Search(GRIDS), quantizer=QUANTIZERS[quantizer])
        for name, error in made.errors.items():
            tried = quantizer == "rtn" or scheme in TRIED
            assert found[name][scheme] == pytest.approx(error, rel=1e-4 if tried else 0.1), scheme
    assert all(errors[Plain(None)] == 0.0 for errors in found.values())


def test_a_part_of_the_outputs_tells_what_a_grid_costs_all_of_them() -> None:
    weights, whitening = matrices({"up": 900, "gate": 700})
    found = sampled_errors(PLAIN, weights, whitening, "gptq")
    for scheme in PLAIN:
        made = realize(scheme, weights, whitening, Search(GRIDS))
        for name, error in made.errors.items():
            assert found[name][scheme] == pytest.approx(error, rel=0.08), (scheme, name)


def test_a_matrix_of_zeros_has_no_error() -> None:
    _, whitening = matrices({"q": 8})
    found = sampled_errors(PLAIN, {"q": torch.zeros(128, 8)}, whitening, "gptq")
    assert set(found["q"].values()) == {0.0}


def test_a_spectrum_tells_what_factors_lose_and_more_bytes_lose_less() -> None:
    weights, whitening = matrices({"q": 256})
    # A weight whose whitened energy falls off, as those of trained models do.
    left, _, right = torch.linalg.svd(whitening.apply(weights["q"]), full_matrices=False)
    fading = torch.linspace(0, -6, len(left), dtype=torch.float64).exp()
    weight = whitening.unapply(left @ torch.diag(fading) @ right)
    energies = energies_of(weight, whitening)
    assert energies == pytest.approx((fading**2).tolist(), rel=1e-6)
    listed = {Joint((Tier(atoms, Grid(4, 64), Grid(4, 32)),)): atoms for atoms in (16, 32, 48)}
    found = spectral_errors(listed, energies)
    assert sorted(found.values(), reverse=True) == [found[scheme] for scheme in listed]
    for scheme, error in found.items():
        truth = joint(weight, whitening, scheme.tiers).error ** 2  # type: ignore[union-attr]
        assert 0.5 < error / truth < 2.0


def draft(search: str, out: Path, **options: Any) -> Draft:
    return plan_only(Recipe(search=search, **{"samples": 16, **options}, out=str(out)))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_predicted_plan_is_as_good_as_one_of_everything(tmp_path: Path) -> None:
    """On the shipped model: what is made of it costs at most 2 % more."""
    losses = []
    for search in ("full", "predicted"):
        drafted = draft(search, tmp_path / search, bits=2.0)
        plan = drafted.plans[0]
        assert plan.bytes <= plan.budget
        predicted = {key for one in drafted.rate_points for key in one.predicted}
        assert bool(predicted) == (search == "predicted")
        assert not predicted & {(entry.names, entry.candidate.scheme) for entry in plan.chosen}
        made = carry_out(drafted.context, drafted.plans[:1])
        losses.append(ReplacedLoss(drafted.context, 4)(StoredMatrices(made.files)))
    assert losses[1] <= 1.02 * losses[0]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_same_budget_gives_the_same_plan_and_a_size_is_kept(tmp_path: Path) -> None:
    first, again = (draft("predicted", tmp_path / name, size="1MB", samples=4) for name in ("one", "two"))
    assert first.plans == again.plans
    assert first.plans[0].bytes + first.other_bytes <= 1_000_000
