"""Law of readers: whatever is in a file, the answer is success or one sentence, in time; `mutations.py` tries more."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("forks", allow_module_level=True)

import mutations
from readers import GATE, INPUTS, READERS, prepare, prepare_inputs

OF_USERS = [name for name, reader in READERS.items() if reader.folder in INPUTS]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs") / "sound"
    root.mkdir()
    prepare_inputs(root)
    return root


def test_every_reader_reads_what_is_sound(inputs: Path) -> None:
    for name in OF_USERS:
        READERS[name].read(inputs / READERS[name].folder)


def test_inputs_of_users_are_read_or_refused_in_a_sentence(inputs: Path, tmp_path: Path) -> None:
    found = {name: mutations.attack(name, inputs, 8, 2, tmp_path) for name in OF_USERS}
    assert {name: dict(outcome.wrong) for name, outcome in found.items() if outcome.wrong} == {}
    assert sum(outcome.passed for outcome in found.values()) < 8 * len(found) / 2, "most of them are spoilt"


def test_a_traceback_a_hang_and_a_death_are_noticed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path) -> None:
        data = (folder / "gate.toml").read_bytes()
        if data == GATE.encode():
            return
        match len(data) % 3:
            case 0:
                raise KeyError("x")
            case 1:
                time.sleep(60)
            case _:
                os.abort()

    monkeypatch.setattr(mutations, "SECONDS", 0.05)
    monkeypatch.setitem(READERS, "gate", replace(READERS["gate"], read=read))
    wrong = mutations.attack("gate", inputs, 12, 1, tmp_path).wrong
    assert {what.partition(" at ")[0].partition(" (")[0] for what in wrong} == {
        "KeyError", "it is not done in time", "the process died",
    }  # fmt: skip
    assert sum(map(len, wrong.values())) == 12


@pytest.mark.nightly
@pytest.mark.slow
def test_files_of_exports_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    prepare(tmp_path / "sound")
    for name, count in mutations.shares(2000).items():
        if name not in OF_USERS:
            wrong = mutations.attack(name, tmp_path / "sound", count, 3, tmp_path / "spoilt").wrong
            assert dict(wrong) == {}, name
