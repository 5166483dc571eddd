"""GGUF through the command line: the same law as for ONNX, the file adds rounding and nothing more."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from cases import nightly
from reference_gguf import compressed, shared_change

from compot_deploy import cli
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MISSING_DEPENDENCY, EXIT_OK
from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.exporter import GgufExporter
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.reader import read_header
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama import probe
from compot_deploy.models.streaming import BlockStream
from compot_deploy.planning import settings
from compot_deploy.planning.candidates import Search
from compot_deploy.report.document import Report
from compot_deploy.report.json import from_json

pytest.importorskip("xllamacpp", reason="llama.cpp's library is the extra llama")

QUICK = ["--samples", "4", "--length", "32", "--evaluation-tokens", "128", "--rounds", "3"]
PLANNED = QUICK[: QUICK.index("--rounds")]
NO_LIMIT = ["--max-perplexity-ratio", "1e9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(
        tmp_path_factory.mktemp("source") / "tiny-llama", "llama", hidden_size=128, num_hidden_layers=1
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block with rows that split into blocks of 256."""
    return tiny.save(
        tmp_path_factory.mktemp("source") / "wide",
        "llama",
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{tiny.WORDS}{number} " for number in range(60)))
    return path


def _report(folder: Path) -> Report:
    return from_json((folder / "compot" / "report.json").read_text())


@pytest.mark.consumer
@pytest.mark.parametrize("layout", ["factorized", *nightly("dense")])
def test_a_model_becomes_a_gguf_folder(
    layout: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(model), "--format", "gguf", "--gguf-layout", layout, "--calibration", str(text)]
    assert cli.main([*command, "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    report = _report(out)
    assert report.accuracy.export_reference.comparison.nmse < 1e-9
    if layout == "factorized":
        assert any(record.kind == "factorized" for record in verify(out).matrices)
    assert any("no smaller" in note for note in report.notes) == (layout == "dense")
    assert cli.main(["check", str(out), "--reference", str(model), "--min-positions", "32"]) == EXIT_OK
    capsys.readouterr()
    assert cli.main(["run", str(out), "-p", "the quick", "-n", "4"]) == EXIT_OK
    assert capsys.readouterr().out.startswith("the quick")


def test_two_formats_share_one_compression(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is read, and every block calibrated and factorized, once; both files hold the same numbers."""
    read: list[bool] = []
    advance = BlockStream.advance
    monkeypatch.setattr(
        BlockStream,
        "advance",
        lambda self, *, capture=True, **how: (read.append(capture), advance(self, capture=capture, **how))[1],
    )
    out = tmp_path / "out"
    command = [str(model), "--format", "onnx", "--format", "gguf", "--gguf-layout", "factorized"]
    assert cli.main([*command, "--calibration", str(text), "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    onnx, gguf = verify(out / "onnx"), verify(out / "gguf")
    assert read == [True]
    assert onnx.calibration == gguf.calibration and onnx.calibration is not None
    assert {m.name: m.digest for m in onnx.matrices} == {m.name: m.digest for m in gguf.matrices}
    assert any(record.kind == "factorized" for record in onnx.matrices)


def linear_bytes(folder: Path) -> int:
    """Bytes that the linears take in a GGUF file, as its header says."""
    tensors = read_header(folder / "model.gguf").tensors.values()
    return sum(t.nbytes for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)


@pytest.mark.parametrize("layout", ["sparse", *nightly("factorized", "dense")])
def test_a_plan_is_written_to_the_byte(
    layout: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = settings._listed

    def few(resolved: settings.Settings) -> Search:
        """A handful of schemes of each kind, so that this takes seconds."""
        search = listed(resolved)
        grids = {bits: groups[-1:] for bits, groups in search.grids.groups.items()}
        return replace(search, grids=replace(search.grids, groups=grids), rates=search.rates[1:2])

    monkeypatch.setattr(settings, "_listed", few)
    model = tiny.save(tmp_path / "small", "llama", num_hidden_layers=1, intermediate_size=96)
    out = tmp_path / "out"
    bits = "2.6" if layout == "sparse" else "5"
    command = [str(model), "--format", "gguf", "--gguf-layout", layout, "--calibration", str(text)]
    assert cli.main([*command, "--bits", bits, "--out", str(out), *PLANNED, *NO_LIMIT]) == EXIT_OK
    manifest = verify(out)
    said = re.search(r"the plan spends (\d+) of (\d+) bytes", " ".join(manifest.metadata["notes"]))
    assert said is not None
    planned, budget = int(said[1]), int(said[2])
    assert linear_bytes(out) == planned <= budget
    assert linear_bytes(out) == sum(m.bytes for m in manifest.matrices if ".layers." in m.name)


@pytest.mark.parametrize("kind", ["Q2_K", *nightly("IQ2_XXS", "Q5_0")])
def test_types_of_llama_cpp_are_written_with_the_importance_of_the_calibration(
    kind: str, wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear's rounding is weighted with the diagonal of its own Gram; bytes are counted as written."""
    seen: dict[int, np.ndarray | None] = {}
    right = gguf_quantize.quantize

    def spy(rows: np.ndarray, to: str, importance: np.ndarray | None = None) -> np.ndarray:
        seen[len(seen)] = importance
        assert to in (kind, "Q8_0") and (importance is None or importance.shape == (rows.shape[1],))
        return right(rows, to, importance)

    monkeypatch.setattr(gguf_quantize, "quantize", spy)
    out = tmp_path / "out"
    command = [str(wide), "--format", "gguf", "--gguf-type", kind, "--quant", "none", "--ratio", "0.1"]
    command += ["--calibration", str(text), "--out", str(out), "--embeddings", "none", *QUICK, *NO_LIMIT]
    assert cli.main([*command]) == EXIT_OK
    weights = [importance for importance in seen.values() if importance is not None]
    assert len(weights) == 7  # all linears, not the table
    assert all(abs(float(one.mean()) - 1) < 1e-3 and one.min() >= 0 and one.std() > 1e-3 for one in weights)
    # q, k and v read one input, and so do gate and up.
    assert len({one.tobytes() for one in weights}) == 4
    tensors = read_header(out / "model.gguf").tensors
    assert {t.kind for t in tensors.values() if len(t.shape) == 2 and t.name.startswith("blk.")} == {kind}
    assert sum(m.bytes for m in verify(out).matrices) == sum(
        t.nbytes for t in tensors.values() if len(t.shape) == 2
    )


def test_rows_that_no_block_divides_are_noted_in_manifest_and_report(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [str(model), "--format", "gguf", "--gguf-type", "Q4_K", "--calibration", str(text)]
    assert cli.main([*command, "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    note = next(note for note in verify(out).metadata["notes"] if "stored as" in note)
    assert "6 more" in note and "rows of 128, 160" in note and "stored as Q5_0" in note
    assert f"{note}." in _report(out).notes
    kinds = {t.kind for t in read_header(out / "model.gguf").tensors.values() if t.name.startswith("blk.")}
    assert kinds == {"F32", "Q5_0"}


def test_a_stopped_run_keeps_the_importance_of_finished_blocks(
    wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run reads no calibration text and writes the same file."""
    command = [str(wide), "--format", "gguf", "--gguf-type", "Q2_K", "--calibration", str(text)]
    command += ["--quant", "none", "--ratio", "0.1", *QUICK, *NO_LIMIT]
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == EXIT_OK

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GgufExporter, "write", stopped)
        assert cli.main([*command, "--out", str(tmp_path / "parts")]) == EXIT_INTERRUPTED
    monkeypatch.setattr(BlockStream, "__init__", stopped)
    assert cli.main([*command, "--out", str(tmp_path / "parts")]) == EXIT_OK
    assert (tmp_path / "whole/model.gguf").read_bytes() == (tmp_path / "parts/model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gguf-type", "Q9_K"], "Q9_K"),
        (["--gguf-type", "Q4_K", "--gguf-layout", "sparse"], "carries the integers over"),
        (["--gguf-type", "Q4_K", "--bits", "4"], "nothing to choose"),
        (["--bits", "2.2"], "are too few for the linears of a dense GGUF file"),
        (["--gguf-layout", "sparse", "--dictionary-group", "16"], "group"),
    ],
)
def test_what_a_layout_cannot_do_is_refused(
    flags: list[str],
    message: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [str(model), "--format", "gguf", "--calibration", str(text), "--out", str(tmp_path / "out")]
    quick = PLANNED if "--bits" in flags else QUICK
    assert cli.main([*command, *flags, *quick]) == EXIT_BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_type_of_llama_cpps_without_its_library_is_refused_before_any_work(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_library(monkeypatch)
    command = [str(model), "--format", "gguf", "--gguf-type", "Q4_K", "--calibration", str(text)]
    assert cli.main([*command, "--out", str(tmp_path / "out"), *QUICK]) == EXIT_MISSING_DEPENDENCY
    assert "compot-deploy[llama]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra llama were not installed."""
    from compot_deploy.exporters.gguf import library

    library.load_library.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else find(name, *a)
    )


# --- bad input: one sentence, exit code 2 or 4 ----------------------------------------------------------------


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each layout."""
    root = tmp_path_factory.mktemp("files")
    change = shared_change(Grid(4, 64), Pattern(2, 4), 0.5)
    for layout in ("dense", "sparse"):
        made = compressed(model, change if layout == "sparse" else None, Grid(8, 64))
        write(made, root / f"{layout}.gguf", GgufOptions(layout=layout, type="F16"))  # type: ignore[arg-type]
    return {layout: root / f"{layout}.gguf" for layout in ("dense", "sparse")}


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def hostile(data: bytes, name: bytes, field: int, value: int) -> bytes:
    """A number of the entry of a tensor set: 0 for a size, 1 for its place."""
    entry = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    at = entry + 4 if field == 0 else entry + 4 + 8 + 4
    return data[:at] + value.to_bytes(8, "little") + data[at + 8 :]


NORM = b"output_norm.weight"
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (cut, "truncated"),
    "another magic": (lambda data: b"ONNX" + data[4:], "not a GGUF file"),
    "a tensor outside the file": (lambda data: hostile(data, NORM, 1, 2**40), "overlaps|truncated"),
    "a size that overflows": (lambda data: hostile(data, NORM, 0, 2**63), "impossible shape"),
    "a count that overflows": (lambda data: data[:8] + (2**63).to_bytes(8, "little") + data[16:], "cannot fit"),
    "metadata that contradicts shapes": (
        lambda data: data.replace(b'"outputs":128', b'"outputs":129'), "asks for|does not fit"
    ),
    "an unknown layout version": (
        lambda data: data.replace(b"layout.version\x04\0\0\0\x01", b"layout.version\x04\0\0\0\x09"),
        "version 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_a_damaged_file_is_one_sentence(
    damage: str, layout: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGES[damage]
    data = files[layout].read_bytes()
    if change(data) == data:
        assert layout == "dense" and damage.startswith(("metadata", "an unknown"))
        # llama.cpp's own shapes are checked by llama.cpp.
        key = b"llama.feed_forward_length"
        at = data.index(key) + len(key) + 4
        data, message = data[:at] + (96).to_bytes(4, "little") + data[at + 4 :], "wrong shape"
    else:
        data = change(data)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    assert cli.main(["run", str(path), "-p", "the"]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert re.search(message, " ".join(said.split())) and "Traceback" not in said


def _with_key(data: bytes, key: str, change: Callable[[bytearray, int], None]) -> bytes:
    """A file with something changed behind a key."""
    made = bytearray(data)
    change(made, data.index(key.encode()) + len(key))
    return bytes(made)


def _twice(data: bytearray, at: int) -> None:
    """The first token of the vocabulary once more in the place of another of its length."""
    at += 4 + 4 + 8  # the type of the value, of the entries, their number
    tokens = []
    for _ in range(320):
        length = int.from_bytes(data[at : at + 8], "little")
        tokens.append((at + 8, bytes(data[at + 8 : at + 8 + length])))
        at += 8 + length
    place, text = tokens[100]
    other = next(place for place, found in tokens[101:] if len(found) == len(text))
    data[other : other + len(text)] = data[place : place + len(text)]


def _zero(data: bytearray, at: int) -> None:
    data[at + 4 : at + 8] = bytes(4)


ABORTS: dict[str, tuple[str, Callable[[bytearray, int], None], str]] = {
    "a token twice": ("tokenizer.ggml.tokens", _twice, "twice"),
    "heads of no size": (
        "llama.attention.key_length",
        _zero,
        "key_length is missing or not a positive number",
    ),
    "rotary pairs of no size": ("llama.rope.dimension_count", _zero, "dimension_count is missing or not"),
}


@pytest.mark.parametrize("case", ABORTS)
def test_what_llama_cpp_aborts_on_is_refused_from_its_keys(
    case: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, change, message = ABORTS[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(_with_key(files["dense"].read_bytes(), key, change))
    assert cli.main(["run", str(path), "-p", "the"]) == EXIT_BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_abort_that_nobody_knew_of_ends_a_child_and_not_us(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compot_deploy.llama.model.check_keys", lambda *_: None)
    monkeypatch.setattr(probe, "COMMAND", (*probe.COMMAND[:1], "-c", UNCHECKED))
    key, change, _ = ABORTS["a token twice"]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(_with_key(files["dense"].read_bytes(), key, change))
    assert cli.main(["run", str(path), "-p", "the"]) == EXIT_BAD_INPUT
    assert "llama.cpp aborts while it loads" in " ".join(capsys.readouterr().err.split())
    path.write_bytes(files["dense"].read_bytes())
    assert cli.main(["run", str(path), "-p", "the", "-n", "2"]) == EXIT_OK


UNCHECKED = """
from compot_deploy.llama import model, probe
model.check_keys = lambda *_: None
probe.end()
"""


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-t", "513", "-p", "the"], "1 to 512"),
        (["-t", "0", "-p", "the"], "at least 1"),
        (["-p", "the " * 300], "256"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_sentence(
    flags: list[str], message: str, layout: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(files[layout]), *flags]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert message in " ".join(said.split()) and "Traceback" not in said


def test_another_llama_cpp_is_refused_with_the_versions_that_work(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compot_deploy.exporters.gguf import library

    monkeypatch.setattr(library.load_library(), "version", "2031.1")
    library.check_layout.cache_clear()
    try:
        assert cli.main(["run", str(files["sparse"]), "-p", "the"]) == EXIT_MISSING_DEPENDENCY
    finally:
        library.check_layout.cache_clear()
    said = " ".join(capsys.readouterr().err.split())
    assert "2031.1" in said and library.TESTED[0] in said and "Traceback" not in said


def test_a_prompt_longer_than_the_context_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main([str(model), "--calibration", str(text), "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    capsys.readouterr()
    assert cli.main(["run", str(out), "-p", "the quick", "-n", "1000"]) == EXIT_BAD_INPUT
    assert "context of 256" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["run", str(out), "-p", "the quick", "-n", "4"]) == EXIT_OK
    assert cli.main(["run", str(tmp_path), "-p", "the"]) == EXIT_BAD_INPUT
