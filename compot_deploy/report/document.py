"""Everything that is known about how good an artifact is, and the outcome in one sentence.

Values only; `compot_deploy.report.json`, `junit`, `tables`, `markdown` and `html` turn them into what is read. The
layout is documented field by field in ``docs/report-schema.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from compot_deploy.accuracy.gate import Criterion, GateResult
from compot_deploy.accuracy.harness import TaskFigures
from compot_deploy.accuracy.losses import Loss
from compot_deploy.accuracy.outcome import AccuracyReport
from compot_deploy.core.diagnostics import Diagnostic, errors
from compot_deploy.report.facts import Frontier, LayerFigures, Origin

SCHEMA_VERSION: Final = 1
"""Raised when a field of report.json changes its meaning or disappears; a new field does not raise it."""

SCHEMA_MINOR: Final = 4
"""Raised with every field that is added: a report without this field has 0, and lacks what came with 1."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of an artifact beside what the same model would take without factorization.

    Attributes:
        artifact: the whole folder or file, tokenizer and all.
        weights: the weights in it, scales, masks and padding included.
        plain_int4: the same weights, every linear plain int4, the rest as in the artifact.
        plain_int8: the same with plain int8.
        fp16: all weights at 16 bits.
        transport: the artifact compressed for transport, where that was measured.
        memory: weights in memory after loading, where that is known.
        memory_int4: the same weights in memory with every linear plain int4.
        memory_int8: the same with plain int8.
        linears: bytes of the linears alone, in the file.
        linear_weights: how many weights they have.
    """

    artifact: int
    weights: int
    plain_int4: int
    plain_int8: int
    fp16: int
    transport: int | None = None
    memory: int | None = None
    memory_int4: int | None = None
    memory_int8: int | None = None
    linears: int | None = None
    linear_weights: int | None = None


@dataclass(frozen=True)
class Alternative:
    """The same model compressed in another way, evaluated beside this one.

    Attributes:
        name: how: ``plain``, ``gptq int4/g32``.
        bytes: of its weights, tables included.
        bits: per weight of its linears.
        factorized: how many linears are factorized.
        linears: how many there are.
        loss: original → alternative, in torch.
    """

    name: str
    bytes: int
    bits: float
    factorized: int
    linears: int
    loss: Loss


@dataclass(frozen=True)
class Report:
    """Everything that is known about how good an artifact is.

    Attributes:
        model: what was compressed: a folder name or hub id.
        artifact: name of the folder or file.
        format: kind of artifact, ``onnx`` for example.
        package: version of compot-deploy.
        created: UTC, ISO 8601.
        sizes: in bytes.
        accuracy: losses, texts and the gate.
        diagnostics: of the structural lint.
        notes: what the run did other than asked: fallbacks, layers that stayed dense, fewer samples.
        recipe: every option of the run; plain JSON values.
        versions: of the libraries that took part.
        schema_version: layout of this report.
        schema_minor: fields that were added to it since.
        layers: one entry per matrix, in block order.
        frontier: what a plan could have chosen; None where nothing was planned.
        origin: calibration and provenance.
        alternatives: the same model compressed otherwise, evaluated beside this one: other methods at the same bytes,
            or the same factors through GPTQ, where another quantizer was chosen.
        tasks: scores in tasks, where such were asked for.
    """

    model: str
    artifact: str
    format: str
    package: str
    created: str
    sizes: Sizes
    accuracy: AccuracyReport
    diagnostics: tuple[Diagnostic, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    schema_minor: int = SCHEMA_MINOR
    layers: tuple[LayerFigures, ...] = ()
    frontier: Frontier | None = None
    origin: Origin = field(default_factory=Origin)
    alternatives: tuple[Alternative, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the gate passed and the lint found no error."""
        return self.accuracy.gate.passed and not errors(self.diagnostics)


def with_criteria(report: Report, criteria: Iterable[Criterion]) -> Report:
    """A report with further criteria behind those of its gate."""
    every = (*report.accuracy.gate.criteria, *criteria)
    gate = GateResult(every, all(one.passed for one in every))
    return replace(report, accuracy=replace(report.accuracy, gate=gate))


def verdict(report: Report) -> str:
    """The outcome in one sentence, failures named."""
    failed = [criterion.sentence for criterion in report.accuracy.gate.criteria if not criterion.passed]
    failed += [f"{diagnostic.where}: {diagnostic.sentence}" for diagnostic in errors(report.diagnostics)]
    if not failed:
        known = "" if report.accuracy.total is not None else ", export only"
        return f"PASSED{known}: all {len(report.accuracy.gate.criteria)} criteria of the gate hold."
    return "FAILED: " + "; ".join(failed)
