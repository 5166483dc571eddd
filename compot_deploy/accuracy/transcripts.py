"""What speech models write down, side by side: transcripts of every recording by every model, and their word errors."""

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
from compot_deploy.models.listening import Listener
from compot_deploy.models.tasks import Batch, Utterance

if TYPE_CHECKING:
    from compot_deploy.accuracy.evaluate import Evaluation


@runtime_checkable
class SpeechRunner(Protocol):
    """A model that hears and writes."""

    @property
    def name(self) -> str:
        """What is run and how, for reports."""
        ...

    def outputs(self, batch: Batch) -> Tensor:
        """Logits of a batch whose transcripts are given, float32 on the CPU, padding included."""
        ...

    def transcribe(self, utterance: Utterance, listener: Listener) -> tuple[int, ...]:
        """The transcript that it writes itself, greedily, through its cache: without beginning and end."""
        ...


def written(advance: Advance[State], utterance: Utterance, listener: Listener) -> tuple[int, ...]:
    """Greedy tokens behind the beginning of a transcript, up to its end.

    Args:
        advance: one call into the decoder, which has heard the utterance.
        utterance: whose beginning is given.
        listener: of the model.
    """
    beginning = utterance.tokens[: utterance.given].tolist()
    tokens = continued(advance, beginning, listener.chooser())
    room = listener.longest - len(beginning)
    return tuple(itertools.takewhile(lambda token: token not in listener.end, itertools.islice(tokens, room)))


def transcripts_of(runner: object, evaluation: Evaluation) -> list[tuple[int, ...]]:
    """The transcript of every recording by one model."""
    listener = evaluation.listener
    assert isinstance(runner, SpeechRunner) and listener is not None
    return [runner.transcribe(utterance, listener) for utterance in evaluation.text.utterances]


def with_words(
    loss: Loss, one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]], evaluation: Evaluation
) -> Loss:
    """A loss with what its two models wrote: greedy matches, and word errors against each other and what was said.

    Args:
        loss: of teacher forcing.
        one: transcripts of its reference.
        other: of its candidate.
        evaluation: recordings, and the tokenizer's way back.
    """
    first, second = ([evaluation.decode(tokens) for tokens in tokens_of] for tokens_of in (one, other))
    matches = tuple(
        GreedyMatch(common_prefix(a, b), max(len(a), len(b)), a == b) for a, b in zip(one, other, strict=True)
    )
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
    """What every model wrote, recording by recording."""
    decode: Callable[[Sequence[int]], str] = evaluation.decode

    def of(role: str, number: int) -> str | None:
        return decode(texts[role][number]).strip() if role in texts else None

    return tuple(
        Continuation(
            prompt=_called(recording),
            reference=of("reference", number),
            compressed=of("compressed", number) or "",
            exact=of("exact", number) or "",
            exported=of("exported", number) or "",
            factorized=of("factorized", number),
        )
        for number, recording in enumerate(evaluation.text.recordings)
    )


def _called(recording: Recording) -> str:
    return recording.name if recording.reference is None else f"{recording.name}: {recording.reference}"
