"""The layout is a promise: a file imports its own room or a lower one, and the numerics know torch only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "compot_deploy": "compot_deploy",
    "exporters": "compot_deploy.exporters",
    "quant": "compot_deploy.quant",
}
"""Folder of the repository to the package that it is installed as."""

FLOORS = (
    ("errors", "progress", "silence", "embedded"),
    ("core",),
    ("quant",),
    ("numerics",),
    ("models",),
    ("transformers_plugin",),
    ("recipe",),
    ("exporters",),
    ("llama",),
    ("accuracy",),
    ("planning",),
    ("report",),
    ("pipeline", "serving"),
    ("cli",),
    ("__init__", "__main__", "huggingface"),
)
"""Rooms from the ground up. Rooms of one floor do not know each other."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_ONLY = ("quant", "numerics")
FOREIGN_TO_NUMERICS = {"transformers", "onnx", "gguf", "logging", "rich", "json", "pathlib"}


def test_every_file_imports_its_own_room_or_a_lower_one() -> None:
    wrong = [wrong for path in _files() for wrong in _wrong_imports(_room(path), path.read_text())]
    assert not wrong


@pytest.mark.parametrize("room", [room for room in FLOOR_OF if room != "__main__"])
def test_a_planted_import_from_above_is_found(room: str) -> None:
    above = [other for other, floor in FLOOR_OF.items() if floor >= FLOOR_OF[room] and other != room]
    for other in above:
        module = "compot_deploy" if other in ("__init__", "__main__") else f"compot_deploy.{other}"
        name = "deploy" if other == "__init__" else "anything"
        if other != "__main__":
            assert _wrong_imports(room, f"from {module} import {name}")
            assert (
                _wrong_imports(room, f"def later():\n    from {module}.inside import {name}")
                or other == "__init__"
            )


@pytest.mark.parametrize("path", [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py"))], ids=str)
def test_only_the_command_line_prints(path: Path) -> None:
    if _room(path) in ("cli", "embedded"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_the_numerics_know_torch_and_no_formats_or_models() -> None:
    for path in _files():
        if _room(path) in TORCH_ONLY:
            imported = {module.split(".")[0] for module in _imports(path.read_text())}
            assert not imported & FOREIGN_TO_NUMERICS, path


def test_there_are_no_drawers_for_odds_and_ends() -> None:
    assert not {path.stem for path in _files()} & {"utils", "helpers", "base", "common", "misc"}


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
        "import compot_deploy.cli.main, compot_deploy.exporters, compot_deploy.accuracy.runners\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def _files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            # Links for type checkers stand inside the package.
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def _room(path: Path) -> str:
    """First part of the path below the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "compot_deploy" else parts[0]


def _imports(text: str) -> set[str]:
    """Full names of everything imported, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _wrong_imports(room: str, text: str) -> list[str]:
    """What a file of a room imports from above, or from beside its own room."""
    wrong = []
    for name in sorted(_imports(text)):
        parts = name.split(".")
        if parts[0] != "compot_deploy" or name == "compot_deploy.__version__":
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "__init__"
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
            wrong.append(f"{room} imports {name}")
    return wrong


def test_no_two_test_modules_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names)), "pytest imports only one of two modules of the same name"
