"""Exporters: a CompressedModel in, files out. They store exactly what they are given.

An exporter is one file and one line in `EXPORTERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, runtime_checkable

from compot_deploy.architectures import Architecture
from compot_deploy.exporters.gguf_folder import GgufExporter
from compot_deploy.exporters.huggingface import HuggingFaceExporter
from compot_deploy.exporters.onnx import OnnxExporter
from compot_deploy.findings import Finding
from compot_deploy.weights import CompressedModel, Grid, Matrix, Storage


@runtime_checkable
class Exporter(Protocol):
    """What every exporter looks like; its options are its own business, made by it from a recipe's knobs."""

    @property
    def name(self) -> str:
        """Under which the exporter is known."""
        ...

    def options(self, knobs: Mapping[str, Any]) -> Any:
        """Options from a recipe's knobs."""
        ...

    def storage(self, options: Any) -> Storage:
        """What a leaf takes in the file."""
        ...

    def check(
        self,
        architecture: Architecture,
        config: Mapping[str, Any],
        grids: Mapping[str, Grid | None],
        options: Any,
    ) -> None:
        """Refuse what cannot be written, before any work is done for it."""
        ...

    def write(self, model: CompressedModel, folder: Path, options: Any) -> tuple[str, ...] | None:
        """Write every file but the manifest into an existing folder.

        Returns:
            What a report must say about the files: everything that differs from what was asked.
        """
        ...

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of a folder, from its files."""
        ...

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone."""
        ...

    def lint(self, folder: Path) -> tuple[Finding, ...]:
        """What is wrong or remarkable about the structure of a folder."""
        ...


EXPORTERS: Final[Mapping[str, Exporter]] = MappingProxyType(
    {"onnx": OnnxExporter(), "gguf": GgufExporter(), "huggingface": HuggingFaceExporter()}
)
"""By the name that ``--format`` takes."""
