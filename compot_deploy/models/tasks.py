"""What goes into a model and what comes out: chosen by its configuration, asked by everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from compot_deploy.core.memory import COMPARED_AT_ONCE
from compot_deploy.models.hints import ARCHITECTURES

TaskKind: TypeAlias = Literal[
    "generation", "masked", "classification", "token-classification", "embedding", "speech", "text-to-text"
]

TOKENS_PER_BATCH: Final = 1024

UTTERANCES_PER_BATCH: Final = 4
"""An encoder makes some 1500 vectors of one."""


@dataclass(frozen=True)
class Utterance:
    """What an encoder reads, and what a decoder writes of it: it is cut and measured like a window of tokens.

    Attributes:
        tokens: shape (tokens,), int64: what a decoder is given to begin with, then what it writes.
        features: what the encoder reads, without a batch: (bands, frames) or (samples,) of sound, (tokens,) of text.
        given: how many tokens stand in front of what is written.
        argument: of the model's forward pass that takes the features.
    """

    tokens: Int64[Tensor, " tokens"]
    features: Float[Tensor, "..."] | Int64[Tensor, " source"]  # noqa: UP037
    given: int
    argument: str

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Utterance:
        """The same sound or text with a part of its tokens."""
        return replace(self, tokens=self.tokens[part])


Window: TypeAlias = Tensor | Utterance
"""What a model reads at once: token ids, or what an encoder reads and the token ids that go with it."""


@dataclass(frozen=True)
class Batch:
    """Some texts, as a model's forward pass takes them.

    Attributes:
        arguments: by name.
        real: which tokens are text and which are padding; of two towers, of the decoder's.
        judged: at which of them outputs are compared; None compares at all: see `compared`.
        heard: which of the encoder's tokens are text; None where it reads no tokens.
    """

    arguments: Mapping[str, Tensor]
    real: Bool[Tensor, "texts tokens"]
    judged: Bool[Tensor, "texts tokens"] | None = None
    heard: Bool[Tensor, "texts source"] | None = None

    @property
    def ids(self) -> Int64[Tensor, " rows"]:
        """What is looked up in the token table, by whichever tower."""
        names = [name for name in ("input_ids", "decoder_input_ids") if name in self.arguments]
        return torch.cat([self.arguments[name].flatten() for name in names])

    @property
    def masks(self) -> tuple[Bool[Tensor, "texts _"], ...]:
        """What tells text from padding, of each tower: no two have as many elements."""
        return (self.real,) if self.heard is None else (self.real, self.heard)

    @property
    def compared(self) -> Bool[Tensor, "texts tokens"]:
        """The tokens at which outputs are compared."""
        return self.real if self.judged is None else self.judged

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            {name: value.to(device) for name, value in self.arguments.items()},
            self.real.to(device),
            None if self.judged is None else self.judged.to(device),
            None if self.heard is None else self.heard.to(device),
        )


@dataclass(frozen=True)
class Task:
    """A kind of model.

    Attributes:
        kind: what it is for.
        auto_class: the class of transformers that loads it.
        noun: what it is called in sentences.
        padding: token that fills up short texts, where the configuration has one: decoders that classify look for
            it to find the end of a text.
    """

    kind: TaskKind
    auto_class: str
    noun: str
    padding: int | None = None

    @property
    def unit(self) -> str:
        """Of its loss."""
        if self.kind == "embedding":
            return "of one minus the cosine"
        return "nats per text" if self.kind == "classification" else "nats per token"

    @property
    def generates(self) -> bool:
        """Whether it writes text token by token, each seeing only what stands before it."""
        return self.kind == "generation"

    @property
    def listens(self) -> bool:
        """Whether it writes down what is said: an encoder reads sound, a decoder writes."""
        return self.kind == "speech"

    @property
    def has_towers(self) -> bool:
        """Whether an encoder reads, sound or text, and a decoder writes what it makes of it."""
        return self.kind in ("speech", "text-to-text")

    @property
    def classifies(self) -> bool:
        """Whether its outputs are distributions: over tokens or over classes."""
        return self.kind != "embedding"

    @property
    def pools(self) -> bool:
        """Whether one output belongs to a whole text."""
        return self.kind in ("classification", "embedding")

    def batches(self, windows: Sequence[Window]) -> list[Batch]:
        """Windows of tokens, padded on the right where their lengths differ; of sound, those together that are as long.

        A model that generates gets no attention mask: no token sees the padding behind it. One that classifies texts
        and has no token for padding reads them one by one.
        """
        if self.has_towers:
            return _heard(cast(Sequence[Utterance], windows), self.padding or 0)
        return self._read(cast(Sequence[Tensor], windows))

    def _read(self, windows: Sequence[Tensor]) -> list[Batch]:
        found: list[Batch] = []
        rows: list[Tensor] = []
        alone = self.kind == "classification" and self.padding is None
        for window in windows:
            longest = max([len(window), *(len(row) for row in rows)])
            if rows and (alone or longest * (len(rows) + 1) > TOKENS_PER_BATCH):
                found.append(self._batch(rows))
                rows = []
            rows.append(window)
        return [*found, self._batch(rows)] if rows else found

    def _batch(self, rows: Sequence[Tensor]) -> Batch:
        ids, real = _padded(rows, self.padding or 0)
        arguments = {"input_ids": ids}
        if not self.generates:
            arguments["attention_mask"] = real.long()
        return Batch(arguments, real)

    def output(self, result: Any) -> Tensor:
        """Logits, or hidden states where the model has no head."""
        logits = getattr(result, "logits", None)
        found = result.last_hidden_state if logits is None else logits
        assert isinstance(found, Tensor)
        return found

    def loss(self, original: Tensor, changed: Tensor, real: Bool[Tensor, "texts tokens"]) -> LossSum:
        """How far outputs have moved: KL divergence in nats, or one minus the cosine of pooled embeddings.

        Args:
            original: outputs of the original model for a batch.
            changed: outputs of another for the same batch.
            real: which tokens are text.
        """
        if self.kind == "embedding":
            cosine = nn.functional.cosine_similarity(pooled(original, real), pooled(changed, real), dim=-1)
            return LossSum(float((1 - cosine).sum()), len(cosine))
        if self.kind != "classification":
            original, changed = original[real], changed[real]
        lost = 0.0
        rows = max(1, COMPARED_AT_ONCE // original.shape[-1])
        for one, other in zip(original.split(rows), changed.split(rows), strict=True):
            first, second = (torch.log_softmax(logits.double(), -1) for logits in (one, other))
            lost += float((first.exp() * (first - second)).sum())
        return LossSum(lost, len(original))

    def sampled(
        self, output: Tensor, real: Bool[Tensor, "texts tokens"], generator: torch.Generator
    ) -> Tensor:
        """A random scalar of an output whose gradient tells what small changes cost.

        With labels drawn from the model's own distribution, the mean square of the change of their log-likelihood is
        twice the KL divergence, to second order (the Fisher information). Of embeddings the scalar is a random
        direction across the vector, of which the same is true for one minus the cosine.

        Args:
            output: of the original model for a batch, with what gradients need.
            real: which tokens are text.
            generator: draws.
        """
        if self.kind == "embedding":
            vectors = pooled(output, real)
            fixed = vectors.detach()
            drawn = torch.randn(fixed.shape, generator=generator, dtype=fixed.dtype).to(fixed.device)
            size = fixed.norm(dim=-1, keepdim=True)
            along = (drawn * fixed).sum(-1, keepdim=True) / size**2
            return ((drawn - along * fixed) / size * vectors).sum()
        if self.kind != "classification":
            output = output[real]
        logs = torch.log_softmax(output.float(), -1)
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
        return logs.gather(-1, labels.to(logs.device)).sum()


def _padded(rows: Sequence[Tensor], padding: int) -> tuple[Tensor, Bool[Tensor, "texts tokens"]]:
    """Rows of ids side by side, and which of them are real."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def _heard(utterances: Sequence[Utterance], padding: int) -> list[Batch]:
    """Sound of one length together, texts as many as there is room for."""
    found: list[Batch] = []
    rows: list[Utterance] = []
    for utterance in utterances:
        if rows and not _has_room(rows, utterance):
            found.append(_towers(rows, padding))
            rows = []
        rows.append(utterance)
    return [*found, _towers(rows, padding)] if rows else found


def _has_room(rows: Sequence[Utterance], one: Utterance) -> bool:
    if one.features.is_floating_point():
        return len(rows) < UTTERANCES_PER_BATCH and rows[0].features.shape == one.features.shape
    longest = max(max(len(row.features), len(row)) for row in (*rows, one))
    return longest * (len(rows) + 1) <= TOKENS_PER_BATCH


def _towers(rows: Sequence[Utterance], padding: int) -> Batch:
    """What both towers read; what a decoder is given to begin with is not judged."""
    first = rows[0]
    tokens, heard = [row.tokens for row in rows], None
    if first.features.is_floating_point():
        arguments = {first.argument: torch.stack([row.features for row in rows])}
    else:
        source, heard = _padded([row.features for row in rows], padding)
        arguments = {first.argument: source, "attention_mask": heard.long()}
    ids, real = _padded(tokens, padding)
    if heard is not None and heard.shape == real.shape:  # rows of both are told apart by how many there are
        ids, real = (
            nn.functional.pad(value, (0, 1), value=fill) for value, fill in ((ids, padding), (real, 0))
        )
    given = torch.tensor([row.given for row in rows])
    judged = real & (torch.arange(ids.shape[1])[None] >= given[:, None] - 1)
    return Batch({**arguments, "decoder_input_ids": ids}, real, judged, heard)


@dataclass(frozen=True)
class LossSum:
    """A sum over positions or texts, and over how many."""

    total: float
    count: int

    def __add__(self, other: LossSum) -> LossSum:
        """Of both."""
        return LossSum(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """Never below 0: what is less is rounding."""
        return max(0.0, self.total / self.count) if self.count else 0.0


def pooled(
    vectors: Float[Tensor, "texts tokens width"], real: Bool[Tensor, "texts tokens"]
) -> Float[Tensor, "texts width"]:
    """Mean over the tokens of each text, float64: how most sentence encoders pool."""
    weights = real[..., None].double()
    # Not multiplied: what stands at a padded token may be NaN.
    return vectors.double().masked_fill(weights == 0, 0.0).sum(1) / weights.sum(1)


GENERATION: Final = Task("generation", "AutoModelForCausalLM", "decoder")
EMBEDDING: Final = Task("embedding", "AutoModel", "encoder")
SPEECH: Final = Task("speech", "AutoModelForSpeechSeq2Seq", "speech model")
TEXT_TO_TEXT: Final = Task("text-to-text", "AutoModelForSeq2SeqLM", "text-to-text model")

_BY_SUFFIX: Final[Mapping[str, Task]] = {
    "ForCausalLM": GENERATION,
    "LMHeadModel": GENERATION,
    "ForMaskedLM": Task("masked", "AutoModelForMaskedLM", "masked language model"),
    "ForSequenceClassification": Task("classification", "AutoModelForSequenceClassification", "classifier"),
    "ForTokenClassification": Task(
        "token-classification", "AutoModelForTokenClassification", "token classifier"
    ),
    "WhisperForConditionalGeneration": SPEECH,
    "MoonshineForConditionalGeneration": SPEECH,
    "T5ForConditionalGeneration": TEXT_TO_TEXT,
    "BartForConditionalGeneration": TEXT_TO_TEXT,
    "PegasusForConditionalGeneration": TEXT_TO_TEXT,
    "M2M100ForConditionalGeneration": TEXT_TO_TEXT,
    "MarianMTModel": TEXT_TO_TEXT,
}
"""Ends of class names, as config.json lists them under ``architectures``."""


def task_of(config: Mapping[str, Any]) -> Task | None:
    """The task of a configuration; None where the class that it names has a head that is not known here.

    Decoders with a native graph keep their head where no class is named.
    """
    classes = config.get("architectures") or ()
    name = str(classes[0]) if isinstance(classes, Sequence) and classes else ""
    known = [task for suffix, task in _BY_SUFFIX.items() if name.endswith(suffix)]
    if not name and config.get("model_type") in ARCHITECTURES:
        known = [GENERATION]
    if not known and ("For" in name or name.endswith("DoubleHeadsModel")):
        return None
    task, padding = (*known, EMBEDDING)[0], config.get("pad_token_id")
    return replace(task, padding=padding) if isinstance(padding, int) and padding >= 0 else task
