"""Is the exported model still the model? Three losses, a noise floor, and a gate that says yes or no.

Up to four models read the same tokens in lockstep:

    reference    the original weights in torch                             ┐ method loss
    compressed   the compressed weights, dequantized, in torch     ┐       ┘
    exact        the exported file, the runtime computing exactly  ┘ export loss (exact)
    exported     the exported file as it ships                       compressed → exported: export loss (shipped)
                                                                     reference → exported: total loss

The *method* loss is what compression costs; the *export* loss is what the file and the runtime add, which at
exact settings must be rounding and nothing more; the *total* is what a user notices. One number cannot stand
for another: a good total can hide a wrong export behind a generous gate, and a bad export must not be blamed
on the method.

Where the factors existed before they were quantized, a fifth model, *factorized*, reads along and splits the
method loss in two: reference → factorized is what factorisation costs, factorized → compressed what
quantization does.

Every window of the evaluation text is read from its start with an empty cache. Position t predicts token
t + 1: the first token of a window is never scored, and the last position predicts nothing. Logits exist for a
few positions at a time; what is kept is 49 bytes per position and pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.metrics import (
    METRICS_VERSION,
    Comparison,
    Estimate,
    Positions,
    common_prefix,
    compare,
    concatenate,
    predict,
    summarize,
)
from compot_deploy.accuracy.runners import Runner
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.progress import Progress, silent

LOGITS_AT_ONCE: Final = 2**24
"""Logits of one runner held at a time, 64 MiB in float32: bounds the chunk, whatever the vocabulary."""

ROWS_AT_ONCE: Final = 2**21
"""Logits that are compared at a time: each takes about 100 bytes in float64 while four models are compared."""

NOISE_WINDOWS: Final = 4
NOISE_TOKENS: Final = 32
"""The noise floor is measured on the first tokens of the first windows: read one at a time, they cost as much as
generating so many tokens."""


@dataclass(frozen=True)
class Evaluation:
    """What the models are judged on.

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


@dataclass(frozen=True)
class Gate:
    """Limits that a model must keep to be shipped. Those on the total loss are off unless they are set.

    Attributes:
        max_perplexity_ratio: total: candidate over reference perplexity; 1.05 allows 5 % more.
        max_kl: total: mean KL divergence in nats per token.
        min_top1: total: fraction of positions with the same most likely token or class.
        min_cosine: total: mean cosine between embeddings.
        max_export_nmse: NMSE of compressed → exact. Always on: a faithful export adds rounding, about 1e-12,
            and the first wrong scale, permutation or mask adds far more than 1e-4.
    """

    max_perplexity_ratio: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None
    max_export_nmse: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("max_perplexity_ratio", "max_kl", "max_export_nmse"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise RecipeError(f"{name} = {limit}: a limit is a number that is not negative.")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise RecipeError(f"min_top1 = {self.min_top1}: give a fraction between 0 and 1.")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise RecipeError(f"min_cosine = {self.min_cosine}: give a number between -1 and 1.")

    @property
    def needs_reference(self) -> bool:
        """Whether a limit on the total loss is set."""
        limits = (self.max_perplexity_ratio, self.max_kl, self.min_top1, self.min_cosine)
        return any(limit is not None for limit in limits)


@dataclass(frozen=True)
class Criterion:
    """One condition of the gate and how it went.

    Attributes:
        name: ``max_kl`` and so on, as in `Gate`; ``nonfinite_logits``.
        value: measured; NaN where nothing could be measured, which fails.
        threshold: the limit.
        relation: what the value must be to the threshold.
        passed: whether it is.
        sentence: the same in words.
    """

    name: str
    value: float
    threshold: float
    relation: Literal["at most", "at least"]
    passed: bool
    sentence: str


@dataclass(frozen=True)
class GateResult:
    """All criteria, in a fixed order, and the verdict: passed when every one of them is."""

    criteria: tuple[Criterion, ...]
    passed: bool


@dataclass(frozen=True)
class GreedyMatch:
    """How long two models continue a prompt with the same tokens.

    Attributes:
        common_prefix: tokens from the start that are the same.
        length: tokens of the longer continuation; end-of-text included, what follows it not.
        equal: the continuations are the same to the end.
    """

    common_prefix: int
    length: int
    equal: bool


@dataclass(frozen=True)
class Loss:
    """One model against another.

    Attributes:
        reference: name of the runner that is taken as right.
        candidate: name of the runner that is judged.
        comparison: figures over the evaluation text.
        greedy: one entry per prompt.
    """

    reference: str
    candidate: str
    comparison: Comparison
    greedy: tuple[GreedyMatch, ...]


@dataclass(frozen=True)
class Continuation:
    """A prompt and what each model makes of it, up to the end-of-text token.

    Attributes:
        prompt: decoded.
        reference: None where there is no reference.
        compressed: torch with dequantized weights.
        exact: the file, computed exactly.
        exported: the file as it ships.
        factorized: the factors before quantization; None where they were not measured.
    """

    prompt: str
    reference: str | None
    compressed: str
    exact: str
    exported: str
    factorized: str | None = None


@dataclass(frozen=True)
class EvaluationFacts:
    """What the figures were measured on.

    Attributes:
        source: where the text comes from.
        digest: sha256 of the token ids: figures with different digests do not compare.
        windows: number of windows.
        tokens: tokens in them.
        positions: predicted positions.
        prompts: continued prompts.
        new_tokens: tokens of each continuation.
        notes: anything remarkable about the text.
    """

    source: str
    digest: str
    windows: int
    tokens: int
    positions: int
    prompts: int
    new_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AccuracyReport:
    """The result of `check`.

    Attributes:
        metrics_version: of `compot_deploy.accuracy.metrics`.
        evaluation: what was read.
        method: reference → compressed; None without a reference.
        export_exact: compressed → the file, computed exactly.
        export_shipped: compressed → the file as it ships.
        total: reference → the file as it ships; None without a reference.
        noise: a torch model against itself, reading token by token instead of many at once, which adds the
            same numbers up in another order: figures of this size are arithmetic, not loss.
        reference_absent: why there is no reference; None where there is one.
        continuations: the texts side by side.
        gate: the verdict.
        factorization: reference → factors before quantization; None where those were not measured.
        quantization: factors before quantization → compressed; None where those were not measured.
        split_absent: why the method loss is not split; None where it is.
    """

    metrics_version: int
    evaluation: EvaluationFacts
    method: Loss | None
    export_exact: Loss
    export_shipped: Loss
    total: Loss | None
    noise: Loss
    reference_absent: str | None
    continuations: tuple[Continuation, ...]
    gate: GateResult
    factorization: Loss | None = None
    quantization: Loss | None = None
    split_absent: str | None = None


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
    """Measure method, export and total loss and judge them.

    Args:
        reference: the original model; None leaves the method and total loss out.
        compressed: the dequantized model in torch.
        exported: the file as it ships.
        exported_exact: the file with the runtime's approximations off. A runtime that has none is given twice,
            the same object, and runs once.
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
    if reference is None and gate.needs_reference:
        raise InputError(
            "The gate limits the total loss (--max-perplexity-ratio, --max-kl, --min-top1 or --min-cosine), which "
            f"needs the original model, and {reference_absent}. Give it with --reference."
        )
    roles: dict[str, Runner] = {} if reference is None else {"reference": reference}
    if reference is None:
        factorized, factorized_absent = None, reference_absent
    if factorized is not None:
        roles["factorized"] = factorized
    roles |= {"compressed": compressed, "exact": exported_exact, "exported": exported}
    distinct = {id(runner): runner for runner in roles.values()}
    _check_fit(list(distinct.values()), evaluation)

    batches = _batches(evaluation.text.windows, evaluation.batch)
    noise_batches = _batches(evaluation.text.windows[:NOISE_WINDOWS], evaluation.batch) or batches[:1]
    tick = _Ticker(len(batches) + len(noise_batches) + len(evaluation.prompts) * len(distinct), progress)
    pairs = [("compressed", "exact"), ("compressed", "exported")]
    if reference is not None:
        pairs += [("reference", "compressed"), ("reference", "exported")]
    if factorized is not None:
        pairs += [("reference", "factorized"), ("factorized", "compressed")]
    comparisons = _read_in_lockstep(roles, pairs, batches, tick)
    noise = _noise_floor(reference or compressed, noise_batches, tick)
    texts = _continue_prompts(roles, evaluation, tick)

    def loss(first: str, second: str) -> Loss:
        return Loss(
            roles[first].name,
            roles[second].name,
            comparisons[first, second],
            tuple(_match(a, b) for a, b in zip(texts[first], texts[second], strict=True)),
        )

    method = total = factorization = quantization = None
    if reference is not None:
        method, total = loss("reference", "compressed"), loss("reference", "exported")
    if factorized is not None:
        factorization, quantization = loss("reference", "factorized"), loss("factorized", "compressed")
    export_exact, export_shipped = loss("compressed", "exact"), loss("compressed", "exported")
    return AccuracyReport(
        metrics_version=METRICS_VERSION,
        evaluation=facts_of(evaluation),
        method=method,
        export_exact=export_exact,
        export_shipped=export_shipped,
        total=total,
        noise=noise,
        reference_absent=reference_absent if reference is None else None,
        continuations=_continuations(evaluation, texts),
        gate=judge(gate, export_exact, export_shipped, method, total),
        factorization=factorization,
        quantization=quantization,
        split_absent=factorized_absent if factorized is None else None,
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
    batches = _batches(evaluation.text.windows, evaluation.batch)
    tick = _Ticker(len(batches) + 2 * len(evaluation.prompts), progress)
    comparisons = _read_in_lockstep(roles, [("reference", "candidate")], batches, tick)
    texts = _continue_prompts(roles, evaluation, tick)
    matches = tuple(_match(a, b) for a, b in zip(texts["reference"], texts["candidate"], strict=True))
    return Loss(reference.name, candidate.name, comparisons["reference", "candidate"], matches)


def judge(
    gate: Gate, export_exact: Loss, export_shipped: Loss, method: Loss | None, total: Loss | None
) -> GateResult:
    """Compare measured losses with the limits. Widening a limit never turns a pass into a failure.

    Raises:
        InputError: a limit on the total loss is set, but there is no total loss.
    """
    bad = sum(loss.comparison.nonfinite_candidate for loss in (export_exact, export_shipped))
    bad += export_exact.comparison.nonfinite_reference
    bad += 0 if method is None else method.comparison.nonfinite_reference
    criteria = [
        criterion(
            "nonfinite_logits", float(bad), 0.0, "at most", "logits of any model that are NaN or infinite"
        ),
        criterion(
            "max_export_nmse",
            export_exact.comparison.nmse,
            gate.max_export_nmse,
            "at most",
            "NMSE that the file adds, computed exactly",
        ),
    ]
    if gate.needs_reference:
        if total is None:
            raise InputError("Limits on the total loss need the original model. Give it with --reference.")
        criteria += [
            criterion(limit.name, limit.value, limit.threshold, limit.relation, limit.what)
            for limit in _limits(gate, total.comparison)
        ]
    return GateResult(tuple(criteria), all(one.passed for one in criteria))


@dataclass(frozen=True)
class _Limit:
    """A limit on the total loss, and the figure that it is held against."""

    name: str
    value: float
    threshold: float
    relation: Literal["at most", "at least"]
    what: str


def _limits(gate: Gate, figures: Comparison) -> Iterator[_Limit]:
    """Limits that are set. A figure that was not measured is NaN, which no limit lets pass."""

    def value(estimate: Estimate | None) -> float:
        return math.nan if estimate is None else estimate.value

    if gate.max_perplexity_ratio is not None:
        ratio = value(figures.perplexity_ratio)
        yield _Limit(
            "max_perplexity_ratio",
            ratio,
            gate.max_perplexity_ratio,
            "at most",
            "perplexity over the original's",
        )
    if gate.max_kl is not None:
        mean = value(None if figures.divergence is None else figures.divergence.mean)
        yield _Limit("max_kl", mean, gate.max_kl, "at most", "mean KL divergence from the original in nats")
    if gate.min_top1 is not None:
        same = value(figures.top1_agreement)
        what = "share of positions with the original's most likely token"
        yield _Limit("min_top1", same, gate.min_top1, "at least", what)
    if gate.min_cosine is not None:
        cosine = value(figures.cosine)
        yield _Limit(
            "min_cosine", cosine, gate.min_cosine, "at least", "mean cosine to the original's embeddings"
        )


def criterion(
    name: str, value: float, threshold: float, relation: Literal["at most", "at least"], what: str
) -> Criterion:
    """A value held against a limit. NaN, what could not be measured, fails."""
    # NaN compares as False either way.
    passed = value <= threshold if relation == "at most" else value >= threshold
    verdict = "passed" if passed else "failed"
    return Criterion(
        name,
        value,
        threshold,
        relation,
        passed,
        f"{what}: {shown(value)}, {relation} {shown(threshold)}: {verdict}",
    )


def shown(value: float) -> str:
    """A figure of the gate: counts of a thousand and more with every digit, others with four."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value.is_integer() else f"{value:.4g}"


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


def _batches(windows: Sequence[Int64[Tensor, " _"]], size: int) -> list[Int64[Tensor, "_ _"]]:
    """Neighbouring windows of one length together; windows that predict nothing are left out."""
    batches: list[Tensor] = []
    group: list[Tensor] = []
    for window in windows:
        if len(window) < 2:
            continue
        if group and (len(group) == size or len(group[0]) != len(window)):
            batches.append(torch.stack(group))
            group = []
        group.append(window)
    return [*batches, torch.stack(group)] if group else batches


def _read_in_lockstep(
    roles: Mapping[str, Runner],
    pairs: Sequence[tuple[str, str]],
    batches: Sequence[Int64[Tensor, "_ _"]],
    tick: _Ticker,
) -> dict[tuple[str, str], Comparison]:
    """Run all models over the text together and compare them pair by pair."""
    runners = {id(runner): runner for runner in roles.values()}
    parts: dict[tuple[str, str], list[Positions]] = {pair: [] for pair in pairs}
    for tokens in batches:
        chunk = _chunk(tokens, next(iter(runners.values())))
        streams = [runner.logits(tokens, chunk) for runner in runners.values()]
        for logits, targets in _scored(streams, tokens):
            predictions = dict(zip(runners, (predict(rows, targets) for rows in logits), strict=True))
            for first, second in pairs:
                one, other = predictions[id(roles[first])], predictions[id(roles[second])]
                parts[first, second].append(compare(one, other))
        tick(f"reading {len(batches)} batches of text with {len(runners)} models")
    return {pair: summarize(concatenate(part)) for pair, part in parts.items()}


def _noise_floor(runner: Runner, batches: Sequence[Int64[Tensor, "_ _"]], tick: _Ticker) -> Loss:
    """The same model twice: many tokens of several windows at once, and one token of one window at a time."""
    parts: list[Positions] = []
    for batch in batches:
        tokens = batch[:, : max(2, min(NOISE_TOKENS, _chunk(batch, runner)))]
        at_once = runner.logits(tokens, tokens.shape[1])
        singly = torch.cat([torch.cat(list(runner.logits(window[None], 1)), dim=1) for window in tokens])
        for (first, second), targets in _scored([at_once, [singly]], tokens):
            parts.append(compare(predict(first, targets), predict(second, targets)))
        tick("measuring the noise floor")
    return Loss(runner.name, f"{runner.name}, token by token", summarize(concatenate(parts)), greedy=())


def _chunk(tokens: Int64[Tensor, "batch length"], runner: Runner) -> int:
    batch, length = tokens.shape
    return max(1, min(length, LOGITS_AT_ONCE // (batch * runner.vocabulary)))


def _scored(
    streams: Sequence[Iterable[Float[Tensor, "_ _ _"]]], tokens: Int64[Tensor, "batch length"]
) -> Iterator[tuple[list[Float[Tensor, "_ _"]], Int64[Tensor, " _"]]]:
    """Logits of all streams at the same few positions, and the tokens that came next there."""
    length = tokens.shape[1]
    start = 0
    for pieces in zip(*streams, strict=True):
        positions, vocabulary = pieces[0].shape[1:]
        # What the last position of a window predicts is not known.
        kept = min(positions, length - 1 - start)
        targets = tokens[:, start + 1 : start + 1 + kept].reshape(-1)
        flat = [piece[:, :kept].reshape(-1, vocabulary) for piece in pieces]
        rows = max(1, ROWS_AT_ONCE // vocabulary)
        for first in range(0, len(targets), rows):
            yield [part[first : first + rows] for part in flat], targets[first : first + rows]
        start += positions


def _continue_prompts(
    roles: Mapping[str, Runner], evaluation: Evaluation, tick: _Ticker
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


def facts_of(evaluation: Evaluation) -> EvaluationFacts:
    """What figures were measured on."""
    lengths = [len(window) for window in evaluation.text.windows]
    return EvaluationFacts(
        source=evaluation.text.source,
        digest=evaluation.text.digest,
        windows=len(lengths),
        tokens=sum(lengths),
        positions=sum(max(0, length - 1) for length in lengths),
        prompts=len(evaluation.prompts),
        new_tokens=evaluation.new_tokens,
        notes=evaluation.text.notes,
    )


class _Ticker:
    """Counts steps for a progress callback."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, label: str) -> None:
        self._done += 1
        self._progress(self._done, self._total, label)
