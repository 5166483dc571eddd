"""What goes into a model and what comes out: chosen by its configuration, asked by everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from compot_deploy.models.hints import ARCHITECTURES

TaskKind: TypeAlias = Literal["generation", "masked", "classification", "token-classification", "embedding"]

_LOGITS_AT_ONCE: Final = 2**19
"""Logits that are compared at a time: a few megabytes in float64."""

TOKENS_PER_BATCH: Final = 1024


@dataclass(frozen=True)
class Batch:
    """Some texts, as a model's forward pass takes them.

    Attributes:
        arguments: by name.
        real: which tokens are text and which are padding.
    """

    arguments: Mapping[str, Tensor]
    real: Bool[Tensor, "texts tokens"]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch({name: value.to(device) for name, value in self.arguments.items()}, self.real.to(device))


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
    def classifies(self) -> bool:
        """Whether its outputs are distributions: over tokens or over classes."""
        return self.kind != "embedding"

    @property
    def pools(self) -> bool:
        """Whether one output belongs to a whole text."""
        return self.kind in ("classification", "embedding")

    def batches(self, windows: Sequence[Tensor]) -> list[Batch]:
        """Windows of tokens, padded on the right where their lengths differ.

        A model that generates gets no attention mask: no token sees the padding behind it. One that classifies texts
        and has no token for padding reads them one by one.
        """
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
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.padding or 0)
        lengths = torch.tensor([len(row) for row in rows])
        real = torch.arange(ids.shape[1])[None] < lengths[:, None]
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
        rows = max(1, _LOGITS_AT_ONCE // original.shape[-1])
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

_BY_SUFFIX: Final[Mapping[str, Task]] = {
    "ForCausalLM": GENERATION,
    "LMHeadModel": GENERATION,
    "ForMaskedLM": Task("masked", "AutoModelForMaskedLM", "masked language model"),
    "ForSequenceClassification": Task("classification", "AutoModelForSequenceClassification", "classifier"),
    "ForTokenClassification": Task(
        "token-classification", "AutoModelForTokenClassification", "token classifier"
    ),
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
