"""What an evaluation finds: all losses, the texts side by side, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass

from compot_deploy.accuracy.gate import GateResult
from compot_deploy.accuracy.losses import Loss


@dataclass(frozen=True)
class Continuation:
    """A prompt and what each model makes of it, up to the end-of-text token.

    Attributes:
        prompt: decoded.
        reference: None where there is no reference.
        compressed: torch with dequantized weights.
        exact: the float32 reference of the file.
        exported: the file as deployed.
        factorized: the factors before quantization; None where they were not measured.
    """

    prompt: str
    reference: str | None
    compressed: str
    exact: str
    exported: str
    factorized: str | None = None


@dataclass(frozen=True)
class EvaluationMetadata:
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
        export_reference: compressed → the float32 reference of the file, the runtime's approximations off.
        export_deployed: compressed → the file as deployed.
        total: reference → the file as deployed; None without a reference.
        noise: a torch model against itself, reading token by token instead of many at once, which adds the
            same numbers up in another order: figures of this size are arithmetic, not loss.
        reference_absent: why there is no reference; None where there is one.
        continuations: the texts side by side.
        gate: the verdict.
        factorization: reference → factors before quantization; None where those were not measured.
        quantization: factors before quantization → compressed, before healing where that was done; None where those
            were not measured.
        split_absent: why the method loss is not split; None where it is.
        unhealed: reference → compressed as it was before healing; None where nothing was healed.
    """

    metrics_version: int
    evaluation: EvaluationMetadata
    method: Loss | None
    export_reference: Loss
    export_deployed: Loss
    total: Loss | None
    noise: Loss
    reference_absent: str | None
    continuations: tuple[Continuation, ...]
    gate: GateResult
    factorization: Loss | None = None
    quantization: Loss | None = None
    split_absent: str | None = None
    unhealed: Loss | None = None
