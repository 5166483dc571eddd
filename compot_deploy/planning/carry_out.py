"""From a checkpoint and a budget to a form for every linear: Grams → curves → effects → plan → matrices.

Every stage leaves its result in the work folder, a file per block or per input, so that a run that was
stopped goes on where it was; one block's Grams and one input's weights are in memory at a time. The curves
are named after the numbers that they were measured on.

A unit of error does not cost the same everywhere: each linear is weighted with what disturbing it alone does
to the model's output distribution, as Kullback-Leibler divergence on calibration text per unit of its squared
relative error. Sums of such effects are still only a model, so at the end the plan and the best mix of plain
grids of the same budget are both made and measured on that text, and the better one is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from compot_deploy.accuracy.torch_runner import TorchRunner, torch_runner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Matrix
from compot_deploy.core.storage import Storage
from compot_deploy.core.store import StoredMatrices, block_weights, save_matrices, write_tensors, write_text
from compot_deploy.models.calibrate import BlockStream, Gram, Replacements, importance
from compot_deploy.models.checkpoint import Checkpoint, checkpoint_shape
from compot_deploy.models.hints import SharedInput
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.candidates import VERSION, Search, forms, realize
from compot_deploy.planning.compress import LinearFacts
from compot_deploy.planning.curves import Curve, curve
from compot_deploy.planning.knapsack import Plan, knapsack, smallest_bytes, too_little
from compot_deploy.planning.schemes import Form, Joint, Plain, describe, form_from_data, form_to_data
from compot_deploy.planning.screening import screen
from compot_deploy.progress import Progress, silent
from compot_deploy.quant import QUANTIZERS, rtn

_EFFECT_POSITIONS: Final = 1024
"""Positions of calibration text on which effects are measured; standard errors of a KL are then a few %."""

_EFFECT_LOGITS: Final = 32_000_000
"""Logits of the original that are kept for it, at most: 128 MB."""

_FINAL: Final = 4
"""Times as much text for the last choice among finished plans: they are few, and come close to each other."""

_ROUNDED_OUTPUTS: Final = 128
"""Outputs that are rounded to nearest to predict what finer groups bring: evenly spread, at most so many."""


@dataclass(frozen=True)
class Task:
    """What is planned, and with what.

    Attributes:
        checkpoint: the original.
        windows: calibration text.
        work: folder for what is finished.
        storage: what a byte is.
        search: which forms are tried.
        quantizer: of plain grids.
        device: where to compute.
        dtype: of the forward pass.
        sequential: make the matrices of a block for what the compressed blocks before it give.
        progress: told how far the work is.
    """

    checkpoint: Checkpoint
    windows: TokenWindows
    work: Path
    storage: Storage
    search: Search
    quantizer: str = "gptq"
    device: str = "cpu"
    dtype: str = "float32"
    sequential: bool = False
    progress: Progress = silent

    @property
    def inputs(self) -> tuple[tuple[int, SharedInput], ...]:
        """Every input that linears read, in block order."""
        shared = self.checkpoint.architecture.inputs
        return tuple((layer, entry) for layer in range(self.checkpoint.layers) for entry in shared)

    def names(self, layer: int, shared: SharedInput) -> tuple[str, ...]:
        """Full paths of the linears that read an input."""
        block = self.checkpoint.architecture.block_path(layer)
        return tuple(f"{block}.{path}" for path in shared.linears)

    def weights(self, names: Sequence[str]) -> dict[str, Float[Tensor, "inputs outputs"]]:
        """Their weights, in float32."""
        return {name: self.checkpoint.weight(name).float().to(self.device) for name in names}

    def grams(self, layer: int) -> Mapping[str, Tensor]:
        """Grams of the inputs of a block in the original model, from the work folder."""
        return load_file(_gram_file(self.work, layer))

    def whitening(self, layer: int, shared: SharedInput) -> Whitening:
        """Of one input of the original model."""
        return whiten(self.grams(layer)[shared.name].to(self.device))

    def stream(self) -> BlockStream:
        """The model as it reads the calibration text, at its first block."""
        return BlockStream(self.checkpoint, self.windows, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Draft:
    """A plan that was not carried out yet.

    Attributes:
        task: what it is for.
        curves: candidates of every input.
        effects: what a unit of squared error of each linear costs, in nats per token.
        plans: the plan; behind it what it will be compared with, see `choose`.
        sizes: (in, out) of each linear.
        other_bytes: predicted bytes of everything in the output that is not a linear.
    """

    task: Task
    curves: tuple[Curve, ...]
    effects: Mapping[str, float]
    plans: tuple[Plan, ...]
    sizes: Mapping[str, tuple[int, int]]
    other_bytes: int


@dataclass(frozen=True)
class Outcome:
    """A plan that was carried out.

    Attributes:
        plan: form, bytes and error of every linear.
        files: file of each linear's matrix, in block order.
        facts: one per linear, in block order.
        notes: facts that a report must state.
    """

    plan: Plan
    files: Mapping[str, Path]
    facts: tuple[LinearFacts, ...]
    notes: tuple[str, ...]


def collect_grams(task: Task) -> None:
    """One file of Grams per block, from one pass of the original model."""
    label = "Calibrate"
    layers = task.checkpoint.layers
    stream: BlockStream | None = None
    for layer in range(layers):
        task.progress(layer, layers, label)
        if not _gram_file(task.work, layer).exists():
            if stream is None:
                stream = task.stream()
                for done in range(layer):
                    stream.advance(done, capture=False)
            grams = stream.advance(layer)
            write_tensors(
                _gram_file(task.work, layer), {name: gram.matrix for name, gram in grams.items()}, {}
            )
    task.progress(layers, layers, label)


def importances(task: Task) -> dict[str, Float[Tensor, " inputs"]]:
    """How much each input of every linear matters, from the Grams in the work folder."""
    return {
        name: importance(load_file(_gram_file(task.work, layer))[shared.name])
        for layer, shared in task.inputs
        for name in task.names(layer, shared)
    }


def check_budget(task: Task, budget: int) -> None:
    """Refuse a budget that the smallest forms exceed, before any form is measured.

    Forms are listed for it, which takes a hundredth of the time of measuring them, and only where plain grids
    do not fit.

    Raises:
        RecipeError: says what the smallest forms need.
    """
    plain = [Plain(grid) for grid in task.search.grids.grids] or [Plain(None)]
    names = [name for layer, shared in task.inputs for name in task.names(layer, shared)]
    needed = 0
    for name in names:
        outputs, inputs = checkpoint_shape(task.checkpoint, f"{name}.weight")
        needed += min(form.bytes(inputs, outputs, task.storage) for form in plain)
    if needed <= budget:
        return
    label = "List forms"
    least = 0
    for number, (layer, shared) in enumerate(task.inputs):
        task.progress(number, len(task.inputs), label)
        alone, together = _listed(
            task, task.weights(task.names(layer, shared)), task.whitening(layer, shared)
        )
        least += min([sum(min(prices.values()) for prices in alone.values()), *together.values()])
    task.progress(len(task.inputs), len(task.inputs), label)
    if budget < least:
        raise too_little(budget, least)


def measure_curves(task: Task) -> tuple[Curve, ...]:
    """Candidates of every input, measured on their quantized values."""
    label = "Measure candidates"
    curves = []
    for number, (layer, shared) in enumerate(task.inputs):
        task.progress(number, len(task.inputs), label)
        curves.append(_curve(task, layer, shared))
    task.progress(len(task.inputs), len(task.inputs), label)
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


def measure_effects(task: Task) -> dict[str, float]:
    """What a unit of squared relative error of each linear costs the model, in nats per token.

    Each is disturbed alone, by the coarsest plain grid there is (without grids, by a factorised form), and
    the output distributions are compared on calibration text.
    """
    path = task.work / "effects.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    label = "Measure effects"
    total = len(task.checkpoint.architecture.linear_names(task.checkpoint.layers))
    if len(known) < total:
        effect = _Effect(task)
        for layer, shared in task.inputs:
            names = task.names(layer, shared)
            if all(name in known for name in names):
                continue
            whitening = task.whitening(layer, shared)
            for name in names:
                task.progress(len(known), total, label)
                known[name] = _effect_of(name, task, whitening, effect)
            write_text(path, json.dumps(known))
    task.progress(total, total, label)
    return known


def _effect_of(name: str, task: Task, whitening: Whitening, effect: _Effect) -> float:
    (weight,) = task.weights([name]).values()
    probe = _probe(forms(weight, whitening, task.storage, task.search))
    made = realize(probe, {name: weight}, whitening, task.search, quantizer=QUANTIZERS[task.quantizer])
    error = made.errors[name]
    return effect(made.matrices) / error if error > 0.0 else 0.0


def choose(curves: Sequence[Curve], weights: Mapping[str, float], budget: int) -> tuple[Plan, ...]:
    """The plan, then what it must not be worse than: the best mix of plain grids and the best single grid.

    All within the same budget; those that are possible and differ.
    """

    def possible(some: Sequence[Curve]) -> bool:
        return all(all(one.alone) for one in some) and smallest_bytes(some) <= budget

    plan = knapsack(curves, budget, weights)
    plain = [one.only(lambda form: isinstance(form, Plain)) for one in curves]
    contenders = [plain] if possible(plain) else []
    singles = [
        [one.only(lambda form, only=form: form == only) for one in plain]  # type: ignore[misc]
        for form in dict.fromkeys(entry.form for entry in plain[0].alone[0])
    ]
    made = [knapsack(some, budget, weights) for some in singles if possible(some)]
    plans = [plan, *(knapsack(some, budget, weights) for some in contenders)]
    plans += [min(made, key=lambda one: one.loss)] if made else []
    different = {forms_of(one): one for one in reversed(plans)}
    return tuple(one for one in plans if different[forms_of(one)] is one)


def forms_of(plan: Plan) -> tuple[tuple[tuple[str, ...], Form], ...]:
    """What a plan makes of what; two plans of equal forms make equal matrices."""
    return tuple((entry.names, entry.candidate.form) for entry in plan.chosen)


def name_of(plan: Plan) -> str:
    """What a plan of plain forms is called beside the chosen one."""
    forms = {entry.candidate.form for entry in plan.chosen}
    return f"{forms.pop()} for all linears" if len(forms) == 1 else "the best mix of plain grids"


def carry_out(task: Task, plans: Sequence[Plan]) -> Outcome:
    """Make the matrices of the plans and keep the one whose effect on the model is least."""
    made = [_make(task, plan) for plan in plans]
    notes = list(plans[0].notes)
    best = 0
    if len(plans) > 1:
        effect = _Effect(task, _FINAL)
        effects = [effect(StoredMatrices(files)) for files, _ in made]
        best = min(range(len(plans)), key=effects.__getitem__)
        notes.append(verdict(plans, effects))
    files, facts = made[best]
    return Outcome(plans[best], files, facts, tuple(notes))


def verdict(plans: Sequence[Plan], effects: Sequence[float]) -> str:
    """What the final check found, as a note for the report."""
    best = min(range(len(plans)), key=effects.__getitem__)
    others = " and ".join(
        f"{name_of(plan)} within the same bytes {effect:.4g}"
        for plan, effect in zip(plans[1:], effects[1:], strict=True)
    )
    winner = "the plan" if best == 0 else f"{name_of(plans[best])}, which is taken"
    return f"on calibration text the plan costs {effects[0]:.4g} nats per token, {others}: better is {winner}"


# -- pieces --------------------------------------------------------------------------------------------


def _curve(task: Task, layer: int, shared: SharedInput) -> Curve:
    names = task.names(layer, shared)
    weights = task.weights(names)
    whitening = task.whitening(layer, shared)
    sizes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    path = task.work / f"curve-{layer:04d}-{shared.name}-{_content(task, weights, whitening)}.json"
    if not path.exists():
        write_text(path, json.dumps(_measure(task, weights, whitening)))
    stored = json.loads(path.read_text())
    return curve(
        names,
        {
            name: [(form_from_data(form), error) for form, error in entries]
            for name, entries in stored["alone"].items()
        },
        [(form_from_data(form), errors) for form, errors in stored["together"]],
        sizes,
        task.storage,
        stored.get("unmeasured", 0),
    )


def _listed(
    task: Task, weights: Mapping[str, Tensor], whitening: Whitening
) -> tuple[dict[str, dict[Form, int]], dict[Form, int]]:
    """Forms and their bytes: of each matrix of an input, and of all of them with one dictionary."""

    def listed(weight: Float[Tensor, "inputs outputs"]) -> dict[Form, int]:
        inputs, columns = weight.shape
        tried = forms(weight, whitening, task.storage, task.search)
        return {form: form.bytes(inputs, columns, task.storage) for form in tried}

    together: dict[Form, int] = {}
    if len(weights) > 1:
        everything = listed(torch.cat(list(weights.values()), dim=1))
        together = {form: size for form, size in everything.items() if isinstance(form, Joint)}
    return {name: listed(weight) for name, weight in weights.items()}, together


def _measure(task: Task, weights: Mapping[str, Tensor], whitening: Whitening) -> dict[str, Any]:
    outputs = sum(weight.shape[1] for weight in weights.values())

    def errors(form: Form, names: Sequence[str]) -> Mapping[str, float]:
        # An output of a plain grid is quantized for itself: matrices of one input are done side by side, in one pass.
        covered = {name: weights[name] for name in names}
        return realize(form, covered, whitening, task.search, quantizer=QUANTIZERS[task.quantizer]).errors

    def nearest(name: str, grid: Grid) -> float:
        some = weights[name][:, :: -(-weights[name].shape[1] // _ROUNDED_OUTPUTS)]
        inputs, columns = some.shape
        # Nothing passes from group to group: they are laid side by side and rounded in one go.
        shape = grid.groups(inputs), grid.group, columns
        whole = torch.nn.functional.pad(some, (0, 0, 0, shape[0] * shape[1] - inputs)).view(shape)
        beside = rtn(whole.transpose(0, 1).flatten(1), None, grid).dequantize()
        rounded = beside.view(grid.group, shape[0], columns).transpose(0, 1).flatten(0, 1)
        return whitening.error(some, rounded[:inputs]) ** 2

    alone, together = _listed(task, weights, whitening)
    measured = screen(
        alone,
        together,
        {name: weight.shape[1] / outputs for name, weight in weights.items()},
        tolerance=task.search.tolerance,
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


def _make(task: Task, plan: Plan) -> tuple[dict[str, Path], tuple[LinearFacts, ...]]:
    """The matrices of a plan, a file per block; files that are there already are taken as they are."""
    label = "Make matrices"
    layers = task.checkpoint.layers
    named = json.dumps([(names, form_to_data(form)) for names, form in forms_of(plan)])
    digest = hashlib.sha256((named + "sequential" * task.sequential).encode()).hexdigest()[:12]

    def path(layer: int) -> Path:
        return task.work / f"planned-{digest}-{layer:04d}.safetensors"

    def going_on(layer: int) -> Replacements:
        """Make the block where it is not made yet; what flows on is what it gives then."""

        def make_and_go_on(grams: Mapping[str, Gram]) -> Mapping[str, Tensor]:
            if not path(layer).exists():
                _make_block(
                    task, plan, layer, {name: gram.matrix for name, gram in grams.items()}, path(layer)
                )
            return block_weights(path(layer), task.checkpoint.architecture.block_path(layer))

        return make_and_go_on

    stream: BlockStream | None = None
    for layer in range(layers):
        task.progress(layer, layers, label)
        if path(layer).exists():
            continue
        if not task.sequential:
            _make_block(task, plan, layer, task.grams(layer), path(layer))
            continue
        if stream is None:
            stream = task.stream()
            for done in range(layer):
                stream.advance(done, capture=False, replacements=going_on(done))
        stream.advance(layer, replacements=going_on(layer))
    task.progress(layers, layers, label)
    files = {name: path(layer) for layer in range(layers) for name in _block_names(task, layer)}
    facts = [
        LinearFacts(**fact)
        for layer in range(layers)
        for fact in json.loads(path(layer).with_suffix(".json").read_text())
    ]
    return files, tuple(facts)


def _make_block(task: Task, plan: Plan, layer: int, grams: Mapping[str, Tensor], path: Path) -> None:
    by_name = {entry.names[0]: entry for entry in plan.chosen}
    matrices: dict[str, Matrix] = {}
    facts: list[LinearFacts] = []
    for shared in task.checkpoint.architecture.inputs:
        whitening = whiten(grams[shared.name].to(task.device))
        for first in task.names(layer, shared):
            if first not in by_name:
                continue
            entry = by_name[first]
            made = realize(
                entry.candidate.form,
                task.weights(entry.names),
                whitening,
                task.search,
                dictionary_name="+".join(entry.names) if len(entry.names) > 1 else first,
                quantizer=QUANTIZERS[task.quantizer],
            )
            matrices |= made.matrices
            facts += [
                _facts(name, entry.candidate.form, made.errors[name], whitening) for name in entry.names
            ]
    write_text(path.with_suffix(".json"), json.dumps([asdict(fact) for fact in facts]))
    # Storage order is block order, also where a later matrix shares with an earlier one.
    save_matrices(path, {name: matrices[name] for name in _block_names(task, layer)})


def _block_names(task: Task, layer: int) -> tuple[str, ...]:
    block = task.checkpoint.architecture.block_path(layer)
    return tuple(f"{block}.{path}" for path in task.checkpoint.architecture.linears)


def _facts(name: str, form: Form, error: float, whitening: Whitening) -> LinearFacts:
    reason = f"the plan chose {describe(form)}" if isinstance(form, Plain) else ""
    return LinearFacts(name, error**0.5, None, whitening.ridge, whitening.escalated, reason)


class _Effect:
    """KL divergence of the model with some matrices replaced, on the first calibration windows."""

    def __init__(self, task: Task, times: int = 1) -> None:
        pickled = any(path.suffix == ".bin" for path in task.checkpoint.files)
        self._runner: TorchRunner = torch_runner(
            task.checkpoint.folder, device=task.device, allow_pickle=pickled
        )
        positions = times * min(_EFFECT_POSITIONS, max(64, _EFFECT_LOGITS // task.checkpoint.vocabulary))
        self._windows = []
        for window in task.windows.windows:
            if positions <= 0:
                break
            self._windows.append(window[: max(2, positions)])
            positions -= len(self._windows[-1])
        self._original = [self._log_probabilities(window) for window in self._windows]

    def __call__(self, matrices: Mapping[str, Matrix]) -> float:
        total, count = 0.0, 0
        with self._runner.replaced(matrices):
            for window, original in zip(self._windows, self._original, strict=True):
                changed = self._log_probabilities(window)
                exact = original.double()
                total += float((exact.exp() * (exact - changed.double())).sum())
                count += len(window)
        return max(0.0, total / count)

    def _log_probabilities(self, window: Tensor) -> Float[Tensor, "positions vocabulary"]:
        (logits,) = self._runner.logits(window[None], len(window))
        return torch.log_softmax(logits[0].double(), dim=-1).float()


def _probe(tried: Sequence[Form]) -> Form:
    """A disturbance of the size that plans deal in."""
    grids = [form for form in tried if isinstance(form, Plain) and form.grid is not None]
    if grids:
        return min(grids, key=_coarseness)
    return next(form for form in tried if isinstance(form, Joint))


def _coarseness(form: Plain) -> tuple[int, int]:
    assert form.grid is not None
    return form.grid.bits, -form.grid.group


def _content(task: Task, weights: Mapping[str, Tensor], whitening: Whitening) -> str:
    tolerance = (task.search.tolerance,) if task.search.tolerance else ()
    digest = hashlib.sha256(repr((VERSION, task.search, task.storage, task.quantizer, *tolerance)).encode())
    for value in (*weights.values(), whitening.factor):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gram_file(work: Path, layer: int) -> Path:
    return work / f"grams-{layer:04d}.safetensors"
