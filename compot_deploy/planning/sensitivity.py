"""Sensitivities: what a unit of error of each matrix costs the model, which is not the same everywhere.

One backward pass tells it for all matrices. Let a matrix be disturbed by ``ΔW = H^(−½) Z C``: Z white, H the damped
Gram of its input, C as large for each output as rounding its weights is; that is what quantization with error feedback
leaves. To second order the model's loss (KL divergence, or one minus the cosine) is half of the expected square of what
the disturbance does to a scalar that is sampled from the model's own output (`Task.sampled`), and the expectation over
Z has a closed form: for a text with inputs x and output gradients g it is ``‖Σ_t (L⁻¹x_t)(C g_t)ᵀ‖²``, ``H = L Lᵀ``.

The same pass tells what the token embedding and the output head do, see `compot_deploy.planning.table_effects`.

Where gradients cannot be had each matrix is disturbed alone, and outputs are compared on calibration text. That is also
what the backward pass is tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from compot_deploy.core.matrix import Matrix
from compot_deploy.core.spilled import Spilled
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.backward import Product, products_backwards
from compot_deploy.models.experts import same_place
from compot_deploy.models.sites import InputGroup
from compot_deploy.models.tasks import Batch, LossSum
from compot_deploy.models.whole import replaced, whole_model
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.candidates import realize, schemes
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.prediction import output_steps
from compot_deploy.planning.schemes import Joint, Plain, Scheme
from compot_deploy.planning.table_effects import TableGradients, has_effects, keep_effects
from compot_deploy.quant import QUANTIZERS

_POSITIONS: Final = 1024
"""Positions of calibration text on which sensitivities are measured; standard errors of a KL are then a few %."""

_TEXTS: Final = 64
"""Texts of a model that gives one output for each."""

_DRAWS: Final = 4
"""Scalars for each of them; a decoder draws a label at every position."""

_LOGITS: Final = 32_000_000
"""Logits of the original that are kept for it, at most: 128 MB."""

_SEED: Final = 0

_DAMPING: Final = 1e-2
"""Of the Gram, as GPTQ has it: errors do not grow without bound where the input has no energy."""


def measure_sensitivities(context: PlanningContext) -> dict[str, float]:
    """What a unit of squared relative error of each matrix costs the model, in units of the task's loss."""
    path = context.work / "sensitivities.json"
    if is_sound(path) and has_effects(context.work):
        known: dict[str, float] = read_value(path)
        return known
    tables = TableGradients(context.source, _some(context, 1), context.device)
    try:
        found = sensitivities_backwards(context, tables)
        keep_effects(context.work, tables.effects())
    except UnsupportedModelError:
        found = sensitivities_one_by_one(context)
        keep_effects(context.work, {})
    write_value(path, found)
    return found


def sensitivities_backwards(
    context: PlanningContext, tables: TableGradients | None = None
) -> dict[str, float]:
    """Sensitivities of all matrices from one backward pass.

    Args:
        context: model and text.
        tables: told what the tables do.

    Raises:
        UnsupportedModelError: the model's blocks hand each other more than hidden states.
    """
    task, label = context.source.task, "Measure sensitivities"
    draws = _DRAWS if task.pools else 1
    generator = torch.Generator().manual_seed(_SEED)
    done = 0

    def step() -> None:
        nonlocal done
        context.progress(done, 2 * len(context.blocks), label)
        done += 1

    squares = dict.fromkeys(context.names, 0.0)
    batches = _some(context, 1)
    products = products_backwards(
        context.source,
        batches,
        lambda output, batch: task.sampled(output, batch.compared, generator),
        draws=draws,
        device=context.device,
        step=step,
        watch=tables,
    )
    units: dict[str, float] = {}
    for block, seen in products:
        disturbances: dict[str, _Disturbance] = {}
        for group in context.source.layout.of(block):
            disturbances |= dict.fromkeys(group.names, _Disturbance(context, group))
        units |= {name: disturbance.error(name) for name, disturbance in disturbances.items()}
        for one in seen:
            if one.name in disturbances:  # routers are seen as well
                squares[one.name] += disturbances[one.name].expected_square(one)
    context.progress(2 * len(context.blocks), 2 * len(context.blocks), label)
    count = sum(len(batch.real) if task.pools else int(batch.compared.sum()) for batch in batches) * draws
    found = {
        name: squares[name] / (2 * count * units[name]) if units[name] else 0.0 for name in context.names
    }
    return _with_unreached(found)


def _with_unreached(found: Mapping[str, float]) -> dict[str, float]:
    """An expert that no token of the text reached may matter in others: it is taken to do so as its neighbours do."""
    neighbours: dict[str, list[float]] = {}
    for name, value in found.items():
        place = same_place(name)
        if place is not None and value > 0.0:
            neighbours.setdefault(place, []).append(value)
    result = dict(found)
    for name, value in found.items():
        known = neighbours.get(same_place(name) or "")
        if value == 0.0 and known:
            result[name] = sum(known) / len(known)
    return result


class _Disturbance:
    """``ΔW = H^(−½) Z C`` of the matrices of one input, see above."""

    def __init__(self, context: PlanningContext, group: InputGroup) -> None:
        gram = context.grams(group.block)[group.name].to(context.device)
        damped = whiten(gram, ridge=_DAMPING)
        self._factor = damped.factor
        self._weights = {name: weight.double() for name, weight in context.weights(group.names).items()}
        self._steps = {name: output_steps(weight) for name, weight in self._weights.items()}
        self._gram = gram.double()
        inputs = gram.shape[0]
        identity = torch.eye(inputs, dtype=torch.float64, device=gram.device)
        inverse = torch.linalg.solve_triangular(self._factor, identity, upper=False)
        added = damped.ridge * float(self._gram.diagonal().mean())
        self._dimensions = inputs - added * float(inverse.square().sum())  # tr(H⁻¹ G)

    def error(self, name: str) -> float:
        """Its squared error relative to that of leaving the matrix out."""
        weight = self._weights[name]
        whole = float((weight * (self._gram @ weight)).sum())
        return self._dimensions * float(self._steps[name].square().sum()) / whole if whole > 0.0 else 0.0

    def expected_square(self, product: Product) -> float:
        """The expected square of what it does to the scalar."""
        steps = self._steps[product.name].float()
        total = 0.0
        for values, gradient in zip(product.values, product.gradient, strict=True):
            white = torch.linalg.solve_triangular(self._factor, values.double().T, upper=False)
            total += float((white.float() @ (gradient * steps)).square().sum())
        return total


def sensitivities_one_by_one(context: PlanningContext) -> dict[str, float]:
    """Sensitivities of all matrices, each disturbed alone: by the coarsest plain grid, else by a factorized scheme."""
    found: dict[str, float] = {}
    loss_of = ReplacedLoss(context)
    for group in context.groups:
        whitening = context.whitening(group)
        for name in group.names:
            context.progress(len(found), len(context.names), "Measure sensitivities one by one")
            found[name] = _sensitivity_of(name, context, group, whitening, loss_of)
    context.progress(len(found), len(found), "Measure sensitivities one by one")
    return found


class ReplacedLoss:
    """Loss of the model with some matrices replaced, on the first calibration windows.

    Args:
        context: model and text.
        times: as much text as for a single matrix, for choices between models that come close to each other.
    """

    def __init__(self, context: PlanningContext, times: int = 1) -> None:
        self._source, self._task = context.source, context.source.task
        self._model = whole_model(context.source, device=context.device)
        self._batches = [batch.to(torch.device(context.device)) for batch in _some(context, times)]
        self._original, self._shapes = Spilled(context.work), []
        for batch in self._batches:
            outputs = self._outputs(batch)
            self._original.write(outputs)
            self._shapes.append(tuple(outputs.shape))

    def __call__(self, matrices: Mapping[str, Matrix]) -> float:
        """The mean over positions or texts."""
        total = LossSum(0.0, 0)
        self._original.rewind()
        with replaced(self._model, self._source, matrices):
            for batch, shape in zip(self._batches, self._shapes, strict=True):
                original, outputs = self._original.read(shape), self._outputs(batch)
                total += self._task.loss(original.to(outputs), outputs, batch.compared)
        return total.mean

    def _outputs(self, batch: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return self._task.output(self._model(**batch.arguments)).float()


def _some(context: PlanningContext, times: int) -> list[Batch]:
    """The first windows, as many as the task needs, one to a batch."""
    task, windows = context.source.task, context.windows.inputs
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


def _sensitivity_of(
    name: str, context: PlanningContext, group: InputGroup, whitening: Whitening, loss_of: ReplacedLoss
) -> float:
    (weight,) = context.weights([name]).values()
    probe = _probe(schemes(weight, whitening, context.storage, context.search))
    quantizer = QUANTIZERS[context.quantizer]
    made = realize(probe, {name: weight}, whitening, context.search, quantizer=quantizer)
    error = made.errors[name]
    return loss_of(made.matrices) / error if error > 0.0 else 0.0


def _probe(tried: Sequence[Scheme]) -> Scheme:
    """A disturbance of the size that plans deal in."""
    grids = [scheme for scheme in tried if isinstance(scheme, Plain) and scheme.grid is not None]
    if grids:
        return min(grids, key=_coarseness)
    return next(scheme for scheme in tried if isinstance(scheme, Joint))


def _coarseness(scheme: Plain) -> tuple[int, int]:
    assert scheme.grid is not None
    return scheme.grid.bits, -scheme.grid.group
