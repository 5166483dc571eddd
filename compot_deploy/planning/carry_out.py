"""From plans to matrices: choose, make what was chosen, compare on the model, keep the best.

Every rule that spends a budget gives a `Plan`, and every plan is made here, block by block, a file for each, so that a
run that was stopped goes on where it was. Sums of sensitivities are only a model of what a plan costs, so where a
knapsack planned, the plan and the best mix of plain grids of the same budget are both made and measured, and the better
one is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from torch import Tensor

from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.core.store import StoredMatrices, load_matrices, save_matrices
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.models.side_by_side import Disturbed
from compot_deploy.models.sites import WHOLE, Gram, InputGroup
from compot_deploy.numerics.mending import damping_of, mended
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.knapsack import Chosen, Plan, knapsack, smallest_bytes
from compot_deploy.planning.making import MadeInput, Order, Wanted, make_input
from compot_deploy.planning.rate_points import RatePoints
from compot_deploy.planning.records import LinearRecord, linear_record
from compot_deploy.planning.schemes import Plain, Scheme, Separate, scheme_to_data
from compot_deploy.planning.sensitivity import ReplacedLoss
from compot_deploy.planning.tables import TablePoints, split_tables, table_weights

_FINAL: Final = 2
"""Times as much text for the last choice among finished plans: they are few, and come close to each other."""

_LARGEST_HALF: Final = 6e4


@dataclass(frozen=True)
class Extras:
    """What else is kept of separately quantized factors.

    Attributes:
        factors: the product of the factors before they were quantized, which splits the method loss.
        baseline: grids of the same plan through another quantizer, to be compared with; None for none.
        baseline_quantizer: that quantizer.
    """

    factors: bool = False
    baseline: Plan | None = None
    baseline_quantizer: str = "gptq"


@dataclass(frozen=True)
class Outcome:
    """A plan that was carried out.

    Attributes:
        plan: scheme, bytes and error of every matrix.
        files: file of each matrix, in running order.
        linears: one per matrix, in running order.
        notes: facts that a report must state.
        factors: files of factors before quantization, of the matrices that have them.
        baseline: files of the matrices through another quantizer; empty without.
    """

    plan: Plan
    files: Mapping[str, Path]
    linears: tuple[LinearRecord, ...]
    notes: tuple[str, ...]
    factors: Mapping[str, Path] = field(default_factory=dict)
    baseline: Mapping[str, Path] = field(default_factory=dict)


def choose(
    rate_points: Sequence[RatePoints],
    weights: Mapping[str, float],
    budget: int,
    tables: Sequence[TablePoints] = (),
    *,
    single: bool = True,
) -> tuple[Plan, ...]:
    """The plan, then what it must not be worse than: the best mix of plain grids and the best single grid.

    All within the same budget; those that are possible and differ.

    Args:
        rate_points: of the linears.
        weights: what one unit of relative squared error of a matrix costs the model.
        budget: of the linears, and of `tables`.
        tables: that the budget is for as well; what the plan is compared with has the plan's.
        single: also compare with one grid for all; the mix is better by all that is known, and to make another model
            of all linears takes as long as the plan itself.
    """

    def possible(some: Sequence[RatePoints]) -> bool:
        return all(all(one.per_matrix) for one in some) and smallest_bytes(some) <= budget

    every = (*rate_points, *(one.points for one in tables))
    plan = split_tables(knapsack(every, budget, {**weights, **table_weights(tables)}), tables)
    budget = plan.budget
    plain = [one.only(lambda scheme: isinstance(scheme, Plain)) for one in rate_points]
    contenders = [plain] if possible(plain) else []
    singles = [
        [one.only(lambda scheme, only=scheme: scheme == only) for one in plain]  # type: ignore[misc]
        for scheme in dict.fromkeys(entry.scheme for entry in plain[0].per_matrix[0])
        if single
    ]
    made = [knapsack(some, budget, weights) for some in singles if possible(some)]
    plans = [plan, *(knapsack(some, budget, weights) for some in contenders)]
    plans += [min(made, key=lambda one: one.loss)] if made else []
    plans = [replace(one, tables=plan.tables, table_loss=plan.table_loss) for one in plans]
    different = {schemes_of(one): one for one in reversed(plans)}
    return tuple(one for one in plans if different[schemes_of(one)] is one)


def schemes_of(plan: Plan) -> tuple[tuple[tuple[str, ...], Scheme], ...]:
    """What a plan makes of what; two plans of equal schemes make equal matrices."""
    return tuple((entry.names, entry.candidate.scheme) for entry in plan.chosen)


def name_of(plan: Plan) -> str:
    """What a plan of plain schemes is called beside the chosen one."""
    schemes = {entry.candidate.scheme for entry in plan.chosen}
    return f"{schemes.pop()} for all linears" if len(schemes) == 1 else "the best mix of plain grids"


def carry_out(context: PlanningContext, plans: Sequence[Plan], extras: Extras = Extras()) -> Outcome:
    """Make the matrices of the plans and keep the one that costs the model least.

    Args:
        context: model, text and work folder; blocks that are made already are taken as they are.
        plans: at least one; the first is the plan, the others are what it is compared with.
        extras: what else is kept, of a single plan.
    """
    made = _make(context, plans, extras)
    give_back_freed_memory()
    notes = list(plans[0].notes)
    best = 0
    if len(plans) > 1:
        loss = ReplacedLoss(context, _FINAL)
        losses = [loss(StoredMatrices(outcome.files)) for outcome in made]
        best = min(range(len(plans)), key=losses.__getitem__)
        notes.append(verdict(context, plans, losses))
    outcome = made[best]
    return Outcome(
        outcome.plan, outcome.files, outcome.linears, tuple(notes), outcome.factors, outcome.baseline
    )


def verdict(context: PlanningContext, plans: Sequence[Plan], losses: Sequence[float]) -> str:
    """What the final check found, as a note for the report."""
    best = min(range(len(plans)), key=losses.__getitem__)
    others = " and ".join(
        f"{name_of(plan)} within the same bytes {loss:.4g}"
        for plan, loss in zip(plans[1:], losses[1:], strict=True)
    )
    winner = "the plan" if best == 0 else f"{name_of(plans[best])}, which is taken"
    unit = context.source.task.unit
    return f"on calibration text the plan costs {losses[0]:.4g} {unit}, {others}: better is {winner}"


def _make(context: PlanningContext, plans: Sequence[Plan], extras: Extras) -> list[Outcome]:
    """The matrices of some plans, a file per block; files that are there already are taken as they are.

    Where the Grams are those of the original, all plans of a block are made together: what is equal in two of them is
    made once. Workers beside this process need those Grams, so that they do not wait for each other block by block.
    """
    label = "Make matrices"
    blocks = [_Blocks(context, plan, extras, _digest(plan, context, extras)) for plan in plans]
    missing = [n for n, block in enumerate(context.blocks) if not all(one.finished(block) for one in blocks)]
    if missing and not context.sequential and not context.workers.alone:
        collect_grams(context)
    from_store = not context.sequential and all(context.has_grams(context.blocks[n]) for n in missing)
    if missing and from_store:
        _make_from_store(context, blocks, missing, label)
    elif missing:
        for one in blocks:
            _make_in_a_stream(context, one, label)
    context.progress(len(context.blocks), len(context.blocks), label)
    return [one.outcome() for one in blocks]


def _make_from_store(
    context: PlanningContext, plans: Sequence[_Blocks], missing: Sequence[int], label: str
) -> None:
    blocks = {number: context.blocks[number] for number in missing}
    unfinished = {block: [one for one in plans if not one.finished(block)] for block in blocks.values()}

    def orders() -> Iterator[Order]:
        for block in blocks.values():
            grams = context.grams(block)
            for group in context.source.layout.of(block):
                wanted = (want for one in unfinished[block] for want in one.wanted(group))
                yield _order(context, grams[group.name], wanted)

    results = context.workers.map(make_input, context.search, orders())
    for number, block in blocks.items():
        context.progress(number, len(context.blocks), label)
        made = {group.name: next(results) for group in context.source.layout.of(block)}
        grams = context.grams(block)
        for one in unfinished[block]:
            one.keep(block, grams, made)


def _order(context: PlanningContext, gram: Tensor, wanted: Iterable[Wanted]) -> Order:
    once = tuple(dict.fromkeys(wanted))
    names = dict.fromkeys(name for want in once for name in want.names)
    return Order(context.numbers_with(gram, list(names)), once)


def _make_in_a_stream(context: PlanningContext, blocks: _Blocks, label: str) -> None:
    missing = [number for number, block in enumerate(context.blocks) if not blocks.finished(block)]
    if not missing:
        return
    if context.sequential and context.source.layout.blocks != (WHOLE,):
        _make_side_by_side(context, blocks, missing[-1] + 1, label)
        return
    with context.stream() as stream:
        for number in range(missing[0], missing[-1] + 1):
            context.progress(number, len(context.blocks), label)
            stream.skip_to(number)
            block = context.blocks[number]
            if number in missing:
                blocks.make_of(block, stream.advance())
            else:
                stream.advance(capture=False)


def _make_side_by_side(context: PlanningContext, blocks: _Blocks, count: int, label: str) -> None:
    """Each input for what the matrices before it give, and for the outputs that the original gave."""
    with context.side_by_side() as both:
        for number, block in enumerate(context.blocks[:count]):
            context.progress(number, len(context.blocks), label)
            if blocks.finished(block):
                both.pass_over(
                    {name: matrix.dequantize() for name, matrix in load_matrices(blocks.path(block)).items()}
                )
                continue
            grams: dict[str, Gram] = {}
            made: dict[str, MadeInput] = {}

            def make(
                group: InputGroup,
                felt: Disturbed,
                grams: dict[str, Gram] = grams,
                made: dict[str, MadeInput] = made,
            ) -> Mapping[str, Tensor]:
                order = _order(context, felt.gram.matrix, blocks.wanted(group))
                gram = felt.gram.matrix
                damping = damping_of(len(gram), felt.gram.tokens)
                weights = mended(order.numbers.weights, gram, felt.cross, felt.lacking, damping)
                order = replace(order, numbers=replace(order.numbers, weights=weights))
                (made[group.name],) = context.workers.map(make_input, context.search, [order])
                grams[group.name] = felt.gram
                own = blocks.matrices(group, made[group.name])
                return {name: matrix.dequantize() for name, matrix in own.items()}

            both.advance(make)
            context.keep_unreached(block, grams)
            blocks.keep(block, {name: gram.matrix for name, gram in grams.items()}, made)


def _digest(plan: Plan, context: PlanningContext, extras: Extras) -> str:
    """Names what is made: schemes, how, and what is told of it."""
    named = json.dumps(
        [
            (entry.names, scheme_to_data(entry.candidate.scheme), entry.reason, bool(entry.candidate.errors))
            for entry in plan.chosen
        ]
    )
    named += repr((context.quantizer, context.search.rounds, context.search.alternation))
    named += "side by side" * context.sequential + "factors" * extras.factors
    named += "" if extras.baseline is None else f"beside {extras.baseline_quantizer}"
    return hashlib.sha256(named.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Blocks:
    """The files of a plan, block by block."""

    context: PlanningContext
    plan: Plan
    extras: Extras
    digest: str

    def path(self, block: str) -> Path:
        """Matrices of a block."""
        return self.context.block_file(f"planned-{self.digest}", block)

    def finished(self, block: str) -> bool:
        """Whether everything of a block is there, as it was written."""
        path = self.path(block)
        files = [path, path.with_suffix(".json")]
        files += [self._beside(block, "factors")] if self.extras.factors else []
        files += [self._beside(block, "baseline")] if self._has_baseline else []
        return all(map(is_sound, files)) and self.context.has_importance(block)

    @property
    def _has_baseline(self) -> bool:
        return self.extras.baseline is not None and bool(self.extras.baseline.chosen)

    def names(self, block: str) -> tuple[str, ...]:
        """Matrices of a block, in running order."""
        return tuple(name for group in self.context.source.layout.of(block) for name in group.names)

    def make_of(self, block: str, grams: Mapping[str, Gram]) -> None:
        """All matrices of a block, and a note of experts that no token reached."""
        self.context.keep_unreached(block, grams)
        self.make(block, {name: gram.matrix for name, gram in grams.items()})

    def make(self, block: str, grams: Mapping[str, Tensor]) -> None:
        """All matrices of a block from the Grams of its inputs."""
        groups = self.context.source.layout.of(block)
        orders = (_order(self.context, grams[group.name], self.wanted(group)) for group in groups)
        made = self.context.workers.map(make_input, self.context.search, orders)
        self.keep(block, grams, {group.name: one for group, one in zip(groups, made, strict=True)})

    def wanted(self, group: InputGroup) -> Iterator[Wanted]:
        """What is to be made of an input."""
        for first in group.names:
            if first in self._entries:
                yield _wanted(self._entries[first], self.context.quantizer)
            if first in self._entries and first in self._entries_beside:
                yield _wanted(self._entries_beside[first], self.extras.baseline_quantizer)

    @cached_property
    def _entries(self) -> Mapping[str, Chosen]:
        return {entry.names[0]: entry for entry in self.plan.chosen}

    @cached_property
    def _entries_beside(self) -> Mapping[str, Chosen]:
        beside = self.extras.baseline
        return {} if beside is None else {entry.names[0]: entry for entry in beside.chosen}

    def matrices(self, group: InputGroup, made: MadeInput) -> dict[str, Matrix]:
        """The plan's own of what was made of an input."""
        return {
            name: matrix
            for first in group.names
            if first in self._entries
            for name, matrix in made.realized[
                _wanted(self._entries[first], self.context.quantizer)
            ].matrices.items()
        }

    def keep(self, block: str, grams: Mapping[str, Tensor], made: Mapping[str, MadeInput]) -> None:
        """Write the files of a block from what was made of its inputs."""
        matrices: dict[str, Matrix] = {}
        factors: dict[str, Dense] = {}
        baseline: dict[str, Matrix] = {}
        linears: list[LinearRecord] = []
        for group in self.context.source.layout.of(block):
            one = made[group.name]
            for first in group.names:
                if first not in self._entries:
                    continue
                entry = self._entries[first]
                own = one.realized[_wanted(entry, self.context.quantizer)]
                matrices |= own.matrices
                factors |= {name: _halved(matrix) for name, matrix in own.factors.items()}
                linears += [linear_record(name, entry, own, one) for name in entry.names]
                if first in self._entries_beside:
                    beside = _wanted(self._entries_beside[first], self.extras.baseline_quantizer)
                    baseline |= one.realized[beside].matrices
        path = self.path(block)
        self.context.keep_importance(block, grams)
        write_value(path.with_suffix(".json"), [asdict(record) for record in linears])
        if self.extras.factors:
            save_matrices(self._beside(block, "factors"), factors)
        if self._has_baseline:
            save_matrices(self._beside(block, "baseline"), baseline)
        # Storage order is running order, also where a later matrix shares with an earlier one.
        save_matrices(path, {name: matrices[name] for name in self.names(block)})

    def outcome(self) -> Outcome:
        """What was made."""
        blocks = self.context.blocks
        linears = [
            LinearRecord(**record)
            for block in blocks
            for record in read_value(self.path(block).with_suffix(".json"))
        ]
        factored = {
            name
            for entry in self.plan.chosen
            if isinstance(entry.candidate.scheme, Separate)
            for name in entry.names
        }
        pairs = [(name, block) for block in blocks for name in self.names(block)]
        return Outcome(
            plan=self.plan,
            files={name: self.path(block) for name, block in pairs},
            linears=tuple(linears),
            notes=(),
            factors={name: self._beside(block, "factors") for name, block in pairs if name in factored}
            if self.extras.factors
            else {},
            baseline={name: self._beside(block, "baseline") for name, block in pairs}
            if self.extras.baseline is not None
            else {},
        )

    def _beside(self, block: str, kind: str) -> Path:
        return self.context.block_file(f"{kind}-{self.digest}", block)


def _wanted(entry: Chosen, quantizer: str) -> Wanted:
    return Wanted(entry.names, entry.candidate.scheme, quantizer)


def _halved(matrix: Dense) -> Dense:
    """In 16 bits on disk: that rounds by 1e-7 of the power, and factorization loses 1e-3 and more."""
    return Dense(matrix.weight.half()) if float(matrix.weight.abs().max()) < _LARGEST_HALF else matrix
