"""Is the exported model still the model? Three losses, numerical noise, and a gate that says yes or no.

Up to four models read the same tokens, one after the other (`compot_deploy.accuracy.reading`):

    reference    the original weights in torch                             ┐ method loss
    compressed   the compressed weights, dequantized, in torch     ┐       ┘
    exact        the exported file, the runtime computing exactly  ┘ export loss (float32 reference)
    exported     the exported file as deployed                       compressed → exported: export loss (deployed)
                                                                     reference → exported: total loss

The *method* loss is what compression costs; the *export* loss is what the file and the runtime add, which in
float32 must be rounding and nothing more; the *total* is what a user notices. One number cannot stand
for another: a good total can hide a wrong export behind a generous gate, and a bad export must not be blamed
on the method.

Where the factors existed before they were quantized, a fifth model, *factorized*, reads along and splits the
method loss in two: reference → factorized is what factorization costs, factorized → compressed what
quantization does. Where the model was healed, a sixth one, *unhealed*, is the compressed model before: quantization is
measured up to it, and what healing gained is the difference of its loss to the method loss.

Every window of the evaluation text is read from its start with an empty cache. Position t predicts token
t + 1: the first token of a window is never scored, and the last position predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.losses import GreedyMatch, Loss
from compot_deploy.accuracy.metrics import Comparison, common_prefix
from compot_deploy.accuracy.outcome import AccuracyReport, Continuation, EvaluationMetadata
from compot_deploy.accuracy.reading import NOISE_WINDOWS, Readings, batches_of, chunk_of, numerical_noise
from compot_deploy.accuracy.roles import evaluated_report, pairs_of, require_reference, roles_of
from compot_deploy.accuracy.runner import Runner, texts_of
from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.errors import InputError
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.models.writing import Writer
from compot_deploy.progress import Progress, Ticker, silent


@dataclass(frozen=True)
class Evaluation:
    """What the models are evaluated on.

    Attributes:
        text: windows of token ids that calibration has not seen, and where they come from.
        prompts: token ids to be continued greedily, beginning-of-text token included where the model has one.
        decode: token ids to text.
        new_tokens: length of each continuation.
        end_tokens: ids that end a text: a continuation counts up to the first one, included.
        batch: windows of one length that are run together; more is faster on small models.
        writer: how the decoder writes, of a model of two towers.
    """

    text: TokenWindows
    prompts: tuple[tuple[int, ...], ...]
    decode: Callable[[Sequence[int]], str]
    new_tokens: int = 48
    end_tokens: frozenset[int] = frozenset()
    batch: int = 4
    writer: Writer | None = None

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.batch < 1:
            raise ValueError("An evaluation needs at least one new token and one window at a time.")
        if all(len(window) < 2 for window in self.text.windows):
            raise InputError(
                f"{self.text.source} has no window of two tokens, so nothing can be predicted: give more text."
            )
        if any(not prompt for prompt in self.prompts):
            raise InputError("A prompt has no tokens: give each at least one word.")


Opening: TypeAlias = Callable[[], Runner]
"""Opens a runner when its turn has come; it is dropped when it has had its turn."""

Visit: TypeAlias = Callable[[Sequence[str], Any], None]
"""Does something else with a runner that is open, knowing its roles."""


def check(
    reference: Runner | Opening | None,
    compressed: Runner | Opening,
    exported: Runner | Opening,
    exported_exact: Runner | Opening,
    evaluation: Evaluation,
    gate: Gate,
    *,
    factorized: Runner | Opening | None = None,
    unhealed: Runner | Opening | None = None,
    reference_absent: str = "the original model was not given",
    factorized_absent: str = "the factors before quantization were not given",
    progress: Progress = silent,
    scratch: Path | None = None,
    visit: Visit | None = None,
) -> AccuracyReport:
    """Measure method, export and total loss and evaluate them.

    Args:
        reference: the original model; None leaves the method and total loss out. A function that opens it, here and
            below, holds no more than one model at a time.
        compressed: the dequantized model in torch.
        exported: the file as deployed.
        exported_exact: the float32 reference: the file with the runtime's approximations off. A runtime that has none
            is given twice, the same object, and runs once.
        evaluation: text and prompts.
        gate: limits.
        factorized: the factors before quantization, in torch; splits the method loss. Needs the reference.
        unhealed: the compressed model before it was healed, in torch. Needs the reference.
        reference_absent: why there is no reference, for the report.
        factorized_absent: why there are no factors before quantization, for the report.
        progress: called after every step.
        scratch: folder for logits that are kept meanwhile, 4 bytes times positions times vocabulary for each of two or
            three models; None takes the system's.
        visit: called with each model once, while it is open, and the roles that it has.

    Raises:
        InputError: the gate limits the total loss but there is no reference; the models disagree about the
            vocabulary; a token is beyond it; a window or prompt is longer than a model can read; the disk is full.
    """
    require_reference(gate, reference, reference_absent)
    roles = roles_of(reference, factorized, compressed, exported_exact, exported, unhealed)
    pairs = pairs_of(roles)
    took = _take_turns(roles, list(pairs.values()), evaluation, progress, scratch, noise=True, visit=visit)
    assert took.noise is not None
    return evaluated_report(
        evaluation_metadata(evaluation),
        {name: took.loss(pair) for name, pair in pairs.items()},
        took.noise,
        gate,
        reference_absent=reference_absent,
        factorized_absent=factorized_absent,
        continuations=_continuations(evaluation, took.texts),
    )


def measure(
    reference: Runner | Opening,
    candidate: Runner | Opening,
    evaluation: Evaluation,
    progress: Progress = silent,
    scratch: Path | None = None,
) -> Loss:
    """One loss by itself, for a model that is shown beside another; the arguments are those of `check`."""
    pair = ("reference", "candidate")
    roles = {"reference": reference, "candidate": candidate}
    return _take_turns(roles, [pair], evaluation, progress, scratch, noise=False).loss(pair)


@dataclass
class _Turns:
    """What the models did, by role."""

    names: dict[str, str] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    noise: Loss | None = None

    def loss(self, pair: tuple[str, str]) -> Loss:
        """Between two roles."""
        first, second = pair
        both = zip(self.texts[first], self.texts[second], strict=True)
        matches = tuple(_match(one, other) for one, other in both)
        return Loss(self.names[first], self.names[second], self.comparisons[pair], matches)


def _take_turns(
    roles: Mapping[str, Runner | Opening],
    pairs: Sequence[tuple[str, str]],
    evaluation: Evaluation,
    progress: Progress,
    scratch: Path | None,
    *,
    noise: bool,
    visit: Visit | None = None,
) -> _Turns:
    """Every model reads the text and continues the prompts, one after the other; the first one tells the noise."""
    by_model: dict[int, list[str]] = {}
    for role, given in roles.items():
        by_model.setdefault(id(given), []).append(role)
    fit = _Fit(evaluation)
    for given in roles.values():
        if isinstance(given, Runner):  # refused before anything runs
            fit.check(given)
    windows, size = evaluation.text.windows, evaluation.batch
    first: Runner | None
    first = runner = _opened(roles[next(iter(roles))])
    batches = batches_of(windows, size, runner.vocabulary)
    noise_batches = batches_of(windows[:NOISE_WINDOWS], size, runner.vocabulary) or batches[:1]
    parts = {model: _batches_for(names, batches) for model, names in by_model.items()}
    steps = sum(len(batches[:count]) + len(evaluation.prompts) for count in parts.values())
    steps += noise * len(noise_batches)
    tick = Ticker(steps, progress)
    took = _Turns()
    written: dict[str, list[tuple[int, ...]]] = {}
    with Readings(batches, pairs, scratch) as readings:
        for model, names in by_model.items():
            runner, first = first or _opened(roles[names[0]]), None
            fit.check(runner)
            readings.read(names, runner, tick, parts[model])
            if noise and took.noise is None:
                took.noise = numerical_noise(runner, noise_batches, tick)
            # What is computed exactly from the same weights should write the same, and is asked so first.
            drafts = written.get("compressed") if "exact" in names else None
            texts = list(_continued(runner, evaluation, tick, drafts))
            took.names |= dict.fromkeys(names, runner.name)
            written |= dict.fromkeys(names, texts)
            if visit is not None:
                visit(names, runner)
            del runner
            give_back_freed_memory()
        for role, texts in written.items():
            took.texts[role] = [_until_end(text, evaluation.end_tokens) for text in texts]
        took.comparisons = {pair: readings.comparison(pair) for pair in pairs}
    return took


def _batches_for(roles: Sequence[str], batches: Sequence[Tensor]) -> int | None:
    """How many batches a model reads; None is all of them.

    What only computes exactly is compared with the weights it was made of, and rounding shows in few positions.
    """
    if list(roles) != ["exact"]:
        return None
    positions = accumulate(batch.numel() for batch in batches)
    return next((number for number, read in enumerate(positions, start=1) if read >= EXACT_POSITIONS), None)


EXACT_POSITIONS: Final = 1024
"""Positions that the exported file reads with the runtime computing exactly, at least, where the text has them."""


def _opened(given: Runner | Opening) -> Runner:
    return given if isinstance(given, Runner) else given()


class _Fit:
    """Refuses text that a model cannot read, and models that are not the same, before they run."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._first: tuple[str, int] | None = None
        self._sequences = [
            (f"{evaluation.text.source}, window {number}", window.tolist(), 0)
            for number, window in enumerate(evaluation.text.windows)
        ] + [
            (f"prompt {number}", list(prompt), evaluation.new_tokens)
            for number, prompt in enumerate(evaluation.prompts)
        ]

    def check(self, runner: Runner) -> None:
        """Refuse a model that does not fit to the text or to the models before it."""
        name, vocabulary = self._first = self._first or (runner.name, runner.vocabulary)
        if runner.vocabulary != vocabulary:
            raise InputError(
                f"{runner.name} has {runner.vocabulary} logits, {name} has {vocabulary}: they are not the same model."
            )
        for where, tokens, more in self._sequences:
            bad = [token for token in tokens if not 0 <= token < vocabulary]
            if bad:
                raise InputError(
                    f"{where} holds the token id {bad[0]}, but the model knows ids 0 to {vocabulary - 1}. The "
                    "tokenizer does not belong to this model."
                )
            if runner.context is not None and len(tokens) + more > runner.context:
                raise InputError(
                    f"{where} takes {len(tokens) + more} tokens, but {runner.name} reads at most {runner.context}. "
                    "Use shorter windows, prompts or continuations."
                )


def _continued(
    runner: Runner, evaluation: Evaluation, tick: Ticker, drafts: Sequence[tuple[int, ...]] | None
) -> Iterable[tuple[int, ...]]:
    """Greedy continuations of every prompt; a draft that the model would write itself is read, not written."""
    prompts, count = evaluation.prompts, evaluation.new_tokens
    if drafts is None:
        texts = texts_of(runner, prompts, count)
    else:
        texts = (
            draft if _would_write(runner, prompt, draft) else runner.generate(prompt, count)
            for prompt, draft in zip(prompts, drafts, strict=True)
        )
    for text in texts:
        tick(f"continuing {len(prompts)} prompts")
        yield text


def _would_write(runner: Runner, prompt: Sequence[int], text: Sequence[int]) -> bool:
    """Whether a text is the greedy continuation of a prompt, by reading it at once."""
    tokens = torch.tensor([[*prompt, *text]])
    pieces = runner.logits(tokens, chunk_of(tokens, runner))
    choices = torch.cat([piece[0].argmax(-1) for piece in pieces])
    return bool((choices[len(prompt) - 1 : -1] == tokens[0, len(prompt) :]).all())


def _until_end(tokens: tuple[int, ...], end_tokens: frozenset[int]) -> tuple[int, ...]:
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens


def _match(first: tuple[int, ...], second: tuple[int, ...]) -> GreedyMatch:
    return GreedyMatch(common_prefix(first, second), max(len(first), len(second)), first == second)


def _continuations(
    evaluation: Evaluation, texts: Mapping[str, Sequence[tuple[int, ...]]]
) -> tuple[Continuation, ...]:
    decode = evaluation.decode
    return tuple(
        Continuation(
            prompt=decode(prompt),
            reference=decode(texts["reference"][number]) if "reference" in texts else None,
            compressed=decode(texts["compressed"][number]),
            exact=decode(texts["exact"][number]),
            exported=decode(texts["exported"][number]),
            factorized=decode(texts["factorized"][number]) if "factorized" in texts else None,
        )
        for number, prompt in enumerate(evaluation.prompts)
    )


def evaluation_metadata(evaluation: Evaluation) -> EvaluationMetadata:
    """What figures were measured on."""
    lengths = [len(window) for window in evaluation.text.windows]
    return EvaluationMetadata(
        source=evaluation.text.source,
        digest=evaluation.text.digest,
        windows=len(lengths),
        tokens=sum(lengths),
        positions=sum(max(0, length - 1) for length in lengths),
        prompts=len(evaluation.prompts),
        new_tokens=evaluation.new_tokens,
        notes=evaluation.text.notes,
    )
