"""The first Newton step is the one that its derivation says, and only good steps are remembered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compot_deploy.numerics import newton
from compot_deploy.numerics.newton import Newton, orthonormalized


def problem(rows: int = 12, atoms: int = 6, outputs: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Target (outputs, rows), dictionary, and which coefficients are kept."""
    target = torch.randn(outputs, rows)
    target = target / target.norm()
    dictionary = torch.linalg.qr(torch.randn(rows, atoms)).Q
    coefficients = target @ dictionary
    bar = coefficients.abs().kthvalue(atoms // 2 + 1, dim=1, keepdim=True).values
    return target, dictionary, coefficients.abs() >= bar


def step(target: Tensor, dictionary: Tensor, kept: Tensor, stepper: Newton) -> Tensor | None:
    coefficients = target @ dictionary
    codes = coefficients * kept
    return stepper.step(dictionary, coefficients, codes, target.T @ codes)


def test_a_turn_goes_to_the_top_of_the_parabola_through_three_points(monkeypatch: pytest.MonkeyPatch) -> None:
    target, dictionary, kept = problem()
    monkeypatch.setattr(newton, "_LONGEST", 1e9)
    stepper = Newton()
    step(target, dictionary, kept, stepper)
    assert stepper._now is not None
    turn = stepper._now[0] / newton._STEP

    def energy(angle: float, i: int, j: int) -> float:
        plain = dictionary.double()
        turned = plain.clone()
        turned[:, i] = math.cos(angle) * plain[:, i] - math.sin(angle) * plain[:, j]
        turned[:, j] = math.sin(angle) * plain[:, i] + math.cos(angle) * plain[:, j]
        return float(((target.double() @ turned) * kept).square().sum())

    h, seen = 1e-3, 0
    for i in range(6):
        for j in range(i + 1, 6):
            up, here, down = energy(h, i, j), energy(0.0, i, j), energy(-h, i, j)
            slope, bend = (up - down) / (2 * h), (2 * here - up - down) / h**2
            codes = (target @ dictionary) * kept
            whole = 2 * float(codes[:, i].square().sum() + codes[:, j].square().sum())
            if bend > 1.01 * newton._FLATTEST * whole:
                seen += 1
                assert abs(float(turn[i, j]) - slope / bend) < 1e-3 * max(1.0, abs(slope / bend))
    assert seen > 5
    assert torch.allclose(turn, -turn.T)


def test_a_step_loses_less_and_stays_orthonormal() -> None:
    target, dictionary, kept = problem()
    stepped = step(target, dictionary, kept, Newton())
    assert stepped is not None
    assert torch.allclose(stepped.T @ stepped, torch.eye(6), atol=1e-5)
    before, after = (((target @ d) * kept).square().sum() for d in (dictionary, stepped))
    assert after > before


def test_no_atom_turns_further_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    target, dictionary, kept = problem()
    monkeypatch.setattr(newton, "_LONGEST", 0.05)
    stepper = Newton()
    step(target, dictionary, kept, stepper)
    assert stepper._now is not None
    turn, leave = stepper._now
    assert torch.allclose(turn, -turn.T)
    assert float((turn.square().sum(0) + leave.square().sum(0)).sqrt().max()) <= newton._LONGEST * 1.0001


def test_only_steps_that_were_kept_are_remembered() -> None:
    target, dictionary, kept = problem()
    stepper = Newton()
    first = step(target, dictionary, kept, stepper)
    assert not stepper.forget()
    again = step(target, dictionary, kept, stepper)
    assert first is not None and again is not None
    assert torch.equal(first, again)
    stepper.keep()
    remembering = step(target, dictionary, kept, stepper)
    assert remembering is not None
    assert not torch.allclose(first, remembering)
    assert stepper.forget()


def test_columns_that_depend_on_each_other_are_refused() -> None:
    matrix = torch.randn(8, 3)
    matrix[:, 2] = matrix[:, 0] + 1e-6 * matrix[:, 1]
    assert orthonormalized(matrix) is None
    assert orthonormalized(torch.full((8, 3), float("nan"))) is None
