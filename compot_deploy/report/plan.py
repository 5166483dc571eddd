"""A plan for people: a table, JSON, and a plot of predicted loss against bytes. Nothing is exported."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.grid import Grid
from compot_deploy.core.outputs import check_output, write_output
from compot_deploy.core.storage import InMemory
from compot_deploy.errors import InputError, MissingDependencyError
from compot_deploy.planning.carry_out import name_of
from compot_deploy.planning.draft import Draft
from compot_deploy.planning.knapsack import Chosen, Plan, frontier, smallest_bytes
from compot_deploy.planning.measure import counted, notes_on
from compot_deploy.planning.rate_points import RatePoints
from compot_deploy.planning.schemes import Plain, describe, scheme_to_data
from compot_deploy.report.facts import Frontier, FrontierPoint
from compot_deploy.report.inspection import Overview

_PLAIN_INT4: Final = Plain(Grid(4, 32))
_POINTS: Final = 32
REPORT_POINTS: Final = 20


@dataclass(frozen=True)
class Planned:
    """A draft, and what its numbers are measured against.

    Attributes:
        model: what it is for, as the user called it.
        draft: rate–distortion points, sensitivities and plans.
        further: what else is going to happen, as notes.
    """

    model: str
    draft: Draft
    further: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan, before the plain mix is compared with it on the model."""
        return self.draft.plans[0]

    @property
    def weights(self) -> int:
        """Weights of all linears."""
        return sum(rows * columns for rows, columns in self.draft.sizes.values())

    @property
    def tensor_memory_bytes(self) -> int:
        """What the tensors of the linears take in a loaded graph; runtimes keep more beside them."""
        storage = self.draft.context.storage
        loaded = storage if isinstance(storage, InMemory) else InMemory(storage)
        total = 0
        for entry in self.plan.chosen:
            sizes = [self.draft.sizes[name] for name in entry.names]
            total += entry.candidate.scheme.bytes(sizes[0][0], sum(columns for _, columns in sizes), loaded)
        return total

    @property
    def artifact_bytes(self) -> int:
        """Predicted size of the model's files."""
        return self.plan.bytes + self.draft.other_bytes


def overview(planned: Planned) -> Overview:
    """One row per choice, then the totals."""
    draft, plan = planned.draft, planned.plan
    rows = []
    total_plain = 0
    for entry in plan.chosen:
        plain = sum(_PLAIN_INT4.bytes(*draft.sizes[name], draft.context.storage) for name in entry.names)
        total_plain += plain
        errors = " ".join(f"{error**0.5:.3f}" for error in entry.candidate.errors)
        loss = sum(
            draft.sensitivities[name] * error
            for name, error in zip(entry.names, entry.candidate.errors, strict=True)
        )
        rows.append(
            (
                _label(entry.names),
                describe(entry.candidate.scheme),
                errors,
                f"{loss:.2g}",
                f"{entry.candidate.bytes:,}",
                f"{plain:,}",
            )
        )
    bits = plan.bytes * 8 / planned.weights
    rows.append(
        ("all linears", f"{bits:.3f} bits", "", f"{plan.loss:.3g}", f"{plan.bytes:,}", f"{total_plain:,}")
    )
    rows += [_table_row(planned, entry) for entry in plan.tables]
    beside = draft.other_bytes - plan.table_bytes
    tables = f", tables {plan.table_bytes:,}" if plan.tables else ""
    lines = [
        f"Budget {plan.budget:,} bytes for the linears{tables}; everything else takes {beside:,}: "
        f"predicted size of the model's files {planned.artifact_bytes:,} bytes.",
        f"Loaded, the tensors of the linears take {planned.tensor_memory_bytes:,} bytes; what a runtime keeps "
        "beside them (scales once more, packing buffers) is not counted.",
        "Error is the relative error of a matrix's output on calibration text; loss is predicted, "
        f"in {draft.context.source.task.unit}.",
    ]
    for other in draft.plans[1:]:
        name = name_of(other)
        lines.append(
            f"{name[0].upper()}{name[1:]} within the same budget takes {other.bytes:,} bytes and has a predicted "
            f"loss of {other.loss:.3g}; it is measured on the model beside the plan before one is exported."
        )
    lines += [f"{note[0].upper()}{note[1:]}." for note in notes_of(planned)]
    return Overview(
        title=f"Plan for {planned.model}",
        columns=("linears", "choice", "error", "loss", "bytes", "plain int4"),
        rows=tuple(rows),
        lines=tuple(lines),
    )


def notes_of(planned: Planned) -> tuple[str, ...]:
    """What must be said of a plan besides its numbers."""
    return (*notes_on(planned.draft.rate_points), *planned.plan.notes, *planned.further)


def _table_row(planned: Planned, entry: Chosen) -> tuple[str, str, str, str, str, str]:
    """The token embedding or the output head: what was chosen for it."""
    (name,), candidate, source = entry.names, entry.candidate, planned.draft.context.source
    both = " (embedding and head)" if source.layout.tied else ""
    plain = _PLAIN_INT4.bytes(*source.shape(name), planned.draft.context.storage)
    return (
        f"{_label(entry.names)}{both}",
        describe(candidate.scheme),
        f"{candidate.errors[0] ** 0.5:.3f}",
        f"{planned.draft.sensitivities[name] * candidate.errors[0]:.2g}",
        f"{candidate.bytes:,}",
        f"{plain:,}",
    )


def as_json(planned: Planned) -> str:
    """Everything in the table, and the predicted frontier."""
    draft, plan = planned.draft, planned.plan
    value: dict[str, Any] = {
        "model": planned.model,
        "budget": plan.budget,
        "bytes": plan.bytes,
        "bits_per_weight": plan.bytes * 8 / planned.weights,
        "predicted_artifact_bytes": planned.artifact_bytes,
        "tensor_memory_bytes": planned.tensor_memory_bytes,
        "predicted_loss": plan.loss,
        "notes": list(notes_of(planned)),
        "forms": dict(zip(("measured", "listed"), counted(draft.rate_points), strict=True)),
        "chosen": [
            {
                "linears": list(entry.names),
                "form": scheme_to_data(entry.candidate.scheme),
                "bytes": entry.candidate.bytes,
                "squared_errors": list(entry.candidate.errors),
            }
            for entry in plan.chosen
        ],
        "tables": [
            {
                "table": entry.names[0],
                "form": scheme_to_data(entry.candidate.scheme),
                "bytes": entry.candidate.bytes,
                "squared_error": entry.candidate.errors[0],
            }
            for entry in plan.tables
        ],
        "table_bytes": plan.table_bytes,
        "predicted_table_loss": plan.table_loss,
        "effects": dict(draft.sensitivities),
        "frontier": [
            {"bytes": one.bytes, "predicted_loss": one.loss} for one in _frontier(planned, draft.rate_points)
        ],
    }
    return json.dumps(value)


def plot(planned: Planned, path: Path) -> None:
    """Predicted loss against bytes, of the plan and of plain grids alone, with the chosen point.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError("matplotlib", "report", "Drawing a plan") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [one.only(lambda scheme: isinstance(scheme, Plain)) for one in planned.draft.rate_points]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    for label, rate_points in (("all schemes", planned.draft.rate_points), ("plain grids alone", plain)):
        if all(all(one.per_matrix) for one in rate_points):
            points = [one for one in _frontier(planned, rate_points) if one.loss > 0.0]
            bits = [one.bytes * 8 / planned.weights for one in points]
            axes.plot(bits, [one.loss for one in points], ".-", label=label)
    chosen = planned.plan.bytes * 8 / planned.weights
    axes.plot([chosen], [max(planned.plan.loss, 1e-12)], "o", markersize=9, label="chosen")
    axes.set(
        xlabel="bits per weight of the linears, everything counted",
        ylabel=f"predicted loss [{planned.draft.context.source.task.unit}]",
        yscale="log",
        title=planned.model,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=picture_format(path))
    pyplot.close(figure)
    write_output(path, drawn.getvalue(), "The picture")


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn or written, before anything is measured for it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: a kind of picture that it does not draw, or a place that cannot be written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MissingDependencyError("matplotlib", "report", "Drawing a plan") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if picture_format(path) not in known:
        raise InputError(f"--plot {path}: a picture is one of {', '.join(sorted(known))}.")
    check_output(path, "The picture")


def picture_format(path: Path) -> str:
    """What the ending of a name says; devices and names without one get PNG."""
    return path.suffix.removeprefix(".").lower() or "png"


def frontier_of(draft: Draft, taken: Plan, counts: str) -> Frontier:
    """The figures of the plot, for a report: predicted loss against bytes, and the plan that was taken.

    Args:
        draft: rate–distortion points and sensitivities.
        taken: the plan that was carried out.
        counts: ``file`` or ``memory``, what the bytes are.
    """
    planned = Planned("", draft)

    def point(plan: Plan) -> FrontierPoint:
        return FrontierPoint(plan.bytes, plan.bytes * 8 / planned.weights, plan.loss)

    def points(rate_points: Sequence[RatePoints]) -> tuple[FrontierPoint, ...]:
        if not all(all(one.per_matrix) for one in rate_points):
            return ()
        return tuple(point(plan) for plan in _frontier(planned, rate_points, REPORT_POINTS))

    return Frontier(
        counts=counts,
        budget=draft.plans[0].budget,
        weights=planned.weights,
        chosen=point(taken),
        all_schemes=points(draft.rate_points),
        plain=points([one.only(lambda scheme: isinstance(scheme, Plain)) for one in draft.rate_points]),
    )


def _frontier(planned: Planned, rate_points: Sequence[RatePoints], count: int = _POINTS) -> tuple[Plan, ...]:
    """Plans from the smallest size to twice the chosen one."""
    low = smallest_bytes(rate_points)
    high = max(2 * planned.plan.bytes, low + 1)
    budgets = [low + (high - low) * step // (count - 1) for step in range(count)]
    return frontier(rate_points, planned.draft.sensitivities, budgets)


def _label(names: Sequence[str]) -> str:
    """Names of one block with their path once: layers.0.self_attn.q_proj + k_proj + v_proj."""
    first = names[0].removeprefix("model.")
    if len(names) == 1:
        return first
    return first + "".join(f" + {name.rsplit('.', 1)[-1]}" for name in names[1:])
