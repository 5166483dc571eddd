"""Is the exported model still the model? Three losses, numerical noise, and a gate that says yes or no.

Up to four models read the same tokens in lockstep:

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
quantization does.

Every window of the evaluation text is read from its start with an empty cache. Position t predicts token
t + 1: the first token of a window is never scored, and the last position predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.lockstep import NOISE_WINDOWS, batches_of, numerical_noise, read_in_lockstep
from compot_deploy.accuracy.losses import GreedyMatch, Loss
from compot_deploy.accuracy.metrics import Comparison, common_prefix
from compot_deploy.accuracy.outcome import AccuracyReport, Continuation, EvaluationMetadata
from compot_deploy.accuracy.roles import evaluated_report, pairs_of, require_reference, roles_of
from compot_deploy.accuracy.runner import Runner
from compot_deploy.errors import InputError
from compot_deploy.models.tokens import TokenWindows
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
    """

    text: TokenWindows
    prompts: tuple[tuple[int, ...], ...]
    decode: Callable[[Sequence[int]], str]
    new_tokens: int = 48
    end_tokens: frozenset[int] = frozenset()
    batch: int = 4

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.batch < 1:
            raise ValueError("An evaluation needs at least one new token and one window at a time.")
        if all(len(window) < 2 for window in self.text.windows):
            raise InputError(
                f"{self.text.source} has no window of two tokens, so nothing can be predicted: give more text."
            )
        if any(not prompt for prompt in self.prompts):
            raise InputError("A prompt has no tokens: give each at least one word.")


def check(
    reference: Runner | None,
    compressed: Runner,
    exported: Runner,
    exported_exact: Runner,
    evaluation: Evaluation,
    gate: Gate,
    *,
    factorized: Runner | None = None,
    reference_absent: str = "the original model was not given",
    factorized_absent: str = "the factors before quantization were not given",
    progress: Progress = silent,
) -> AccuracyReport:
    """Measure method, export and total loss and evaluate them.

    Args:
        reference: the original model; None leaves the method and total loss out.
        compressed: the dequantized model in torch.
        exported: the file as deployed.
        exported_exact: the float32 reference: the file with the runtime's approximations off. A runtime that has none
            is given twice, the same object, and runs once.
        evaluation: text and prompts.
        gate: limits.
        factorized: the factors before quantization, in torch; splits the method loss. Needs the reference.
        reference_absent: why there is no reference, for the report.
        factorized_absent: why there are no factors before quantization, for the report.
        progress: called after every step.

    Raises:
        InputError: the gate limits the total loss but there is no reference; the models disagree about the
            vocabulary; a token is beyond it; a window or prompt is longer than a model can read.
    """
    require_reference(gate, reference, reference_absent)
    roles = roles_of(reference, factorized, compressed, exported_exact, exported)
    distinct = {id(runner): runner for runner in roles.values()}
    _check_fit(list(distinct.values()), evaluation)

    batches = batches_of(evaluation.text.windows, evaluation.batch)
    noise_batches = batches_of(evaluation.text.windows[:NOISE_WINDOWS], evaluation.batch) or batches[:1]
    tick = Ticker(len(batches) + len(noise_batches) + len(evaluation.prompts) * len(distinct), progress)
    pairs = pairs_of(roles)
    comparisons = read_in_lockstep(roles, list(pairs.values()), batches, tick)
    noise = numerical_noise(reference or compressed, noise_batches, tick)
    texts = _continue_prompts(roles, evaluation, tick)
    return evaluated_report(
        evaluation_metadata(evaluation),
        {name: _loss(roles, pair, comparisons[pair], texts) for name, pair in pairs.items()},
        noise,
        gate,
        reference_absent=reference_absent,
        factorized_absent=factorized_absent,
        continuations=_continuations(evaluation, texts),
    )


def measure(
    reference: Runner, candidate: Runner, evaluation: Evaluation, progress: Progress = silent
) -> Loss:
    """One loss by itself, for a model that is shown beside another.

    Args:
        reference: taken as right.
        candidate: measured.
        evaluation: text and prompts.
        progress: called after every step.
    """
    roles: dict[str, Runner] = {"reference": reference, "candidate": candidate}
    _check_fit(list(roles.values()), evaluation)
    batches = batches_of(evaluation.text.windows, evaluation.batch)
    tick = Ticker(len(batches) + 2 * len(evaluation.prompts), progress)
    pair = ("reference", "candidate")
    comparisons = read_in_lockstep(roles, [pair], batches, tick)
    texts = _continue_prompts(roles, evaluation, tick)
    return _loss(roles, pair, comparisons[pair], texts)


def _check_fit(runners: Sequence[Runner], evaluation: Evaluation) -> None:
    """Refuse text that one of the models cannot read, before any of them runs."""
    for runner in runners[1:]:
        if runner.vocabulary != runners[0].vocabulary:
            raise InputError(
                f"{runner.name} has {runner.vocabulary} logits, {runners[0].name} has {runners[0].vocabulary}: "
                "they are not the same model."
            )
    vocabulary = runners[0].vocabulary
    sequences = [
        (f"{evaluation.text.source}, window {number}", window.tolist(), 0)
        for number, window in enumerate(evaluation.text.windows)
    ] + [
        (f"prompt {number}", list(prompt), evaluation.new_tokens)
        for number, prompt in enumerate(evaluation.prompts)
    ]
    for where, tokens, more in sequences:
        bad = [token for token in tokens if not 0 <= token < vocabulary]
        if bad:
            raise InputError(
                f"{where} holds the token id {bad[0]}, but the model knows ids 0 to {vocabulary - 1}. The tokenizer "
                "does not belong to this model."
            )
        for runner in runners:
            if runner.context is not None and len(tokens) + more > runner.context:
                raise InputError(
                    f"{where} takes {len(tokens) + more} tokens, but {runner.name} reads at most "
                    f"{runner.context}. Use shorter windows, prompts or continuations."
                )


def _continue_prompts(
    roles: Mapping[str, Runner], evaluation: Evaluation, tick: Ticker
) -> dict[str, list[tuple[int, ...]]]:
    """Greedy continuations of every prompt by every model, up to the end-of-text token."""
    made: dict[int, list[tuple[int, ...]]] = {}
    for runner in roles.values():
        if id(runner) in made:
            continue
        made[id(runner)] = []
        for prompt in evaluation.prompts:
            tokens = runner.generate(prompt, evaluation.new_tokens)
            made[id(runner)].append(_until_end(tokens, evaluation.end_tokens))
            tick(f"continuing {len(evaluation.prompts)} prompts")
    return {role: made[id(runner)] for role, runner in roles.items()}


def _until_end(tokens: tuple[int, ...], end_tokens: frozenset[int]) -> tuple[int, ...]:
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens


def _loss(
    roles: Mapping[str, Runner],
    pair: tuple[str, str],
    comparison: Comparison,
    texts: Mapping[str, Sequence[tuple[int, ...]]],
) -> Loss:
    first, second = pair
    matches = tuple(_match(one, other) for one, other in zip(texts[first], texts[second], strict=True))
    return Loss(roles[first].name, roles[second].name, comparison, matches)


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
