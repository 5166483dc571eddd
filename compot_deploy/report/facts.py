"""What a report knows besides losses: every matrix, the frontier of a plan, and where the artifact is from.

Values only. `compot_deploy.report.manifest` reads them from a manifest; ``docs/report-schema.md`` describes
them field by field.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerFigures:
    """One matrix of the model: what was chosen for it, what that takes, what it costs.

    Attributes:
        name: module path.
        block: number of the transformer block; None for embeddings and heads.
        role: the path inside the block, ``self_attn.q_proj``; the whole path outside of blocks.
        kind: ``dense``, ``quantized`` or ``factorized``.
        choice: the scheme in words.
        inputs: m.
        outputs: n.
        bytes: in the file; a shared dictionary counts with the first matrix that uses it.
        plain_int4_bytes: as plain int4 in groups of 32.
        bits: stored bits per weight, scales and masks counted; matrices that share a dictionary have the
            figure of all of them together.
        error: relative whitened error ``‖X(W − Ŵ)‖ / ‖X W‖`` on calibration text; None where not measured.
        unquantized_error: the same of the factors before quantization; None where they never existed.
        sensitivity: what a unit of squared error of this matrix alone costs the model, in nats per token; None
            where no plan measured it.
        reason: why the matrix stays plain; empty if it does not, or if nobody asked for more.
    """

    name: str
    block: int | None
    role: str
    kind: str
    choice: str
    inputs: int
    outputs: int
    bytes: int
    plain_int4_bytes: int
    bits: float
    error: float | None = None
    unquantized_error: float | None = None
    sensitivity: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class FrontierPoint:
    """The best plan of some size.

    Attributes:
        bytes: of all linears.
        bits: per weight of the linears.
        loss: predicted, in nats per token.
    """

    bytes: int
    bits: float
    loss: float


@dataclass(frozen=True)
class Frontier:
    """What a planned run could have chosen, and what it did.

    Attributes:
        counts: whether bytes are of the ``file`` or of the loaded model, ``memory``.
        budget: bytes that the linears could take.
        weights: of all linears.
        chosen: the plan that was carried out.
        all_schemes: best plans over all schemes, by size.
        plain: best plans over plain grids alone; empty where a matrix has no plain candidate.
    """

    counts: str
    budget: int
    weights: int
    chosen: FrontierPoint
    all_schemes: tuple[FrontierPoint, ...]
    plain: tuple[FrontierPoint, ...]


@dataclass(frozen=True)
class Origin:
    """Where an artifact comes from.

    Attributes:
        source: sha256 over the original's weights and configuration.
        calibration: where the calibration text comes from.
        calibration_digest: sha256 of its token ids.
        calibration_windows: windows that were read; None where that was not recorded.
        calibration_tokens: tokens in them; None where that was not recorded.
        seed: of the run.
    """

    source: str | None = None
    calibration: str | None = None
    calibration_digest: str | None = None
    calibration_windows: int | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
