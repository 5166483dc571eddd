"""What an inspection of an artifact's structure found: a severity, a place, a sentence.

Nothing else lives here, so that the exporters' lints and the report can share it without knowing each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Severity: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Diagnostic:
    """One fact about an artifact that a reader should know.

    Attributes:
        severity: ``error``: a runtime would refuse the file or compute something else, the verdict is
            "failed"; ``warning``: it works, but not everywhere or not as fast as it could; ``note``: a choice
            worth recording, such as a layer that stayed dense.
        where: the file, node or tensor, as a path: ``onnx/model.onnx: /model/layers.0/attn/q_proj/MatMul``.
        sentence: what is the case, why it matters, what to do; one sentence or two, numbers included.
    """

    severity: Severity
    where: str
    sentence: str

    def __post_init__(self) -> None:
        if self.severity not in get_args(Severity):
            raise ValueError(f"A diagnostic is one of {get_args(Severity)}, not {self.severity!r}.")


def errors(diagnostics: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """The diagnostics that make an artifact fail."""
    return tuple(diagnostic for diagnostic in diagnostics if diagnostic.severity == "error")
