"""Environments of other programs that read our folders, whose packages cannot be installed beside ours."""

from __future__ import annotations

import os
import shutil

import pytest

VARIABLES = {
    "optimum-onnx": "COMPOT_DEPLOY_OPTIMUM_PYTHON",
    "onnxruntime-genai": "COMPOT_DEPLOY_GENAI_PYTHON",
}


def python_with(package: str) -> str:
    """The python of an environment with `package`; without one the test is skipped."""
    python = os.environ.get(VARIABLES[package], "")
    if shutil.which(python) is None:
        pytest.skip(f"set {VARIABLES[package]} to the python of an environment with {package}")
    return python
