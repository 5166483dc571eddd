"""From a recipe to matrices: calibration text → Grams → plan → matrices, kept in the work folder as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.store import StoredMatrices, Without, save_matrices
from compot_deploy.core.work_files import is_sound
from compot_deploy.errors import RecipeError
from compot_deploy.models.answers import Answers
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.models.refusals import note_on
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.pipeline.healing import check_healing, listens, treat
from compot_deploy.pipeline.size import fit_size, other_bytes
from compot_deploy.pipeline.tables import make_tables
from compot_deploy.pipeline.texts import calibration_windows
from compot_deploy.planning.by_rule import plan_by_rule
from compot_deploy.planning.carry_out import Extras, Outcome, carry_out, choose
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.draft import Draft
from compot_deploy.planning.knapsack import Plan, plain_plan, smallest_bytes
from compot_deploy.planning.measure import check_budget, measure_chosen, measure_rate_points, notes_on
from compot_deploy.planning.rate_points import RatePoints
from compot_deploy.planning.records import LinearRecord
from compot_deploy.planning.schemes import Joint
from compot_deploy.planning.sensitivity import measure_sensitivities
from compot_deploy.planning.settings import Settings, resolve
from compot_deploy.planning.tables import (
    measure_tables,
    notes_on_tables,
    smallest_tables,
    table_weights,
    with_tables,
)
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import default_of, one_scheme_options, override
from compot_deploy.report.facts import Frontier
from compot_deploy.report.plan import frontier_of

SPLIT_WEIGHTS: Final = 2**30
"""Linears of more weights are evaluated without the factors before quantization: these are one more model in memory,
4 bytes a weight."""


@dataclass(frozen=True)
class Compression:
    """A model in its final form, with everything a report wants to know about the way there.

    Attributes:
        model: ready for an exporter; its matrices live in the work folder.
        plan: what every matrix became.
        linears: what happened to each matrix, in running order.
        calibration: the windows that were used.
        notes: facts about the run that a report must state.
        unhealed: the model before it was healed; None where nothing was.
        unquantized: the factorized matrices before quantization, multiplied out; None if not kept.
        unquantized_absent: why they were not kept.
        frontier: loss predicted against bytes, where a knapsack planned.
        sensitivities: what a unit of squared error of each matrix costs, where a knapsack planned.
        beside: the same model compressed otherwise, by what that is called.
        importance: matrix to the diagonal of its Gram relative to its mean, shape (in,); for formats that round.
    """

    model: CompressedModel
    plan: Plan
    linears: tuple[LinearRecord, ...]
    calibration: TokenWindows
    notes: tuple[str, ...]
    unhealed: CompressedModel | None = None
    unquantized: Mapping[str, Matrix] | None = None
    unquantized_absent: str = ""
    frontier: Frontier | None = None
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Matrix]] = field(default_factory=dict)
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)


def compress(
    settings: Settings, work: Path, progress: Progress = silent, workers: Workers = ALONE
) -> Compression:
    """Calibrate, plan and make every matrix; what is finished in `work` is taken as it is."""
    draft: Draft | None = None
    if settings.recipe.planned:
        context = _context(settings, work, progress, workers)
        draft = draft_of(settings, context)
        outcome = carry_out(context, draft.plans)
    else:
        # Refuses what cannot be met before text is asked for.
        plan = plan_by_rule(settings, progress, workers)
        context = _context(settings, work, progress, workers)
        outcome = carry_out(context, [plan], _extras(settings, plan))
    tables = make_tables(settings, context, outcome.plan, () if draft is None else draft.tables)
    files = {**tables.files, **_outside(settings, work)}
    made = {**outcome.files, **files}
    treated = treat(settings, _model(settings, made), made, context.windows, work, progress)
    beside: dict[str, Mapping[str, Matrix]] = {}
    if settings.baseline is not None and outcome.baseline:
        name = f"gptq {settings.baseline.dictionary_grid}"
        beside[name] = StoredMatrices({**outcome.baseline, **files})
    compared, complaints = _compared(settings, outcome.plan, work, progress, workers)
    beside |= {name: StoredMatrices({**others, **files}) for name, others in compared.items()}
    plan_notes = _notes_of_plan(settings, outcome.plan) if draft is not None else ()
    return Compression(
        model=treated.model,
        unhealed=treated.before,
        plan=outcome.plan,
        linears=(*outcome.linears, *tables.records),
        calibration=context.windows,
        notes=(
            *settings.source.notes,
            *note_on(settings.source.meta, settings.source.layout),
            *plan_notes,
            *(notes_on(draft.rate_points) if draft is not None else ()),
            *notes_on_tables(
                outcome.plan, {one.name: one.error for one in tables.records}, settings.table_grids
            ),
            *outcome.notes,
            *treated.notes,
            *_notes(context.windows, outcome.linears),
            *notes_on_experts(context.unreached()),
            *complaints,
        ),
        unquantized=StoredMatrices(outcome.factors) if outcome.factors else None,
        unquantized_absent=_why_not_split(settings, outcome),
        frontier=None if draft is None else frontier_of(draft, outcome.plan, settings.recipe.budget),
        sensitivities={} if draft is None else draft.sensitivities,
        beside=beside,
        importance=context.importances(),
    )


def _context(settings: Settings, work: Path, progress: Progress, workers: Workers) -> PlanningContext:
    """What planning needs to know; text that does not suffice for healing is refused."""
    context = context_of(settings, work, progress, workers)
    check_healing(settings, context.windows)
    return context


def _compared(
    settings: Settings, plan: Plan, work: Path, progress: Progress, workers: Workers
) -> tuple[dict[str, Mapping[str, Path]], tuple[str, ...]]:
    """Other methods at the bytes of a plan: their matrices, and why some have none."""
    made: dict[str, Mapping[str, Path]] = {}
    complaints = []
    for method in settings.recipe.compare:
        try:
            other = _other(settings, method, plan)
            context = context_of(other, work, progress, workers)
            outcome = carry_out(context, draft_of(other, context).plans[:1])
        except RecipeError as error:
            complaints.append(f"{method} is not compared: {str(error).rstrip('.')}")
            continue
        made[method] = outcome.files
    return made, tuple(complaints)


def _other(settings: Settings, method: str, plan: Plan) -> Settings:
    """The same recipe by another method, its schemes planned within the bytes of a plan."""
    plain = {option.name: default_of(option) for option in one_scheme_options()}
    recipe = override(
        settings.recipe,
        method=method,
        bits=8 * (plan.bytes + 1) / settings.weights,
        size=None,
        allocation="auto",
        quantizer="gptq",
        compare=(),
        heal="off",
        **plain,
    )
    return resolve(recipe, settings.source)


def context_of(
    settings: Settings, work: Path, progress: Progress = silent, workers: Workers = ALONE
) -> PlanningContext:
    """What planning needs to know."""
    recipe, source = settings.recipe, settings.source
    windows = calibration_windows(recipe, source, work, progress)
    return PlanningContext(
        source=source,
        windows=windows,
        work=work,
        storage=settings.storage,
        search=settings.search,
        quantizer=recipe.quantizer,
        device=settings.device,
        dtype=recipe.dtype,
        sequential=recipe.sequential,
        progress=progress,
        workers=workers,
        answers=Answers(work) if listens(settings, windows) else None,
    )


_CORRECTIONS: Final = 6
"""Times that a plan is made again with measured errors in the place of predicted ones."""


def draft_of(settings: Settings, context: PlanningContext) -> Draft:
    """Measure candidates and sensitivities, and plan."""
    recipe = settings.recipe
    rest = _Rest(settings)
    sizes = context.sizes(context.names)
    size = recipe.size_bytes
    budget = settings.budget(0) if size is None else _first_guess(settings, sizes, rest)
    collect_grams(context)
    if size is None:
        check_budget(context, budget)
    rate_points: tuple[RatePoints, ...] = measure_rate_points(context)
    sensitivities = measure_sensitivities(context)
    tables = measure_tables(context, settings.table_grids)

    single = not context.search.predicted

    def plans_at(limit: int) -> tuple[Plan, ...]:
        return choose(rate_points, sensitivities, limit, tables, single=single)

    def plans_within() -> tuple[Plan, ...]:
        if size is None:
            return with_tables(choose(rate_points, sensitivities, budget, single=single), tables)
        smallest = smallest_bytes([*rate_points, *(one.points for one in tables)])
        return fit_size(size, budget, smallest, plans_at, lambda plan: plan.bytes + rest.of(plan))

    plans = plans_within()
    turns = 0
    while corrected := measure_chosen(context, rate_points, plans[0]):
        turns += 1
        # In the end only what is measured has a say.
        rate_points = corrected if turns < _CORRECTIONS else tuple(one.measured() for one in corrected)
        plans = plans_within()
    sensitivities = {**sensitivities, **table_weights(tables)}
    return Draft(context, rate_points, sensitivities, plans, sizes, rest.of(plans[0]), tables)


def _first_guess(settings: Settings, sizes: Mapping[str, tuple[int, int]], rest: _Rest) -> int:
    """What a size leaves for the linears, and for the tables that compete with them, before anything is measured."""
    plain = plain_plan(sizes, settings.recipe.dictionary_grid, settings.storage)
    smallest = smallest_tables(settings.source, settings.table_grids, settings.storage)
    plain = replace(plain, tables=smallest)
    return settings.budget(rest.of(plain) - plain.table_bytes)


class _Rest:
    """Bytes of a model's files that are no matrices of blocks, by plan."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[Plan, int] = {}

    def of(self, plan: Plan) -> int:
        """Of the files of a plan."""
        if plan not in self._known:
            self._known[plan] = other_bytes(self._settings, plan)
        return self._known[plan]


def _extras(settings: Settings, plan: Plan) -> Extras:
    """Factors before quantization, where they fit into memory; a baseline, for a quantizer that has one."""
    recipe = settings.baseline
    beside = None
    if recipe is not None:
        beside = with_grids_of(plan, resolve(recipe, settings.source))
    return Extras(factors=settings.weights <= SPLIT_WEIGHTS, baseline=beside, baseline_quantizer="gptq")


def with_grids_of(plan: Plan, settings: Settings) -> Plan:
    """The same plan on the grids of other settings."""
    from compot_deploy.planning.rate_points import Candidate
    from compot_deploy.planning.schemes import Scheme, Separate

    def changed(scheme: Scheme) -> Scheme:
        if isinstance(scheme, Separate):
            recipe = settings.recipe
            return replace(scheme, dictionary=recipe.dictionary_grid, codes=recipe.code_grid)
        return settings.plain

    return replace(
        plan,
        chosen=tuple(
            replace(entry, candidate=Candidate(changed(entry.candidate.scheme), entry.candidate.bytes, ()))
            for entry in plan.chosen
        ),
    )


def _model(settings: Settings, files: Mapping[str, Path]) -> CompressedModel:
    """Matrices from their files, everything else as it was."""
    source = settings.source
    layout = source.layout
    stored = {name: f"{name}.weight" for name in (layout.embedding, layout.head) if name is not None}
    sites = {site.parameter for site in layout.sites}
    written = {*sites, *stored.values(), *(f"{name}.weight" for name in source.outside)}
    return CompressedModel(
        architecture=source.architecture,
        config=source.config,
        matrices=StoredMatrices(files),
        tensors=Without(source.tensors, written),
        tied=layout.tied,
        source=str(source.folder),
        tables=Tables(layout.embedding, layout.head),
        outside=frozenset(source.outside),
    )


def _outside(settings: Settings, work: Path) -> dict[str, Path]:
    """Linears outside of the blocks, as they are: poolers, classifiers."""
    source, path = settings.source, work / "outside.safetensors"
    names = source.outside
    if names and not is_sound(path):
        save_matrices(path, {name: Dense(source.weight(name).float().contiguous()) for name in names})
    return dict.fromkeys(names, path)


def _notes_of_plan(settings: Settings, plan: Plan) -> tuple[str, ...]:
    bits = plan.bytes * 8 / settings.weights
    return (
        f"the plan spends {plan.bytes} of {plan.budget} bytes ({settings.recipe.budget}) on the linears, {bits:.3f} "
        "bits per weight",
    )


def _why_not_split(settings: Settings, outcome: Outcome) -> str:
    """Why the method loss is not split into factorization and quantization; empty where it is."""
    if outcome.factors:
        return ""
    if any(isinstance(entry.candidate.scheme, Joint) for entry in outcome.plan.chosen):
        return "the plan's factors were made on their grids and never existed without"
    if settings.weights > SPLIT_WEIGHTS and not settings.recipe.planned:
        return f"a model of more than {SPLIT_WEIGHTS:,} weights would be in memory once more for it"
    return "the plan factorizes no linear"


def notes_on_experts(unreached: Sequence[str]) -> tuple[str, ...]:
    """What a report must say about inputs of experts that no token was routed to."""
    if not unreached:
        return ()
    return (
        f"no token of the calibration text reached {len(unreached)} inputs of experts (first: {unreached[0]}): they "
        "were compressed for what the other experts of their block read; more calibration text would help",
    )


def _notes(windows: TokenWindows, linears: Sequence[LinearRecord]) -> tuple[str, ...]:
    notes = list(windows.notes)
    unused = [linear.name for linear in linears if linear.unused]
    if unused:
        notes.append(
            f"{len(unused)} linears read an input that was zero on all calibration text (first: {unused[0]}): a part "
            "that is switched off costs nothing, however it is rounded"
        )
    escalated = [linear.name for linear in linears if linear.ridge_escalated]
    if escalated:
        largest = max(linear.ridge for linear in linears)
        notes.append(
            f"{len(escalated)} linears had singular Grams; their ridge was raised, up to {largest:g} of the mean "
            f"diagonal (first: {escalated[0]}); more calibration text would help"
        )
    return tuple(notes)
