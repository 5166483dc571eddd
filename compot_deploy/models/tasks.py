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
    "generation", "masked", "classification", "token-classification", "embedding", "speech"
]

TOKENS_PER_BATCH: Final = 1024

UTTERANCES_PER_BATCH: Final = 4
"""An encoder makes some 1500 vectors of one."""


@dataclass(frozen=True)
class Utterance:
    """What a speech model hears, and what it writes: it is cut and measured like a window of tokens.

    Attributes:
        tokens: shape (tokens,), int64: what a decoder is given to begin with, then the transcript.
        features: what the encoder reads, without a batch: (bands, frames) or (samples,).
        given: how many tokens stand in front of the transcript.
        argument: of the model's forward pass that takes the features.
    """

    tokens: Int64[Tensor, " tokens"]
    features: Float[Tensor, "..."]  # noqa: UP037
    given: int
    argument: str

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Utterance:
        """The same sound with a part of its tokens."""
        return replace(self, tokens=self.tokens[part])


Window: TypeAlias = Tensor | Utterance
"""What a model reads at once: token ids, or sound and the token ids that go with it."""


@dataclass(frozen=True)
class Batch:
    """Some texts, as a model's forward pass takes them.

    Attributes:
        arguments: by name.
        real: which tokens are text and which are padding.
        judged: at which of them outputs are compared; None compares at all: see `compared`.
    """

    arguments: Mapping[str, Tensor]
    real: Bool[Tensor, "texts tokens"]
    judged: Bool[Tensor, "texts tokens"] | None = None

    @property
    def ids(self) -> Tensor:
        """What is looked up in the token table."""
        return self.arguments["decoder_input_ids" if "decoder_input_ids" in self.arguments else "input_ids"]

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
    def classifies(self) -> bool:
        """Whether its outputs are distributions: over tokens or over classes."""
        return self.kind != "embedding"

    @property
    def pools(self) -> bool:
        """Whether one output belongs to a whole text."""
        return self.kind in ("classification", "embedding")

    def batches(self, windows: Sequence[Window]) -> list[Batch]:
        """Windows of tokens, padded on the right where their lengths differ; utterances together that are as long.

        A model that generates gets no attention mask: no token sees the padding behind it. One that classifies texts
        and has no token for padding reads them one by one.
        """
        if self.listens:
            return _heard(cast(Sequence[Utterance], windows))
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


def _heard(utterances: Sequence[Utterance]) -> list[Batch]:
    """Utterances of one length of sound together; what a decoder is given is read and not judged."""
    found: list[Batch] = []
    rows: list[Utterance] = []

    def close() -> None:
        if rows:
            ids, real = _padded([row.tokens for row in rows], 0)
            given = torch.tensor([row.given for row in rows])
            judged = real & (torch.arange(ids.shape[1])[None] >= given[:, None] - 1)
            features = torch.stack([row.features for row in rows])
            found.append(Batch({rows[0].argument: features, "decoder_input_ids": ids}, real, judged))
            rows.clear()

    for utterance in utterances:
        if len(rows) == UTTERANCES_PER_BATCH or (rows and rows[0].features.shape != utterance.features.shape):
            close()
        rows.append(utterance)
    close()
    return found


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
