"""A plan that was not carried out yet, with what it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.rate_points import RatePoints
from compot_deploy.planning.tables import TablePoints


@dataclass(frozen=True)
class Draft:
    """Rate–distortion points, sensitivities, and the plans that follow from them.

    Attributes:
        context: what they are for.
        rate_points: candidates of every input.
        sensitivities: what a unit of squared error of each matrix costs, in the unit of the task's loss.
        plans: the plan; behind it what it will be compared with, see `compot_deploy.planning.carry_out.choose`.
        sizes: (in, out) of each matrix.
        other_bytes: predicted bytes of everything in the model's files that is not a matrix of a block.
        tables: what could be chosen for the token embedding and the output head; none where nothing is known of them.
    """

    context: PlanningContext
    rate_points: tuple[RatePoints, ...]
    sensitivities: Mapping[str, float]
    plans: tuple[Plan, ...]
    sizes: Mapping[str, tuple[int, int]]
    other_bytes: int
    tables: tuple[TablePoints, ...] = ()
