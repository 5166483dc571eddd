"""Rate–distortion points of every input: which forms there are, and the error of each, measured.

Files in the work folder are named after the numbers that were measured, so measurements serve every budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.store import write_text
from compot_deploy.models.sites import InputGroup
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.candidates import VERSION, Search, forms, realize
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.curves import Curve, curve
from compot_deploy.planning.knapsack import too_little
from compot_deploy.planning.schemes import Form, Joint, Plain, form_from_data, form_to_data
from compot_deploy.planning.screening import screen
from compot_deploy.quant import QUANTIZERS, rtn

_ROUNDED_OUTPUTS: Final = 128
"""Outputs that are rounded to nearest to predict what finer groups bring: evenly spread, at most so many."""


def check_budget(context: PlanningContext, budget: int) -> None:
    """Refuse a budget that the smallest forms exceed, before any form is measured.

    Forms are listed for it, which takes a hundredth of the time of measuring them, and only where plain grids
    do not fit.

    Raises:
        RecipeError: says what the smallest forms need.
    """
    plain = [Plain(grid) for grid in context.search.grids.grids] or [Plain(None)]
    sizes = context.sizes(context.names).values()
    if sum(min(form.bytes(*size, context.storage) for form in plain) for size in sizes) <= budget:
        return
    label = "List forms"
    least = 0
    for number, group in enumerate(context.groups):
        context.progress(number, len(context.groups), label)
        alone, together = _listed(context, context.weights(group.names), context.whitening(group))
        least += min([sum(min(prices.values()) for prices in alone.values()), *together.values()])
    context.progress(len(context.groups), len(context.groups), label)
    if budget < least:
        raise too_little(budget, least)


def measure_curves(context: PlanningContext) -> tuple[Curve, ...]:
    """Candidates of every input, measured on their quantized values."""
    label = "Measure candidates"
    curves = []
    for number, group in enumerate(context.groups):
        context.progress(number, len(context.groups), label)
        curves.append(_curve(context, group))
    context.progress(len(context.groups), len(context.groups), label)
    return tuple(curves)


def counted(curves: Sequence[Curve]) -> tuple[int, int]:
    """How many forms of all matrices were measured, and how many were listed."""
    measured = sum(sum(map(len, one.alone)) + len(one.together) for one in curves)
    return measured, measured + sum(one.unmeasured for one in curves)


def notes_on(curves: Sequence[Curve]) -> tuple[str, ...]:
    """That not every form was measured, where it is so: a fact that a report must state."""
    measured, listed = counted(curves)
    if measured == listed:
        return ()
    return (
        f"{measured} of {listed} forms of the linears were measured, from coarse to fine; the others promised too "
        "little beside them. --search full measures all",
    )


def _curve(context: PlanningContext, group: InputGroup) -> Curve:
    weights, whitening = context.weights(group.names), context.whitening(group)
    number = context.blocks.index(group.block)
    named = f"curve-{number:04d}-{group.name}-{_content(context, weights, whitening)}"
    path = context.work / f"{named}.json"
    if not path.exists():
        write_text(path, json.dumps(_measure(context, weights, whitening)))
    stored = json.loads(path.read_text())
    return curve(
        group.names,
        {
            name: _forced(context.search, [(form_from_data(form), error) for form, error in entries])
            for name, entries in stored["alone"].items()
        },
        [(form_from_data(form), errors) for form, errors in stored["together"]],
        context.sizes(group.names),
        context.storage,
        stored.get("unmeasured", 0),
    )


def _listed(
    context: PlanningContext, weights: Mapping[str, Tensor], whitening: Whitening
) -> tuple[dict[str, dict[Form, int]], dict[Form, int]]:
    """Forms and their bytes: of each matrix of an input, and of all of them with one dictionary."""
    search, storage = context.search, context.storage

    def listed(weight: Float[Tensor, "inputs outputs"]) -> dict[Form, int]:
        inputs, columns = weight.shape
        tried = forms(weight, whitening, storage, search)
        return {form: form.bytes(inputs, columns, storage) for form in tried}

    def taken(prices: Mapping[Form, int], plain: int) -> dict[Form, int]:
        return {form: size for form, size in prices.items() if search.takes(form, size, plain)}

    plain = {
        name: search.plain.bytes(weight.shape[0], weight.shape[1], storage)
        for name, weight in weights.items()
    }
    together: dict[Form, int] = {}
    if len(weights) > 1:
        everything = listed(torch.cat(list(weights.values()), dim=1))
        together = taken(
            {form: size for form, size in everything.items() if isinstance(form, Joint)}, sum(plain.values())
        )
    everything_alone = {name: listed(weight) for name, weight in weights.items()}
    alone = {name: taken(prices, plain[name]) for name, prices in everything_alone.items()}
    if not all(alone.values()):  # a matrix that does not get smaller by being factorised
        for name, prices in everything_alone.items():
            grids = {form: size for form, size in prices.items() if isinstance(form, Plain)}
            alone[name] = grids | alone[name]
    return alone, together


def _forced(search: Search, entries: list[tuple[Form, float]]) -> list[tuple[Form, float]]:
    """Without plain forms where the method factorises and the matrix gets smaller by it."""
    factorised = [entry for entry in entries if isinstance(entry[0], Joint)]
    return factorised if factorised and search.method in ("compot", "svd-llm") else entries


def _measure(context: PlanningContext, weights: Mapping[str, Tensor], whitening: Whitening) -> dict[str, Any]:
    outputs = sum(weight.shape[1] for weight in weights.values())

    def errors(form: Form, names: Sequence[str]) -> Mapping[str, float]:
        # An output of a plain grid is quantized for itself: matrices of one input are done side by side, in one pass.
        covered = {name: weights[name] for name in names}
        quantizer = QUANTIZERS[context.quantizer]
        return realize(form, covered, whitening, context.search, quantizer=quantizer).errors

    def nearest(name: str, grid: Grid) -> float:
        some = weights[name][:, :: -(-weights[name].shape[1] // _ROUNDED_OUTPUTS)]
        inputs, columns = some.shape
        # Nothing passes from group to group: they are laid side by side and rounded in one go.
        shape = grid.groups(inputs), grid.group, columns
        whole = torch.nn.functional.pad(some, (0, 0, 0, shape[0] * shape[1] - inputs)).view(shape)
        beside = rtn(whole.transpose(0, 1).flatten(1), None, grid).dequantize()
        rounded = beside.view(grid.group, shape[0], columns).transpose(0, 1).flatten(0, 1)
        return whitening.error(some, rounded[:inputs]) ** 2

    alone, together = _listed(context, weights, whitening)
    measured = screen(
        alone,
        together,
        {name: weight.shape[1] / outputs for name, weight in weights.items()},
        tolerance=context.search.tolerance,
        measure=errors,
        nearest=nearest,
    )
    known = sum(map(len, measured.alone.values())) + len(measured.together)
    return {
        "alone": {
            name: [(form_to_data(form), error) for form, error in found.items()]
            for name, found in measured.alone.items()
        },
        "together": [(form_to_data(form), found) for form, found in measured.together.items()],
        "unmeasured": sum(map(len, alone.values())) + len(together) - known,
    }


def _content(context: PlanningContext, weights: Mapping[str, Tensor], whitening: Whitening) -> str:
    """A name for measurements on exactly these numbers."""
    tolerance = (context.search.tolerance,) if context.search.tolerance else ()
    method = () if context.search.method == "auto" else (context.search.method, context.search.plain)
    settings = (VERSION, context.search, context.storage, context.quantizer, *tolerance, *method)
    digest = hashlib.sha256(repr(settings).encode())
    for value in (*weights.values(), whitening.factor):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
