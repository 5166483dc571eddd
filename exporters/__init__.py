"""Exporters: a CompressedModel in, files out. They store exactly what they are given.

An exporter is one file and one line in `EXPORTERS`.
"""

from __future__ import annotations

from typing import Final

from compot_deploy.exporters.onnx import OnnxExporter

EXPORTERS: Final = {"onnx": OnnxExporter()}
"""By the name that ``--format`` takes."""
