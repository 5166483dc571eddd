"""The token embedding and the output head in a plan: what their schemes take and cost, and which one is taken.

Losses are those of `compot_deploy.planning.table_effects`, of errors that come from rounding a sample of the rows.

GPTQ rounds a table with F, but F comes from few texts. Its part of the head is, but for its size, the Gram of what the
head reads, which is collected from all calibration text and takes its place; its part of the rows remains. What is
fitted to some texts is not to be measured on the same ones: rows rounded with the F of one half of them are measured
with that of the other. Figures are in LOG.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.core.storage import Storage
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.models.source import ModelSource
from compot_deploy.planning.candidates import VERSION
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.knapsack import Chosen, Plan
from compot_deploy.planning.rate_points import Candidate, RatePoints
from compot_deploy.planning.schemes import Plain
from compot_deploy.planning.table_effects import (
    CHUNK,
    HALVES,
    TableEffects,
    known_effects,
    loss_of,
    row_steps,
)
from compot_deploy.quant import feedback_of, gptq, gptq_side_by_side, rtn
from compot_deploy.quant.scales import check_scales

SHARE: Final = 0.05
"""Loss that tables may add where a budget is of the linears alone, as a part of what the linears are predicted to."""

FINE: Final = 8
"""Bits at which errors are too small to be worth a search: no table lost more than 1e-4 nats by them."""

_ROWS: Final = 1024
"""Rows that are rounded to see what a grid costs: errors are then known to a few %."""


@dataclass(frozen=True)
class TablePoints:
    """What can be chosen for one table.

    Attributes:
        points: its grids, with their bytes and errors relative to leaving the table out.
        sensitivity: the loss of leaving it out, to second order.
        gptq: whether GPTQ with the Gram F loses less than rounding to nearest.
    """

    points: RatePoints
    sensitivity: float
    gptq: bool

    @property
    def name(self) -> str:
        """Of the table."""
        return self.points.names[0]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """One per grid."""
        return self.points.per_matrix[0]

    def loss(self, candidate: Candidate) -> float:
        """Predicted, of a candidate."""
        return self.sensitivity * candidate.errors[0]


def measure_tables(context: PlanningContext, grids: Mapping[str, Sequence[Grid]]) -> tuple[TablePoints, ...]:
    """What can be chosen for every table that something is known of; files in the work folder serve every budget.

    Args:
        context: of a model whose sensitivities are measured.
        grids: of each table.
    """
    source, work = context.source, context.work
    effects = known_effects(work)
    found = []
    for name, tried in grids.items():
        if name not in effects:
            continue
        digest = hashlib.sha256(repr((VERSION, tried, context.quantizer)).encode()).hexdigest()[:12]
        path = work / f"{name.rsplit('.', 1)[-1]}-points-{digest}.json"
        if not is_sound(path):
            head = head_gram(context, name)
            measured = _measured(source, name, effects[name], head, tried, context.quantizer)
            write_value(path, asdict(measured))
        losses = _Losses(**read_value(path))
        found.append(_priced(name, losses, tried, source.shape(name), context.storage))
    return tuple(found)


def head_gram(context: PlanningContext, name: str) -> Tensor | None:
    """Gram of what a table multiplies as an output head; None for a table that is none."""
    layout = context.source.layout
    return context.head_gram() if layout.tied or name == layout.head else None


def smallest_tables(
    source: ModelSource, grids: Mapping[str, Sequence[Grid]], storage: Storage
) -> tuple[Chosen, ...]:
    """The smallest scheme of every table, whatever it loses."""
    chosen = []
    for name, tried in grids.items():
        size = source.shape(name)
        priced = [(storage.leaf_bytes(*size, grid), grid) for grid in tried]
        smallest, grid = min(priced, key=lambda entry: entry[0])
        chosen.append(Chosen((name,), Candidate(Plain(grid), smallest, (math.nan,))))
    return tuple(chosen)


@dataclass(frozen=True)
class _Losses:
    """Predicted losses of the grids of a table, whether GPTQ made its rows, and of leaving the table out."""

    grids: list[float]
    gptq: bool
    whole: float


def _measured(
    source: ModelSource,
    name: str,
    effects: TableEffects,
    head: Tensor | None,
    grids: Sequence[Grid],
    quantizer: str,
) -> _Losses:
    rows = source.weight(name).T
    some = rows[:: -(-rows.shape[0] // _ROWS)].float().T.contiguous()
    steps = row_steps(some)
    whole = loss_of(effects.whole, some / steps)
    nearest = {
        grid: loss_of(effects.whole, (some - _nearest(some, grid).dequantize()) / steps) for grid in grids
    }
    coarse = [grid for grid in grids if grid.bits < FINE] if quantizer == "gptq" else []
    fitted = _fitted(effects, head, some, steps, coarse) if coarse else {}
    # One quantizer for all coarse grids, so that the finer of two is never worse for having another one.
    pays = bool(fitted) and sum(_log(loss) - _log(nearest[grid]) for grid, loss in fitted.items()) < 0.0
    losses = nearest | fitted if pays else nearest
    return _Losses([losses[grid] for grid in grids], pays, whole)


def _priced(
    name: str, losses: _Losses, grids: Sequence[Grid], size: tuple[int, int], storage: Storage
) -> TablePoints:
    candidates = tuple(
        Candidate(
            Plain(grid),
            storage.leaf_bytes(*size, grid),
            (loss / losses.whole if losses.whole > 0 else 0.0,),
        )
        for grid, loss in zip(grids, losses.grids, strict=True)
    )
    return TablePoints(RatePoints((name,), (candidates,)), losses.whole, losses.gptq)


def _fitted(
    effects: TableEffects,
    head: Tensor | None,
    some: Float[Tensor, "hidden rows"],
    steps: Float[Tensor, " rows"],
    grids: Sequence[Grid],
) -> dict[Grid, float]:
    """Losses of rows rounded by GPTQ for one half of the texts, on the other; nothing where there are no two halves."""
    halves = effects.halves
    grams = [effects.gram(head, half) for half in range(len(halves))]
    if len(halves) < HALVES or any(gram is None for gram in grams):
        return {}
    losses = dict.fromkeys(grids, 0.0)
    for number, gram in enumerate(grams):
        assert gram is not None
        part, own = some[:, number::HALVES], steps[number::HALVES]
        made = gptq_side_by_side([(part, grid) for grid in grids], gram, sweeps=0)
        for grid, one in zip(grids, made, strict=True):
            losses[grid] += loss_of(halves[1 - number], (part - one.dequantize()) / own) / HALVES
    return losses


def round_table(
    source: ModelSource, name: str, grid: Grid, gram: Float[Tensor, "hidden hidden"] | None = None
) -> Quantized:
    """A table on a grid: to nearest, or below 8 bits by GPTQ with a Gram.

    Args:
        source: the original.
        name: of the table.
        grid: bits and group.
        gram: F, see above.
    """
    feedback = None if gram is None or grid.bits >= FINE else feedback_of(gram)
    check_scales(name, source.weight(name), grid)
    parts = []
    for rows in source.weight(name).T.split(CHUNK):
        weight = rows.float().T.contiguous()
        parts.append(_nearest(weight, grid) if feedback is None else gptq(weight, feedback, grid, sweeps=0))
    integers, scales = (
        torch.cat([getattr(part, kind) for part in parts], 1) for kind in ("integers", "scales")
    )
    return Quantized(integers.contiguous(), scales.contiguous(), grid)


def _nearest(weight: Float[Tensor, "hidden rows"], grid: Grid) -> Quantized:
    return rtn(weight, None, grid, searched=grid.bits < FINE)


def table_error(source: ModelSource, name: str, made: Quantized, effects: TableEffects) -> float:
    """What a table loses on all of its rows, relative to leaving it out: the root of a ratio of losses."""
    lost = whole = 0.0
    gram = effects.whole
    for number, rows in enumerate(source.weight(name).T.split(CHUNK)):
        weight = rows.float().T.contiguous()
        columns = slice(number * CHUNK, number * CHUNK + weight.shape[1])
        part = Quantized(made.integers[:, columns], made.scales[:, columns], made.grid)
        steps = row_steps(weight)
        lost += loss_of(gram, (weight - part.dequantize()) / steps) * weight.shape[1]
        whole += loss_of(gram, weight / steps) * weight.shape[1]
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0


def with_tables(plans: Sequence[Plan], tables: Sequence[TablePoints]) -> tuple[Plan, ...]:
    """Plans of the linears with the cheapest scheme of each table that adds little to the loss of the first.

    All tables together may add `SHARE` of what the linears are predicted to lose; a table's part of that goes by its
    bytes at its best, and where no scheme is that good the best one is taken.
    """
    best = {one.name: min(one.candidates, key=one.loss) for one in tables}
    room = sum(candidate.bytes for candidate in best.values())
    chosen, lost = [], 0.0
    for one in tables:
        allowed = SHARE * plans[0].loss * best[one.name].bytes / room
        good = [entry for entry in one.candidates if one.loss(entry) <= allowed]
        entry = min(good, key=lambda entry: (entry.bytes, one.loss(entry))) if good else best[one.name]
        chosen.append(Chosen((one.name,), entry))
        lost += one.loss(entry)
    return tuple(replace(plan, tables=tuple(chosen), table_loss=lost) for plan in plans)


def split_tables(plan: Plan, tables: Sequence[TablePoints]) -> Plan:
    """A plan in which tables were chosen like linears, with the two apart."""
    known = {one.name: one for one in tables}
    chosen = tuple(entry for entry in plan.chosen if entry.names[0] in known)
    if not chosen:
        return plan
    lost = sum(known[entry.names[0]].loss(entry.candidate) for entry in chosen)
    return replace(
        plan,
        chosen=tuple(entry for entry in plan.chosen if entry.names[0] not in known),
        budget=plan.budget - sum(entry.candidate.bytes for entry in chosen),
        loss=max(0.0, plan.loss - lost),
        tables=chosen,
        table_loss=lost,
    )


def table_weights(tables: Sequence[TablePoints]) -> Mapping[str, float]:
    """What a unit of squared relative error of each table costs, as a knapsack wants it."""
    return {one.name: one.sensitivity for one in tables}


def notes_on_tables(plan: Plan, errors: Mapping[str, float], asked: Iterable[str]) -> tuple[str, ...]:
    """What tables a plan chose, as a fact for a report.

    Args:
        plan: that was carried out.
        errors: of the tables that were made, see `table_error`.
        asked: tables that a plan was to choose for.
    """
    known = {entry.names[0] for entry in plan.tables}
    unknown = tuple(
        f"what rounding {name} costs could not be predicted for this model, so the plan did not choose its precision"
        for name in asked
        if name not in known
    )
    if not plan.tables:
        return unknown
    said = ", ".join(
        f"{entry.names[0]} {entry.candidate.scheme} ({entry.candidate.bytes} bytes, relative error predicted "
        f"{entry.candidate.errors[0] ** 0.5:.3g}, made {errors[entry.names[0]]:.3g})"
        for entry in plan.tables
    )
    part = f", {plan.table_loss / plan.loss:.1%} of what the linears lose" if plan.loss > 0 else ""
    return (
        f"tables: {said}; together they are predicted to add {plan.table_loss:.3g} to the loss{part}",
        *unknown,
    )


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-30))
