"""The losses of a report in reading order: the steps from the original to the file, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass

from compot_deploy.accuracy.losses import Loss
from compot_deploy.report.document import Report


@dataclass(frozen=True)
class Step:
    """One loss of a report.

    Attributes:
        key: of the loss in report.json, ``rival`` for the one beside it.
        name: in a few words.
        meaning: between what and what it is measured.
        loss: None where it was not measured.
    """

    key: str
    name: str
    meaning: str
    loss: Loss | None


def all_losses(report: Report) -> tuple[Step, ...]:
    """Every loss that a report of this kind has: the split of the method loss, and a rival's, only where it exists."""
    accuracy, rival = report.accuracy, report.rival
    split = (
        Step("factorization", "factorisation", "original → factors, not quantized", accuracy.factorization),
        Step("quantization", "quantization", "factors → quantized factors", accuracy.quantization),
    )
    beside: tuple[Step, ...] = ()
    if rival is not None:
        beside = (Step("rival", f"method, {rival.name}", "the same factors, another quantizer", rival.loss),)
    return (
        *(split if accuracy.factorization is not None else ()),
        Step("method", "method", "original → compressed, in torch", accuracy.method),
        *beside,
        Step("export_exact", "export, exact", "compressed → file, computed exactly", accuracy.export_exact),
        Step("export_shipped", "export, shipped", "compressed → file as it ships", accuracy.export_shipped),
        Step("total", "total", "original → file as it ships", accuracy.total),
        Step("noise", "noise floor", "torch against itself, token by token", accuracy.noise),
    )


def steps(report: Report) -> dict[str, Loss]:
    """The losses on the way from the original to the file, in order, where they were measured.

    Where the method loss is split, its parts stand for it.
    """
    beside = {"rival", "noise"} | ({"method"} if report.accuracy.factorization is not None else set())
    return {
        step.name: step.loss
        for step in all_losses(report)
        if step.key not in beside and step.loss is not None
    }
