"""The layout is a promise: a file imports its own room or a lower one, and the numerics know torch only."""

from __future__ import annotations

import ast
import re
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
    ("cluster",),
    ("quant",),
    ("numerics",),
    ("models",),
    ("transformers_plugin",),
    ("recipe",),
    ("exporters",),
    ("llama",),
    ("accuracy",),
    ("planning",),
    ("healing",),
    ("report",),
    ("pipeline", "serving"),
    ("cli",),
    ("__init__", "__main__", "huggingface", "judging"),
)
"""Rooms from the ground up. Rooms of one floor do not know each other."""

FORMATS = ("onnx", "gguf", "huggingface")
"""Rooms inside of the exporters' room: whoever brings a new one reads none of the others."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS) - 1
TORCH_ONLY = ("quant", "numerics")
MODULE = re.compile(rf"compot_deploy\.({'|'.join(room for floor in FLOORS[:-1] for room in floor)})(\.\w+)*")
"""A module by its name in a string. What others know us by, in their folders and reports, is no room."""

FOREIGN_TO_NUMERICS = {"transformers", "onnx", "gguf", "logging", "rich", "json", "pathlib"}


WAYS = (
    "from {module} import anything",
    "import {module}.inside as anything",
    "if TYPE_CHECKING:\n    from {module}.inside import anything",
    "def later():\n    from {module}.inside import anything",
    "def later():\n    from {dots}{beside} import anything",
    "def later():\n    from {dots} import {beside}",
)
"""How an import can be written, at the end of a file."""

BY_NAME = (
    "def later():\n    return importlib.import_module('{module}.inside')",
    "HOMES = {{'anything': '{module}.inside'}}",
)


def test_every_file_imports_its_own_room_or_a_lower_one() -> None:
    wrong = [wrong for path in _files() for wrong in _wrong_imports(path, path.read_text(encoding="utf-8"))]
    assert not wrong


@pytest.mark.parametrize("room", [room for room, floor in FLOOR_OF.items() if floor < TOP])
def test_a_wrong_import_planted_into_a_room_is_found(room: str) -> None:
    path = next(path for path in _files() if _room(path) == room)
    text = path.read_text(encoding="utf-8")
    assert _wrong_imports(path, text) == []
    others = [other for other, floor in FLOOR_OF.items() if floor >= FLOOR_OF[room] and other != room]
    dots = "." * len(_package(path))
    for other in set(others) - {"__init__", "__main__"}:
        module = f"compot_deploy.{other}"
        for way in WAYS if FLOOR_OF[other] == TOP else WAYS + BY_NAME:
            planted = text + "\n" + way.format(module=module, dots=dots, beside=other) + "\n"
            assert len(_wrong_imports(path, planted)) == 1, way
    for way in ("import compot_deploy", "from compot_deploy import deploy"):
        assert len(_wrong_imports(path, f"{text}\n{way}\n")) == 1, way


@pytest.mark.parametrize("room", FORMATS)
def test_formats_do_not_know_each_other(room: str) -> None:
    path = next(path for path in _files() if path.parts[-3:-1] == ("exporters", room))
    text = path.read_text(encoding="utf-8")
    for other in set(FORMATS) - {room}:
        module = f"compot_deploy.exporters.{other}"
        for way in WAYS + BY_NAME:
            planted = text + "\n" + way.format(module=module, dots="..", beside=other) + "\n"
            assert len(_wrong_imports(path, planted)) == 1, way


@pytest.mark.parametrize("path", [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py"))], ids=str)
def test_only_the_command_line_prints(path: Path) -> None:
    if _room(path) in ("cli", "embedded"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_the_numerics_know_torch_and_no_formats_or_models() -> None:
    for path in _files():
        if _room(path) in TORCH_ONLY:
            imported = {module.split(".")[0] for module in _imports(path, path.read_text(encoding="utf-8"))}
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
        "import compot_deploy.cli, compot_deploy.exporters, compot_deploy.accuracy.runners\n"
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


def _package(path: Path) -> list[str]:
    """The package that a file is installed in: `compot_deploy.quant` for `quant/gptq.py`."""
    folder = path.relative_to(ROOT).parts[0]
    return [*FOLDERS[folder].split("."), *path.relative_to(ROOT / folder).parts[:-1]]


def _imports(path: Path, text: str) -> set[str]:
    """Full names of everything imported: in functions, from beside, and by a name in a string, too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = _package(path)
            beside = package[: len(package) - node.level + 1] if node.level else []
            module = [*beside, *(node.module or "").split(".")]
            found |= {".".join(part for part in (*module, alias.name) if part) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            found.add(node.value)
    return found


def _wrong_imports(path: Path, text: str) -> list[str]:
    """What a file imports from above or from beside its own room."""
    room = _room(path)
    own = path.relative_to(ROOT).parts
    wrong = []
    for name in sorted(_imports(path, text)):
        parts = name.split(".")
        if parts[0] != "compot_deploy" or name == "compot_deploy.__version__":
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "__init__"
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
            wrong.append(f"{room} imports {name}")
        elif room == other == "exporters" and own[1] in FORMATS and parts[2] in {*FORMATS} - {own[1]}:
            wrong.append(f"exporters/{own[1]} imports {name}")
    return wrong


def test_no_two_test_modules_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names)), "pytest imports only one of two modules of the same name"
