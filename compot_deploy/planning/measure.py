"""Rate–distortion points of every input: which schemes there are, and the error of each, measured.

Files in the work folder are named after the numbers that were measured, so measurements serve every budget. They only
save time: a plan follows from the errors that it asked for itself, not from what else was measured before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.models.sites import InputGroup
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.candidates import VERSION, Search, energies_of, realize, schemes
from compot_deploy.planning.context import Conditions, InputNumbers, PlanningContext
from compot_deploy.planning.knapsack import Chosen, Plan, too_little
from compot_deploy.planning.prediction import sampled_errors, spectral_errors
from compot_deploy.planning.pruning import prune
from compot_deploy.planning.rate_points import RatePoints, price_candidates
from compot_deploy.planning.schemes import Joint, Plain, Scheme, scheme_from_data, scheme_to_data
from compot_deploy.quant import QUANTIZERS, rtn

_ROUNDED_OUTPUTS: Final = 128
"""Outputs that are rounded to nearest to predict what finer groups bring: evenly spread, at most so many."""


def check_budget(context: PlanningContext, budget: int) -> None:
    """Refuse a budget that the smallest schemes exceed, before any scheme is measured.

    Schemes are listed for it, which takes a hundredth of the time of measuring them, and only where plain grids
    do not fit.

    Raises:
        RecipeError: says what the smallest schemes need.
    """
    plain = [Plain(grid) for grid in context.search.grids.grids] or [Plain(None)]
    sizes = context.sizes(context.names).values()
    if sum(min(scheme.bytes(*size, context.storage) for scheme in plain) for size in sizes) <= budget:
        return
    label = "List schemes"
    least = 0
    context.progress(0, len(context.groups), label)
    numbers = (context.numbers(group) for group in context.groups)
    for number, smallest in enumerate(context.workers.map(smallest_of, context.conditions, numbers), 1):
        context.progress(number, len(context.groups), label)
        least += smallest
    if budget < least:
        raise too_little(budget, least)


def measure_rate_points(
    context: PlanningContext, groups: Sequence[InputGroup] | None = None
) -> tuple[RatePoints, ...]:
    """Candidates of inputs, measured on their quantized values, or predicted where the search says so.

    Args:
        context: model, text and work folder; what was measured already is read there.
        groups: the inputs; None is all of them.
    """
    label = "Predict candidates" if context.search.predicted else "Measure candidates"
    groups = context.groups if groups is None else groups
    missing = [group for group in groups if not is_sound(_path(context, group, "points"))]
    known = len(groups) - len(missing)
    context.progress(known, len(groups), label)
    numbers = (context.numbers(group) for group in missing)
    found = context.workers.map(points_of, context.conditions, numbers)
    for number, (group, points) in enumerate(zip(missing, found, strict=True), known + 1):
        write_value(_path(context, group, "points"), points)
        context.progress(number, len(groups), label)
    return tuple(_points_of(context, group) for group in groups)


def measure_chosen(
    context: PlanningContext, rate_points: Sequence[RatePoints], plan: Plan
) -> tuple[RatePoints, ...] | None:
    """Measure the schemes that a plan chose and that were only predicted; None if there are none."""
    predicted = {key for one in rate_points for key in one.predicted}
    chosen = [entry for entry in plan.chosen if (entry.names, entry.candidate.scheme) in predicted]
    if not chosen:
        return None
    label = "Measure what was chosen"
    groups = {name: group for group in context.groups for name in group.names}
    of = [groups[entry.names[0]] for entry in chosen]
    found = [_known(context, group, entry) for group, entry in zip(of, chosen, strict=True)]
    missing = [number for number, errors in enumerate(found) if errors is None]
    known = len(chosen) - len(missing)
    context.progress(known, len(chosen), label)
    asked = (
        (chosen[number].candidate.scheme, context.numbers(of[number], chosen[number].names))
        for number in missing
    )
    measured = context.workers.map(errors_of, context.conditions, asked)
    for done, (number, errors) in enumerate(zip(missing, measured, strict=True), known + 1):
        _keep(context, of[number], chosen[number], errors)
        found[number] = errors
        context.progress(done, len(chosen), label)
    corrected = {one.names: one for one in rate_points}
    for group, entry, lost in zip(of, chosen, found, strict=True):
        assert lost is not None
        corrected[group.names] = corrected[group.names].corrected(entry.names, entry.candidate.scheme, lost)
    return tuple(corrected.values())


def _known(context: PlanningContext, group: InputGroup, entry: Chosen) -> Mapping[str, float] | None:
    """What the scheme of an entry loses of each matrix; None where that was not measured yet."""
    for names, data, errors in _kept(context, group):
        if names == list(entry.names) and scheme_from_data(data) == entry.candidate.scheme:
            return errors
    return None


def _keep(context: PlanningContext, group: InputGroup, entry: Chosen, errors: Mapping[str, float]) -> None:
    """What was measured once is kept for other plans."""
    measured = (entry.names, scheme_to_data(entry.candidate.scheme), dict(errors))
    write_value(_path(context, group, "errors"), [*_kept(context, group), measured])


def _kept(context: PlanningContext, group: InputGroup) -> list[tuple[list[str], Any, dict[str, float]]]:
    path = _path(context, group, "errors")
    return read_value(path) if is_sound(path) else []


def counted(rate_points: Sequence[RatePoints]) -> tuple[int, int]:
    """How many schemes of all matrices were measured, and how many were listed."""
    known = sum(sum(map(len, one.per_matrix)) + len(one.shared) for one in rate_points)
    predicted = sum(len(one.predicted) for one in rate_points)
    return known - predicted, known + sum(one.unmeasured for one in rate_points)


def notes_on(rate_points: Sequence[RatePoints]) -> tuple[str, ...]:
    """That not every scheme was measured, where it is so: a fact that a report must state."""
    measured, listed = counted(rate_points)
    if measured == listed:
        return ()
    if any(one.predicted for one in rate_points):
        return (
            f"errors of grids were measured on some outputs of each linear, those of {listed - measured} of {listed} "
            "schemes predicted from the spectrum; what was chosen is measured. --search full measures all",
        )
    return (
        f"{measured} of {listed} schemes of the linears were measured, from coarse to fine; the others were pruned, "
        "for their predicted gain was too small. --search full measures all",
    )


def _points_of(context: PlanningContext, group: InputGroup) -> RatePoints:
    stored = read_value(_path(context, group, "points"))
    per_matrix = {
        name: [(scheme_from_data(scheme), error) for scheme, error in entries]
        for name, entries in stored["per_matrix"].items()
    }
    shared = [(scheme_from_data(scheme), errors) for scheme, errors in stored["shared"]]
    predicted = []
    for names, data, errors in stored.get("predicted", ()):
        scheme = scheme_from_data(data)
        predicted.append((tuple(names), scheme))
        if len(names) == len(group.names) > 1:
            shared.append((scheme, errors))
        else:
            per_matrix[names[0]].append((scheme, errors[names[0]]))
    return price_candidates(
        group.names,
        {name: _forced(context.search, entries) for name, entries in per_matrix.items()},
        shared,
        context.sizes(group.names),
        context.storage,
        stored.get("unmeasured", 0),
        predicted,
    )


def _path(context: PlanningContext, group: InputGroup, kind: str) -> Path:
    number = context.blocks.index(group.block)
    return context.work / f"{kind}-{number:04d}-{group.name}-{_content(context, group)}.json"


Energies: TypeAlias = Mapping[tuple[str, ...], Sequence[float]]
"""Spectra of matrices, and of all matrices of an input side by side; see `energies_of`."""


def smallest_of(conditions: Conditions, numbers: InputNumbers) -> int:
    """Bytes of the smallest schemes for the matrices of an input."""
    weights, whitening = numbers.weights, whiten(numbers.gram)
    per_matrix, shared = _listed(conditions, weights, whitening, _energies(conditions, weights, whitening))
    return min([sum(min(prices.values()) for prices in per_matrix.values()), *shared.values()])


def points_of(conditions: Conditions, numbers: InputNumbers) -> dict[str, Any]:
    """Errors of the schemes for the matrices of an input, as a file has them."""
    measure = _predict if conditions.search.predicted else _measure
    return measure(conditions, numbers.weights, whiten(numbers.gram))


def errors_of(conditions: Conditions, asked: tuple[Scheme, InputNumbers]) -> dict[str, float]:
    """Squared relative error of each matrix that a scheme covers."""
    scheme, numbers = asked
    return dict(_errors_of(conditions, scheme, numbers.weights, whiten(numbers.gram)))


def _energies(conditions: Conditions, weights: Mapping[str, Tensor], whitening: Whitening) -> Energies:
    if not conditions.search.rates or not conditions.search.grids.groups:
        return {}
    found: dict[tuple[str, ...], list[float]] = {
        (name,): energies_of(weight, whitening) for name, weight in weights.items()
    }
    if len(weights) > 1:
        found[tuple(weights)] = energies_of(torch.cat(list(weights.values()), dim=1), whitening)
    return found


def _listed(
    conditions: Conditions,
    weights: Mapping[str, Tensor],
    whitening: Whitening,
    energies: Energies,
) -> tuple[dict[str, dict[Scheme, int]], dict[Scheme, int]]:
    """Schemes and their bytes: of each matrix of an input, and of all of them with one dictionary."""
    search, storage = conditions.search, conditions.storage

    def listed(names: Sequence[str]) -> dict[Scheme, int]:
        weight = torch.cat([weights[name] for name in names], dim=1)
        inputs, columns = weight.shape
        tried = schemes(weight, whitening, storage, search, energies.get(tuple(names)))
        return {scheme: scheme.bytes(inputs, columns, storage) for scheme in tried}

    def taken(prices: Mapping[Scheme, int], plain: int) -> dict[Scheme, int]:
        return {scheme: size for scheme, size in prices.items() if search.takes(scheme, size, plain)}

    plain = {
        name: search.plain.bytes(weight.shape[0], weight.shape[1], storage)
        for name, weight in weights.items()
    }
    shared: dict[Scheme, int] = {}
    if len(weights) > 1:
        everything = listed(tuple(weights))
        shared = taken(
            {scheme: size for scheme, size in everything.items() if isinstance(scheme, Joint)},
            sum(plain.values()),
        )
    everything_per_matrix = {name: listed((name,)) for name in weights}
    per_matrix = {name: taken(prices, plain[name]) for name, prices in everything_per_matrix.items()}
    if not all(per_matrix.values()):  # a matrix that does not get smaller by being factorized
        for name, prices in everything_per_matrix.items():
            grids = {scheme: size for scheme, size in prices.items() if isinstance(scheme, Plain)}
            per_matrix[name] = grids | per_matrix[name]
    return per_matrix, shared


def _forced(search: Search, entries: list[tuple[Scheme, float]]) -> list[tuple[Scheme, float]]:
    """Without plain schemes where the method factorizes and the matrix gets smaller by it."""
    factorized = [entry for entry in entries if isinstance(entry[0], Joint)]
    return factorized if factorized and search.method in ("compot", "svd-llm") else entries


def _errors_of(
    conditions: Conditions, scheme: Scheme, weights: Mapping[str, Tensor], whitening: Whitening
) -> Mapping[str, float]:
    """Make a scheme, and say what it loses of each matrix."""
    quantizer = QUANTIZERS[conditions.quantizer]
    return realize(scheme, weights, whitening, conditions.search, quantizer=quantizer).errors


def _measure(conditions: Conditions, weights: Mapping[str, Tensor], whitening: Whitening) -> dict[str, Any]:
    outputs = sum(weight.shape[1] for weight in weights.values())

    def errors(scheme: Scheme, names: Sequence[str]) -> Mapping[str, float]:
        # An output of a plain grid is quantized for itself: matrices of one input are done side by side, in one pass.
        return _errors_of(conditions, scheme, {name: weights[name] for name in names}, whitening)

    def nearest(name: str, grid: Grid) -> float:
        some = weights[name][:, :: -(-weights[name].shape[1] // _ROUNDED_OUTPUTS)]
        return whitening.error(some, rtn(some, None, grid).dequantize()) ** 2

    per_matrix, shared = _listed(conditions, weights, whitening, _energies(conditions, weights, whitening))
    measured = prune(
        per_matrix,
        shared,
        {name: weight.shape[1] / outputs for name, weight in weights.items()},
        tolerance=conditions.search.tolerance,
        measure=errors,
        nearest=nearest,
    )
    known = sum(map(len, measured.per_matrix.values())) + len(measured.shared)
    return {
        "per_matrix": {
            name: [(scheme_to_data(scheme), error) for scheme, error in found.items()]
            for name, found in measured.per_matrix.items()
        },
        "shared": [(scheme_to_data(scheme), found) for scheme, found in measured.shared.items()],
        "unmeasured": sum(map(len, per_matrix.values())) + len(shared) - known,
    }


def _predict(conditions: Conditions, weights: Mapping[str, Tensor], whitening: Whitening) -> dict[str, Any]:
    """As `_measure`, with the errors of grids from a sample of outputs, and those of other schemes predicted."""
    energies = _energies(conditions, weights, whitening)
    per_matrix, shared = _listed(conditions, weights, whitening, energies)
    plain = dict.fromkeys(
        scheme for prices in per_matrix.values() for scheme in prices if isinstance(scheme, Plain)
    )
    errors = sampled_errors(list(plain), weights, whitening, conditions.quantizer)
    predicted: list[tuple[list[str], Any, dict[str, float]]] = []
    for name, prices in per_matrix.items():
        for scheme, error in spectral_errors(prices, energies.get((name,), ())).items():
            predicted.append(([name], scheme_to_data(scheme), {name: error}))
    if shared:
        for scheme, error in spectral_errors(shared, energies.get(tuple(weights), ())).items():
            predicted.append((list(weights), scheme_to_data(scheme), dict.fromkeys(weights, error)))
    return {
        "per_matrix": {
            name: [(scheme_to_data(scheme), errors[name][scheme]) for scheme in plain if scheme in prices]
            for name, prices in per_matrix.items()
        },
        "shared": [],
        "predicted": predicted,
    }


def _content(context: PlanningContext, group: InputGroup) -> str:
    """A name for measurements on exactly these numbers: this model's weights, this Gram, these settings."""
    tolerance = (context.search.tolerance,) if context.search.tolerance else ()
    method = () if context.search.method == "auto" else (context.search.method, context.search.plain)
    settings = (VERSION, context.search, context.storage, context.quantizer, *tolerance, *method)
    numbers = (context.source.fingerprint, group.names, context.gram_digest(group.block))
    return hashlib.sha256(repr((settings, numbers)).encode()).hexdigest()[:16]
