"""The losses of a report in reading order: the steps from the original to the file, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from compot_deploy.accuracy.losses import Loss
from compot_deploy.report.document import Report

ALTERNATIVES: Final = "alternatives"
"""Field of a report that holds other ways to compress the same model."""


@dataclass(frozen=True)
class Step:
    """One loss of a report.

    Attributes:
        key: of the loss in report.json, ``alternatives.0`` for the first beside it.
        name: in a few words.
        meaning: between what and what it is measured.
        loss: None where it was not measured.
    """

    key: str
    name: str
    meaning: str
    loss: Loss | None


def all_losses(report: Report) -> tuple[Step, ...]:
    """Every loss that a report has: the split of the method loss, and alternatives, only where they exist."""
    accuracy = report.accuracy
    split = (
        Step("factorization", "factorization", "original → factors, not quantized", accuracy.factorization),
        Step("quantization", "quantization", "factors → quantized factors", accuracy.quantization),
    )
    before = Step(
        "unhealed", "before healing", "original → compressed, not healed, in torch", accuracy.unhealed
    )
    meaning = "original → compressed otherwise, in torch"
    beside = tuple(
        Step(f"{ALTERNATIVES}.{number}", f"method, {other.name}", meaning, other.loss)
        for number, other in enumerate(report.alternatives)
    )
    return (
        *(split if accuracy.factorization is not None else ()),
        *(() if accuracy.unhealed is None else (before,)),
        Step("method", "method", "original → compressed, in torch", accuracy.method),
        *beside,
        Step(
            "export_exact",
            "export, float32",
            "compressed → file, computed in float32: the reference",
            accuracy.export_reference,
        ),
        Step("export_shipped", "export, deployed", "compressed → file as deployed", accuracy.export_deployed),
        Step("total", "total", "original → file as deployed", accuracy.total),
        Step("noise", "numerical noise", "torch against itself, token by token", accuracy.noise),
    )


def steps(report: Report) -> dict[str, Loss]:
    """The losses on the way from the original to the file, in order, where they were measured.

    Where the method loss is split, its parts stand for it; healing is no part of it, it makes it less.
    """
    accuracy = report.accuracy
    parts = accuracy.factorization is not None and accuracy.unhealed is None
    beside = {"noise"} | ({"method"} if parts else set())
    return {
        step.name: step.loss
        for step in all_losses(report)
        if step.key not in beside and not step.key.startswith(ALTERNATIVES) and step.loss is not None
    }
