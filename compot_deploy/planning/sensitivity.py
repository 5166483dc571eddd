"""What disturbing one matrix does to the model: a unit of error does not cost the same everywhere.

Each matrix is disturbed alone, and the outputs are compared on calibration text, by the task's own loss: KL divergence
in nats per token, or one minus the cosine of embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from compot_deploy.core.matrix import Matrix
from compot_deploy.core.store import write_text
from compot_deploy.models.sites import InputGroup
from compot_deploy.models.tasks import Batch, LossSum
from compot_deploy.models.whole import replaced, whole_model
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.candidates import forms, realize
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.schemes import Form, Joint, Plain
from compot_deploy.quant import QUANTIZERS

_POSITIONS: Final = 1024
"""Positions of calibration text on which effects are measured; standard errors of a KL are then a few %."""

_TEXTS: Final = 64
"""Texts of a model that gives one output for each."""

_LOGITS: Final = 32_000_000
"""Logits of the original that are kept for it, at most: 128 MB."""


def measure_effects(context: PlanningContext) -> dict[str, float]:
    """What a unit of squared relative error of each matrix costs the model, in units of the task's loss.

    The disturbance is the coarsest plain grid there is; without grids, a factorised form.
    """
    path = context.work / "effects.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    label = "Measure effects"
    total = len(context.names)
    if len(known) < total:
        effect = Effect(context)
        for group in context.groups:
            if all(name in known for name in group.names):
                continue
            whitening = context.whitening(group)
            for name in group.names:
                context.progress(len(known), total, label)
                known[name] = _effect_of(name, context, group, whitening, effect)
            write_text(path, json.dumps(known))
    context.progress(total, total, label)
    return known


class Effect:
    """Loss of the model with some matrices replaced, on the first calibration windows.

    Args:
        context: model and text.
        times: as much text as for a single matrix, for choices between models that come close to each other.
    """

    def __init__(self, context: PlanningContext, times: int = 1) -> None:
        self._source, self._task = context.source, context.source.task
        self._model = whole_model(context.source, device=context.device)
        self._batches = [batch.to(torch.device(context.device)) for batch in _some(context, times)]
        self._original = [self._outputs(batch) for batch in self._batches]

    def __call__(self, matrices: Mapping[str, Matrix]) -> float:
        """The mean over positions or texts."""
        total = LossSum(0.0, 0)
        with replaced(self._model, self._source.sites, matrices):
            for batch, original in zip(self._batches, self._original, strict=True):
                total += self._task.loss(original, self._outputs(batch), batch.real)
        return total.mean

    def _outputs(self, batch: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return self._task.output(self._model(**batch.arguments)).float()


def _some(context: PlanningContext, times: int) -> list[Batch]:
    """The first windows, as many as the task needs, one to a batch."""
    task, windows = context.source.task, context.windows.windows
    if task.pools:
        return [batch for window in windows[: _TEXTS * times] for batch in task.batches([window])]
    left = times * min(_POSITIONS, max(64, _LOGITS // context.source.vocabulary))
    found: list[Batch] = []
    for window in windows:
        if left <= 0:
            break
        cut = window[: max(2, left)]
        found += task.batches([cut])
        left -= len(cut)
    return found


def _effect_of(
    name: str, context: PlanningContext, group: InputGroup, whitening: Whitening, effect: Effect
) -> float:
    (weight,) = context.weights([name]).values()
    probe = _probe(forms(weight, whitening, context.storage, context.search))
    quantizer = QUANTIZERS[context.quantizer]
    made = realize(probe, {name: weight}, whitening, context.search, quantizer=quantizer)
    error = made.errors[name]
    return effect(made.matrices) / error if error > 0.0 else 0.0


def _probe(tried: Sequence[Form]) -> Form:
    """A disturbance of the size that plans deal in."""
    grids = [form for form in tried if isinstance(form, Plain) and form.grid is not None]
    if grids:
        return min(grids, key=_coarseness)
    return next(form for form in tried if isinstance(form, Joint))


def _coarseness(form: Plain) -> tuple[int, int]:
    assert form.grid is not None
    return form.grid.bits, -form.grid.group
