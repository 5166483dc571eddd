"""Traces of models, made once for all processes of a test run: torch's exporter takes ten seconds for a tiny model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from compot_deploy.exporters.onnx import tracing


@contextmanager
def traces_kept_in(folder: Path) -> Iterator[None]:
    """Within, what was traced once for a configuration is read from a folder."""
    trace: Callable[..., onnx.ModelProto] = tracing._exported
    folder.mkdir(exist_ok=True)

    def remembered(wrapper: Any, interface: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
        model = wrapper.traced
        told = (
            type(wrapper).__name__,
            type(model).__name__,
            model.config.to_json_string(),
            interface,
            list(names),
        )
        path = folder / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:24]}.onnx"
        if not path.exists():
            made = trace(wrapper, interface, names, values)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(made.SerializeToString())
            part.rename(path)
        return onnx.load_model(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_exported", remembered)
        yield
