"""The layout is a promise: imports point one way, and every seam is a dict of one line per entry."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = (
    "errors",
    "weights",
    "whiten",
    "factorize",
    "quantize_factors",
    "allocate",
    "screening",
    "measures",
    "architectures",
)
BANNED_IN_PURE = {"transformers", "onnx", "gguf", "pathlib", "logging", "rich", "safetensors", "json"}
FOLDERS = {
    "compot_deploy": "compot_deploy",
    "exporters": "compot_deploy.exporters",
    "quant": "compot_deploy.quant",
}


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def _uses(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in _imports(path))


@pytest.mark.parametrize("name", PURE)
def test_the_numerics_know_no_files_formats_or_models(name: str) -> None:
    imported = {module.split(".")[0] for module in _imports(ROOT / "compot_deploy" / f"{name}.py")}
    assert not imported & BANNED_IN_PURE


@pytest.mark.parametrize("path", _modules("quant"), ids=lambda path: path.stem)
def test_quantizers_know_torch_and_weights_only(path: Path) -> None:
    imported = {module.split(".")[0] for module in _imports(path)}
    assert not imported & BANNED_IN_PURE
    for module in ("calibrate", "checkpoint", "pipeline", "exporters", "cli"):
        assert not _uses(path, f"compot_deploy.{module}")


@pytest.mark.parametrize("path", _modules("exporters"), ids=lambda path: path.stem)
def test_exporters_never_quantize_and_know_no_pipeline(path: Path) -> None:
    for module in ("quant", "factorize", "quantize_factors", "calibrate", "pipeline", "cli"):
        assert not _uses(path, f"compot_deploy.{module}"), f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_the_command_line_imports_the_pipeline_and_prints(folder: str) -> None:
    for path in _modules(folder):
        if path.stem in ("cli", "__init__", "__main__"):
            continue
        if path.stem != "pipeline":
            assert not _uses(path, "compot_deploy.pipeline"), path.name
        assert not _uses(path, "compot_deploy.cli"), path.name
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path.name


def test_there_are_no_drawers_for_odds_and_ends() -> None:
    names = {path.stem for folder in FOLDERS for path in _modules(folder)}
    assert not names & {"utils", "helpers", "base", "common", "misc"}


def test_optional_packages_are_not_needed_to_import_the_command_line() -> None:
    blocked = [
        "onnxruntime",
        "onnxruntime_genai",
        "bitsandbytes",
        "datasets",
        "xllamacpp",
        "matplotlib",
        "optimum",
    ]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import compot_deploy.cli, compot_deploy.pipeline, compot_deploy.exporters, compot_deploy.runners\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
