"""Models that read whole texts: encoders, classifiers, masked language models. Same losses, same gate as decoders.

Outputs are compared where they are: of every token, of every text, or pooled over a text, as the task says::

    embeddings      NMSE of the token vectors, cosine of their means over a text
    distributions   KL divergence, same most likely class, NMSE of the logits
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from compot_deploy.accuracy.evaluate import Evaluation, Visit, evaluation_metadata
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import Comparison, compare, concatenate, mean, predict, summarize
from compot_deploy.accuracy.outcome import AccuracyReport
from compot_deploy.accuracy.roles import evaluated_report, pairs_of, require_reference, roles_of
from compot_deploy.accuracy.transcripts import transcripts_beside, transcripts_of, with_words
from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.errors import ArtifactError, InputError, first_line
from compot_deploy.models.tasks import Batch, Task, pooled
from compot_deploy.progress import Progress, silent

_WINDOWS = 16
"""Texts that are read at once."""


@runtime_checkable
class TextRunner(Protocol):
    """A model that can be asked what it makes of texts."""

    @property
    def name(self) -> str:
        """What is run and how, for reports."""
        ...

    def outputs(self, batch: Batch) -> Tensor:
        """Its output for a batch, float32 on the CPU, padding included."""
        ...


Opening: TypeAlias = Callable[[], TextRunner]
"""Opens a runner when its turn has come; it is dropped when it has had its turn."""


class TorchTexts:
    """A model of transformers.

    Args:
        model: in evaluation mode.
        task: what it is for.
        name: for reports.
    """

    def __init__(self, model: Any, task: Task, name: str = "torch") -> None:
        self._model, self._task, self.name = model, task, name

    def outputs(self, batch: Batch) -> Tensor:
        """See `TextRunner.outputs`."""
        with torch.inference_mode():
            return self._task.output(self._model(**batch.arguments)).float().cpu()


class OnnxTexts:
    """An exported ONNX folder in onnxruntime.

    Args:
        folder: the artifact.
        exact: compute every quantized multiplication in float32.
        threads: 0 lets the runtime choose.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: the runtime refuses the file.
    """

    def __init__(self, folder: Path, *, exact: bool = False, threads: int = 0) -> None:
        from compot_deploy.exporters.onnx.session import open_session, runtime_name

        level = 0 if exact else None
        self._session = open_session(folder, level, threads)
        self.name = runtime_name(level)
        self._folder = folder

    def outputs(self, batch: Batch) -> Tensor:
        """See `TextRunner.outputs`."""
        zeros = torch.zeros_like(batch.arguments["input_ids"])
        feeds = {
            entry.name: batch.arguments.get(entry.name, zeros).numpy() for entry in self._session.get_inputs()
        }
        try:
            (found,) = self._session.run([self._session.get_outputs()[0].name], feeds)
        except Exception as error:  # onnxruntime's own errors share no base class
            raise ArtifactError(f"{self._folder} fails: {first_line(error)}.") from error
        return torch.from_numpy(found)


def check_texts(
    task: Task,
    reference: TextRunner | Opening | None,
    compressed: TextRunner | Opening,
    exported: TextRunner | Opening,
    exported_exact: TextRunner | Opening,
    evaluation: Evaluation,
    gate: Gate,
    *,
    factorized: TextRunner | Opening | None = None,
    unhealed: TextRunner | Opening | None = None,
    reference_absent: str = "the original model was not given",
    factorized_absent: str = "the factors before quantization were not given",
    progress: Progress = silent,
    visit: Visit | None = None,
) -> AccuracyReport:
    """Measure method, export and total loss and evaluate them; the arguments are those of `evaluate.check`.

    Raises:
        InputError: the gate limits the total loss but there is no reference.
    """
    require_reference(gate, reference, reference_absent)
    roles = roles_of(reference, factorized, compressed, exported_exact, exported, unhealed)
    pairs = pairs_of(roles)
    took = _take_turns(task, roles, list(pairs.values()), evaluation, progress, visit)
    return evaluated_report(
        evaluation_metadata(evaluation),
        {name: took.losses[pair] for name, pair in pairs.items()},
        took.noise,
        gate,
        reference_absent=reference_absent,
        factorized_absent=factorized_absent,
        continuations=transcripts_beside(evaluation, took.transcripts) if task.has_towers else (),
    )


def measure_texts(
    task: Task, reference: TextRunner | Opening, candidate: TextRunner | Opening, evaluation: Evaluation
) -> Loss:
    """One loss by itself, for a model that is shown beside another."""
    pair = ("reference", "candidate")
    roles = {"reference": reference, "candidate": candidate}
    return _take_turns(task, roles, [pair], evaluation).losses[pair]


@dataclass(frozen=True)
class _Turns:
    """What the models did."""

    losses: Mapping[tuple[str, str], Loss]
    noise: Loss
    transcripts: Mapping[str, Sequence[tuple[int, ...]]]


def _take_turns(
    task: Task,
    roles: Mapping[str, TextRunner | Opening],
    pairs: Sequence[tuple[str, str]],
    evaluation: Evaluation,
    progress: Progress = silent,
    visit: Visit | None = None,
) -> _Turns:
    """Every model reads the texts, one after the other; the first one tells the numerical noise."""
    windows = evaluation.text.inputs
    pieces = [windows[start : start + _WINDOWS] for start in range(0, len(windows), _WINDOWS)]
    batches = [batch for piece in pieces for batch in task.batches(piece)]
    singly = [batch for window in pieces[0] for batch in task.batches([window])]
    kept: dict[str, tuple[str, list[Tensor]]] = {}
    losses: dict[tuple[str, str], Loss] = {}
    said: dict[str, Sequence[tuple[int, ...]]] = {}
    noise: Loss | None = None
    label = f"Read {len(windows)} texts with {len(roles)} models"
    for number, (role, given) in enumerate(roles.items()):
        progress(number, len(roles), label)
        runner = given if isinstance(given, TextRunner) else given()
        outputs = [runner.outputs(batch) for batch in batches]
        if task.has_towers:
            said[role] = transcripts_of(runner, evaluation)
        noise = noise or _noise(task, runner, batches[0], singly)
        for pair in pairs:
            if pair[1] == role:
                name, earlier = kept[pair[0]]
                figures = compare_outputs(task, batches, earlier, outputs)
                losses[pair] = Loss(name, runner.name, figures, ())
                if task.has_towers:
                    losses[pair] = with_words(losses[pair], said[pair[0]], said[role], evaluation)
        if any(role == first for first, _ in pairs):
            kept[role] = runner.name, outputs
        if visit is not None:
            visit([role], runner)
        del runner, given
        give_back_freed_memory()
    progress(len(roles), len(roles), label)
    assert noise is not None
    return _Turns(losses, noise, said)


def compare_outputs(
    task: Task, batches: Sequence[Batch], reference: Sequence[Tensor], candidate: Sequence[Tensor]
) -> Comparison:
    """Two models on the same texts.

    Raises:
        InputError: their outputs have different shapes.
    """
    for first, second in zip(reference, candidate, strict=True):
        if first.shape != second.shape:
            raise InputError(
                f"Outputs of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be compared: they are not of "
                "the same model."
            )
    if task.kind == "embedding":
        return _compare_vectors(batches, reference, candidate)
    parts = []
    for batch, first, second in zip(batches, reference, candidate, strict=True):
        one, two = (_rows(task, output, batch) for output in (first, second))
        targets = one.argmax(-1)
        parts.append(compare(predict(one, targets), predict(two, targets)))
    return summarize(concatenate(parts), goes_on=False)


def _rows(task: Task, output: Tensor, batch: Batch) -> Tensor:
    return output if task.pools else output[batch.compared]


def _compare_vectors(
    batches: Sequence[Batch], reference: Sequence[Tensor], candidate: Sequence[Tensor]
) -> Comparison:
    error = power = largest = 0.0
    bad = [0, 0]
    cosines: list[Tensor] = []
    for batch, first, second in zip(batches, reference, candidate, strict=True):
        r, c = first[batch.real].double(), second[batch.real].double()
        bad = [bad[0] + int((~torch.isfinite(r)).sum()), bad[1] + int((~torch.isfinite(c)).sum())]
        error += float((c - r).square().sum())
        power += float((r - r.mean(-1, keepdim=True)).square().sum())
        largest = max(largest, float((c - r).abs().max()))
        one, two = pooled(first, batch.real), pooled(second, batch.real)
        cosines.append(torch.nn.functional.cosine_similarity(one, two, dim=-1))
    cosine = torch.cat(cosines)
    return Comparison(
        positions=len(cosine),
        skipped=0,
        nonfinite_reference=bad[0],
        nonfinite_candidate=bad[1],
        reference_perplexity=None,
        candidate_perplexity=None,
        perplexity_ratio=None,
        divergence=None,
        top1_agreement=None,
        nmse=error / power if power else float(error > 0),
        largest_difference=largest,
        cosine=mean(cosine),
        lowest_cosine=float(cosine.min()),
    )


def _noise(task: Task, runner: TextRunner, batch: Batch, singly: Sequence[Batch]) -> Loss:
    """The same model twice: texts side by side, and one at a time."""
    together = runner.outputs(batch)
    alone = torch.zeros_like(together)
    for number, one in zip(range(len(together)), singly, strict=False):
        output = runner.outputs(one)[0]
        if together.dim() == 2:
            alone[number] = output
        else:
            kept = min(len(output), alone.shape[1])  # what fills up a text may differ
            alone[number, :kept] = output[:kept]
    figures = compare_outputs(task, [batch], [together], [alone])
    return Loss(runner.name, f"{runner.name}, text by text", figures, ())
