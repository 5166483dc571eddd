"""The models that an evaluation compares, and between which of them each loss is measured."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from compot_deploy.accuracy.gate import Gate, apply_gate
from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.metrics import METRICS_VERSION
from compot_deploy.accuracy.outcome import AccuracyReport, Continuation, EvaluationMetadata
from compot_deploy.errors import InputError

R = TypeVar("R")

_LOSSES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "export_reference": ("compressed", "exact"),
        "export_deployed": ("compressed", "exported"),
        "method": ("reference", "compressed"),
        "total": ("reference", "exported"),
        "factorization": ("reference", "factorized"),
        "quantization": ("factorized", "compressed"),
        "unhealed": ("reference", "unhealed"),
    }
)
_HEALED: Final = MappingProxyType({**_LOSSES, "quantization": ("factorized", "unhealed")})
"""Where the model was healed: what quantization costs is measured before."""


def roles_of(
    reference: R | None,
    factorized: R | None,
    compressed: R,
    exact: R,
    exported: R,
    unhealed: R | None = None,
) -> dict[str, R]:
    """The runners by role, in the order in which they read. Without a reference the method loss is not split."""
    runners = {
        "reference": reference,
        "factorized": None if reference is None else factorized,
        "unhealed": None if reference is None else unhealed,
        "compressed": compressed,
        "exact": exact,
        "exported": exported,
    }
    return {role: runner for role, runner in runners.items() if runner is not None}


def pairs_of(roles: Mapping[str, R]) -> dict[str, tuple[str, str]]:
    """Reference and candidate of every loss that can be measured, by its name in `AccuracyReport`."""
    losses = _HEALED if "unhealed" in roles else _LOSSES
    return {name: pair for name, pair in losses.items() if roles.keys() >= set(pair)}


def require_reference(gate: Gate, reference: object | None, absent: str) -> None:
    """Refuse limits on the total loss where there is no reference to measure it against.

    Raises:
        InputError: says why there is none.
    """
    if reference is None and gate.needs_reference:
        raise InputError(
            "The gate limits the total loss (--max-perplexity-ratio, --max-kl, --min-top1, --min-cosine or "
            f"--max-wer-increase), which needs the original model, and {absent}. Give it with --reference."
        )


def evaluated_report(
    metadata: EvaluationMetadata,
    losses: Mapping[str, Loss],
    noise: Loss,
    gate: Gate,
    *,
    reference_absent: str,
    factorized_absent: str,
    continuations: tuple[Continuation, ...] = (),
) -> AccuracyReport:
    """The losses of `pairs_of`, evaluated.

    Args:
        metadata: what was read.
        losses: by name.
        noise: the numerical noise.
        gate: limits.
        reference_absent: why there is no reference; told where there is none.
        factorized_absent: why there are no factors before quantization; likewise.
        continuations: the texts side by side.
    """
    export_reference, export_deployed = losses["export_reference"], losses["export_deployed"]
    method, total = losses.get("method"), losses.get("total")
    split_absent = reference_absent if method is None else factorized_absent
    return AccuracyReport(
        metrics_version=METRICS_VERSION,
        evaluation=metadata,
        method=method,
        export_reference=export_reference,
        export_deployed=export_deployed,
        total=total,
        noise=noise,
        reference_absent=reference_absent if method is None else None,
        continuations=continuations,
        gate=apply_gate(gate, export_reference, export_deployed, method, total),
        factorization=losses.get("factorization"),
        quantization=losses.get("quantization"),
        split_absent=None if "factorization" in losses else split_absent,
        unhealed=losses.get("unhealed"),
    )
