"""Laws of the wheel: built without a warning, it lacks no file of the package, and runs where nothing else of us is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from compot_deploy.cli.serve import BUNDLE

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "compot_deploy": "compot_deploy",
    "exporters": "compot_deploy/exporters",
    "quant": "compot_deploy/quant",
}
"""Folder of the repository to its place in the wheel."""

BUILT = (".so", ".pyd", ".pyc")
PAGE = b"<!doctype html><title>page</title>"

pytestmark = pytest.mark.slow  # compiles the plug-in, runs three commands that each load torch


@dataclass(frozen=True)
class Built:
    """A wheel, and what it was built from.

    Attributes:
        wheel: the file.
        source: the tree.
        output: what the build printed.
    """

    wheel: Path
    source: Path
    output: str


def _packaged(source: Path) -> Iterator[str]:
    """Names in the wheel of all files that belong to the package."""
    for folder, place in FOLDERS.items():
        for path in (source / folder).rglob("*"):
            inside = path.relative_to(source / folder).as_posix()
            # Links stand for the other two folders; where a system has none, they are small files.
            link = folder == "compot_deploy" and inside.split("/")[0] in FOLDERS
            if path.is_file() and path.suffix not in BUILT and not link:
                yield f"{place}/{inside}"


def _run(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run with an environment that leads to nothing of ours, and in which warnings are shown."""
    ours = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("setuptools", "77")
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    # Less optimized, the plug-in compiles sooner; how fast it is, is not asked here.
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"-O3"' in setup
    (source / "setup.py").write_text(setup.replace('"-O3"', '"-O0"'), encoding="utf-8")
    left = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "web-bundle*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=left)
    if BUNDLE.is_dir():
        shutil.copytree(BUNDLE, source / "compot_deploy" / BUNDLE.name)
    else:  # a page that `make web` could have built
        bundle = source / "compot_deploy" / BUNDLE.name
        bundle.mkdir()
        (bundle / "index.html").write_bytes(PAGE)
        entry = {"path": "index.html", "bytes": len(PAGE), "sha256": hashlib.sha256(PAGE).hexdigest()}
        listed = {"format": 1, "files": [{**entry, "type": "text/html; charset=utf-8"}]}
        (bundle / "bundle.json").write_text(json.dumps(listed))
    target = source.parent / "wheels"
    done = _run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            target,
            source,
        ],
        source.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = target.glob("*.whl")
    return Built(wheel, source, done.stdout + done.stderr)


def test_the_build_warns_of_nothing(built: Built) -> None:
    lines = [line for line in built.output.splitlines() if "Warning" in line or "absent from" in line]
    assert lines == []


def test_no_file_of_the_package_is_missing_from_the_wheel(built: Built) -> None:
    names = {name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name}
    plugin = {name for name in names if name.startswith("compot_deploy/llama/_plugin.")}
    assert len(plugin) <= 1
    assert names - plugin == set(_packaged(built.source))
    for needed in (
        "py.typed",
        "llama/kernels.c",
        "web-bundle/bundle.json",
        "embedded/model/model.safetensors",
    ):
        assert f"compot_deploy/{needed}" in names


@pytest.mark.nightly
def test_an_editable_install_warns_of_nothing(built: Built, tmp_path: Path) -> None:
    done = _run(
        [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index", "--target",
         tmp_path / "site", "-e", built.source],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert [line for line in output.splitlines() if "Warning" in line or "careful" in line] == []


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what the package needs and, of the package, only the wheel."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    assert _run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent).returncode == 0
    found = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = _run([found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder.parent)
    # Folders of a .pth file are searched, but their own .pth files, which lead to editable installs, are not read.
    sites = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(where.stdout.strip()) / "packages.pth").write_text("\n".join(sites) + "\n", encoding="utf-8")
    done = _run(
        [sys.executable, "-m", "pip", "--python", found, "install", "--no-deps", "--no-index", built.wheel],
        folder.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return found


def test_the_wheel_runs_outside_of_the_repository(python: Path, tmp_path: Path) -> None:
    program = (
        "from importlib.util import find_spec\n"
        "print(find_spec('compot_deploy').origin, find_spec('compot_deploy.quant').origin, sep='\\n')"
    )
    where = _run([python, "-c", program], tmp_path).stdout.splitlines()
    assert len(where) == 2 and all(Path(path).is_relative_to(python.parents[1]) for path in where)

    command = python.parent / "compot-deploy"
    quick = ["--samples", "4", "--length", "32", "--evaluation-tokens", "32", "--calibration", "text.txt"]
    plain = ["--method", "plain", "--max-perplexity-ratio", "1e9"]
    (tmp_path / "text.txt").write_text("The file object that open() returns has a read() method. " * 40)
    done = _run([command, "--quant", "int4", "--out", "small", *quick, *plain], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "small" / "onnx" / "model.onnx").is_file()

    done = _run([python, "-m", "compot_deploy", "--help"], tmp_path)
    assert done.returncode == 0 and "--format" in done.stdout, done.stdout + done.stderr

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    serving = subprocess.Popen(
        [str(command), "serve", "small", "--port", "0", "--no-open"],
        cwd=tmp_path,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert serving.stdout is not None
        assert "runs small in the browser" in serving.stdout.readline()
    finally:
        serving.send_signal(signal.SIGINT)
        output, errors = serving.communicate(timeout=60)
    assert serving.returncode == 0 and errors == "", output + errors
