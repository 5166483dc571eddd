"""Exporters: a CompressedModel in, files out. They store exactly what they are given.

An exporter is one file and one line in `EXPORTERS`. It is imported when it is first asked for, so that what reads
GGUF files beside it needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from compot_deploy.core.diagnostics import Diagnostic
    from compot_deploy.core.grid import Grid
    from compot_deploy.core.matrix import Matrix
    from compot_deploy.core.storage import Storage
    from compot_deploy.models.compressed import CompressedModel
    from compot_deploy.models.source import ModelSource


@runtime_checkable
class Exporter(Protocol):
    """What every exporter looks like; its options are its own business, made by it from a recipe's options."""

    @property
    def name(self) -> str:
        """Under which the exporter is known."""
        ...

    def options(self, recipe_options: Mapping[str, Any]) -> Any:
        """Options from a recipe's options."""
        ...

    def supports(self, source: ModelSource) -> str | None:
        """Why a model cannot be written, as a sentence; None if it can be. Reads no weights."""
        ...

    def ways(self, source: ModelSource) -> Mapping[str, str | None]:
        """Ways of writing a model into this format by name: why it cannot go each, as `supports` says it."""
        ...

    def context(self, config: Mapping[str, Any]) -> int | None:
        """Positions that a file of a model can be asked for; None for as many as the model."""
        ...

    def storage(self, options: Any) -> Storage:
        """What a leaf takes in the file."""
        ...

    def multiplies_out(self, options: Any) -> bool:
        """Whether factors are stored as their product, rounded, so that a file is evaluated by what it holds."""
        ...

    def check(
        self,
        source: ModelSource,
        grids: Mapping[str, Grid | None],
        options: Any,
    ) -> None:
        """Refuse what cannot be written, before any work is done for it.

        Args:
            source: a model that `supports` has no objection to.
            grids: grid by role (``dictionary``, ``codes``, ``head`` and so on; the token embedding is ``embedding``),
                None for floating point.
            options: of the export.
        """
        ...

    def write(self, model: CompressedModel, folder: Path, options: Any) -> tuple[str, ...] | None:
        """Write every file but the manifest into an existing folder.

        Returns:
            What a report must say about the files: everything that differs from what was asked.
        """
        ...

    def dry_run(self, model: CompressedModel, folder: Path, options: Any) -> int:
        """Write as `write` does, for a model of stand-ins: matrices whose tensors are on torch's device ``meta``.

        Small files are as they will be. Of the data only the size is known: the bytes that are missing in
        `folder` are returned.
        """
        ...

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of a folder, from its files."""
        ...

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone."""
        ...

    def lint(self, folder: Path) -> tuple[Diagnostic, ...]:
        """What is wrong or remarkable about the structure of a folder."""
        ...


class _Exporters(Mapping[str, Exporter]):
    """Exporters by name, each imported and made once, when it is first asked for."""

    _PLACES: Final = MappingProxyType(
        {
            "onnx": ("compot_deploy.exporters.onnx.exporter", "OnnxExporter"),
            "gguf": ("compot_deploy.exporters.gguf.exporter", "GgufExporter"),
            "huggingface": ("compot_deploy.exporters.huggingface.exporter", "HuggingFaceExporter"),
        }
    )

    def __getitem__(self, name: str) -> Exporter:
        return _exporter(*self._PLACES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._PLACES)

    def __len__(self) -> int:
        return len(self._PLACES)


@cache
def _exporter(module: str, name: str) -> Exporter:
    exporter: Exporter = getattr(importlib.import_module(module), name)()
    return exporter


EXPORTERS: Final[Mapping[str, Exporter]] = _Exporters()
"""By the name that ``--format`` takes."""
