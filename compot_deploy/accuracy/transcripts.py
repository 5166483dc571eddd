"""What models of two towers write of every recording or text, side by side; of speech, their word errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from compot_deploy.accuracy.losses import GreedyMatch, Loss
from compot_deploy.accuracy.metrics import common_prefix
from compot_deploy.accuracy.outcome import Continuation
from compot_deploy.accuracy.runner import Advance, State, continued
from compot_deploy.accuracy.words import error_rate, word_errors
from compot_deploy.models.audio import Recording
from compot_deploy.models.tasks import Batch, Utterance
from compot_deploy.models.writing import Writer

if TYPE_CHECKING:
    from compot_deploy.accuracy.evaluate import Evaluation


@runtime_checkable
class TowersRunner(Protocol):
    """A model whose encoder reads and whose decoder writes."""

    @property
    def name(self) -> str:
        """What is run and how, for reports."""
        ...

    def outputs(self, batch: Batch) -> Tensor:
        """Logits of a batch in which it is given what is written, float32 on the CPU, padding included."""
        ...

    def write(self, utterance: Utterance, writer: Writer) -> tuple[int, ...]:
        """The text that it writes itself, greedily, through its cache: without beginning and end."""
        ...


def written(advance: Advance[State], utterance: Utterance, writer: Writer) -> tuple[int, ...]:
    """Greedy tokens behind the beginning of a text, up to its end.

    Args:
        advance: one call into the decoder, whose encoder has read the utterance.
        utterance: whose beginning is given.
        writer: of the model.
    """
    beginning = utterance.tokens[: utterance.given].tolist()
    tokens = continued(advance, beginning, writer.chooser())
    room = writer.longest - len(beginning)
    return tuple(itertools.takewhile(lambda token: token not in writer.end, itertools.islice(tokens, room)))


def transcripts_of(runner: object, evaluation: Evaluation) -> list[tuple[int, ...]]:
    """What one model writes of every recording or text."""
    writer = evaluation.writer
    assert isinstance(runner, TowersRunner) and writer is not None
    return [runner.write(utterance, writer) for utterance in evaluation.text.utterances]


def with_words(
    loss: Loss, one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]], evaluation: Evaluation
) -> Loss:
    """A loss with what its two models wrote: greedy matches; of speech, word errors beside.

    Args:
        loss: of teacher forcing.
        one: transcripts of its reference.
        other: of its candidate.
        evaluation: recordings, and the tokenizer's way back.
    """
    matches = tuple(
        GreedyMatch(common_prefix(a, b), max(len(a), len(b)), a == b) for a, b in zip(one, other, strict=True)
    )
    if not evaluation.text.recordings:
        return replace(loss, greedy=matches)
    first, second = ([evaluation.decode(tokens) for tokens in tokens_of] for tokens_of in (one, other))
    said = [recording.reference for recording in evaluation.text.recordings]
    known = [number for number, text in enumerate(said) if text is not None]
    figures = replace(
        loss.comparison,
        word_errors=error_rate([word_errors(a, b) for a, b in zip(first, second, strict=True)]),
        reference_word_errors=error_rate([word_errors(said[n] or "", first[n]) for n in known])
        if known
        else None,
        candidate_word_errors=error_rate([word_errors(said[n] or "", second[n]) for n in known])
        if known
        else None,
    )
    return replace(loss, comparison=figures, greedy=matches)


def transcripts_beside(
    evaluation: Evaluation, texts: Mapping[str, Sequence[tuple[int, ...]]]
) -> tuple[Continuation, ...]:
    """What every model wrote, recording by recording or text by text."""
    decode: Callable[[Sequence[int]], str] = evaluation.decode
    prompts = [_called(recording) for recording in evaluation.text.recordings] or [
        decode(utterance.features.tolist()) for utterance in evaluation.text.utterances
    ]

    def of(role: str, number: int) -> str | None:
        return decode(texts[role][number]).strip() if role in texts else None

    return tuple(
        Continuation(
            prompt=prompt,
            reference=of("reference", number),
            compressed=of("compressed", number) or "",
            exact=of("exact", number) or "",
            exported=of("exported", number) or "",
            factorized=of("factorized", number),
        )
        for number, prompt in enumerate(prompts)
    )


def _called(recording: Recording) -> str:
    return recording.name if recording.reference is None else f"{recording.name}: {recording.reference}"
