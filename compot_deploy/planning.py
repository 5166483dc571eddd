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

from compot_deploy.architectures import SharedInput
from compot_deploy.calibrate import BlockStream, importance
from compot_deploy.candidates import VERSION, Search, curve, forms, realize
from compot_deploy.checkpoint import Checkpoint
from compot_deploy.compress import LinearFacts
from compot_deploy.plan import (
    Curve,
    Form,
    Joint,
    Plain,
    Plan,
    describe,
    form_from_data,
    form_to_data,
    knapsack,
    smallest_bytes,
)
from compot_deploy.progress import Progress, silent
from compot_deploy.quant import QUANTIZERS
from compot_deploy.runners import TorchRunner, torch_runner
from compot_deploy.store import StoredMatrices, save_matrices, write_tensors, write_text
from compot_deploy.tokens import TokenWindows
from compot_deploy.weights import Matrix, Storage
from compot_deploy.whiten import Whitening, whiten

_EFFECT_POSITIONS: Final = 1024
"""Positions of calibration text on which effects are measured; standard errors of a KL are then a few %."""

_EFFECT_LOGITS: Final = 32_000_000
"""Logits of the original that are kept for it, at most: 128 MB."""


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

    def whitening(self, layer: int, shared: SharedInput) -> Whitening:
        """Of one input, from the Grams in the work folder."""
        return whiten(load_file(_gram_file(self.work, layer))[shared.name].to(self.device))


@dataclass(frozen=True)
class Draft:
    """A plan that was not carried out yet.

    Attributes:
        task: what it is for.
        curves: candidates of every input.
        effects: what a unit of squared error of each linear costs, in nats per token.
        plans: the plan; behind it the plain mix of the same budget that it will be compared with.
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
                stream = BlockStream(task.checkpoint, task.windows, device=task.device, dtype=task.dtype)
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


def measure_curves(task: Task) -> tuple[Curve, ...]:
    """Candidates of every input, measured on their quantized values."""
    label = "Measure candidates"
    curves = []
    for number, (layer, shared) in enumerate(task.inputs):
        task.progress(number, len(task.inputs), label)
        curves.append(_curve(task, layer, shared))
    task.progress(len(task.inputs), len(task.inputs), label)
    return tuple(curves)


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
            for name, weight in task.weights(names).items():
                task.progress(len(known), total, label)
                probe = _probe(forms(weight, whitening, task.storage, task.search))
                made = realize(
                    probe, {name: weight}, whitening, task.search, quantizer=QUANTIZERS[task.quantizer]
                )
                error = made.errors[name]
                known[name] = effect(made.matrices) / error if error > 0.0 else 0.0
            write_text(path, json.dumps(known))
    task.progress(total, total, label)
    return known


def choose(curves: Sequence[Curve], weights: Mapping[str, float], budget: int) -> tuple[Plan, ...]:
    """The plan, and the plain mix of the same budget where there is one that differs."""
    plan = knapsack(curves, budget, weights)
    plain = [one.only(lambda form: isinstance(form, Plain)) for one in curves]
    factorized = any(isinstance(entry.candidate.form, Joint) for entry in plan.chosen)
    possible = all(all(one.alone) for one in plain) and smallest_bytes(plain) <= budget
    return (plan, knapsack(plain, budget, weights)) if factorized and possible else (plan,)


def carry_out(task: Task, plans: Sequence[Plan]) -> Outcome:
    """Make the matrices of the plans and keep the one whose effect on the model is least."""
    made = [_make(task, plan) for plan in plans]
    notes = list(plans[0].notes)
    best = 0
    if len(plans) > 1:
        effect = _Effect(task)
        effects = [effect(StoredMatrices(files)) for files, _ in made]
        best = min(range(len(plans)), key=effects.__getitem__)
        verdict = "the plan" if best == 0 else "plain quantization, which is taken"
        notes.append(
            f"on calibration text the plan costs {effects[0]:.4g} nats per token and the best mix of plain "
            f"grids within the same bytes {effects[1]:.4g}: better is {verdict}"
        )
    files, facts = made[best]
    return Outcome(plans[best], files, facts, tuple(notes))


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
    )


def _measure(task: Task, weights: Mapping[str, Tensor], whitening: Whitening) -> dict[str, Any]:
    quantizer = QUANTIZERS[task.quantizer]

    def errors(form: Form, covered: Mapping[str, Tensor]) -> Mapping[str, float]:
        return realize(form, covered, whitening, task.search, quantizer=quantizer).errors

    alone = {
        name: [
            (form_to_data(form), errors(form, {name: weight})[name])
            for form in forms(weight, whitening, task.storage, task.search)
        ]
        for name, weight in weights.items()
    }
    together = []
    if len(weights) > 1:
        whole = torch.cat(list(weights.values()), dim=1)
        together = [
            (form_to_data(form), errors(form, weights))
            for form in forms(whole, whitening, task.storage, task.search)
            if isinstance(form, Joint)
        ]
    return {"alone": alone, "together": together}


def _make(task: Task, plan: Plan) -> tuple[dict[str, Path], tuple[LinearFacts, ...]]:
    """The matrices of a plan, a file per block; files that are there already are taken as they are."""
    by_name = {entry.names[0]: entry for entry in plan.chosen}
    label = "Make matrices"
    layers = task.checkpoint.layers
    chosen = [(entry.names, form_to_data(entry.candidate.form)) for entry in plan.chosen]
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]
    files: dict[str, Path] = {}
    facts: list[LinearFacts] = []
    for layer in range(layers):
        task.progress(layer, layers, label)
        path = task.work / f"planned-{digest}-{layer:04d}.safetensors"
        about = path.with_suffix(".json")
        if not path.exists():
            matrices: dict[str, Matrix] = {}
            block: list[LinearFacts] = []
            for shared in task.checkpoint.architecture.inputs:
                names = task.names(layer, shared)
                whitening = task.whitening(layer, shared)
                for first in names:
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
                    block += [
                        _facts(name, entry.candidate.form, made.errors[name], whitening)
                        for name in entry.names
                    ]
            write_text(about, json.dumps([asdict(fact) for fact in block]))
            # Storage order is block order, also where a later matrix shares with an earlier one.
            ordered = {name: matrices[name] for name in _block_names(task, layer)}
            save_matrices(path, ordered)
        facts += [LinearFacts(**fact) for fact in json.loads(about.read_text())]
        files |= dict.fromkeys(_block_names(task, layer), path)
    task.progress(layers, layers, label)
    return files, tuple(facts)


def _block_names(task: Task, layer: int) -> tuple[str, ...]:
    block = task.checkpoint.architecture.block_path(layer)
    return tuple(f"{block}.{path}" for path in task.checkpoint.architecture.linears)


def _facts(name: str, form: Form, error: float, whitening: Whitening) -> LinearFacts:
    reason = f"the plan chose {describe(form)}" if isinstance(form, Plain) else ""
    return LinearFacts(name, error**0.5, None, whitening.ridge, whitening.escalated, reason)


class _Effect:
    """KL divergence of the model with some matrices replaced, on the first calibration windows."""

    def __init__(self, task: Task) -> None:
        pickled = any(path.suffix == ".bin" for path in task.checkpoint.files)
        self._runner: TorchRunner = torch_runner(
            task.checkpoint.folder, device=task.device, allow_pickle=pickled
        )
        positions = min(_EFFECT_POSITIONS, max(64, _EFFECT_LOGITS // task.checkpoint.vocabulary))
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
    digest = hashlib.sha256(repr((VERSION, task.search, task.storage, task.quantizer)).encode())
    for value in (*weights.values(), whitening.factor):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gram_file(work: Path, layer: int) -> Path:
    return work / f"grams-{layer:04d}.safetensors"
