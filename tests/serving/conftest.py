"""One small model as a GGUF file and as an ONNX folder, and a server of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from reference_gguf import compressed, shared_change
from servers import Served, serving

from compot_deploy.core.grid import DENSE, Grid
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.gguf import exporter as gguf
from compot_deploy.exporters.onnx.options import OnnxOptions

NEEDS = {"gguf": ("xllamacpp", "llama"), "onnx": ("onnxruntime", "onnx")}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same matrices in each format."""
    folder = tmp_path_factory.mktemp("served")
    model = compressed(
        tiny.save(folder / "source", "llama3"), shared_change(Grid(4, 64), DENSE, 0.6), Grid(8, 64)
    )
    (folder / "gguf").mkdir()
    gguf.write(model, folder / "gguf" / "small.gguf", gguf.GgufOptions(layout="sparse"))
    (folder / "small").mkdir()
    EXPORTERS["onnx"].write(model, folder / "small", OnnxOptions())
    return {"gguf": folder / "gguf" / "small.gguf", "onnx": folder / "small"}


@pytest.fixture(scope="session", params=list(NEEDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each format of which the runtime is installed."""
    package, extra = NEEDS[request.param]
    pytest.importorskip(package, reason=f"the extra {extra} is not installed")
    return str(request.param)


@pytest.fixture(scope="session")
def served(models: dict[str, Path], kind: str) -> Iterator[Served]:
    """A server of each format."""
    with serving(models[kind]) as running:
        yield running
