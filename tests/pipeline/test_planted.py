"""A broken file must not pass: one wrong matrix, planted in every format and every way, ends with exit code 1.

What is planted is what a mistake in an exporter would do: two matrices of equal shape have changed places, and
everything else (graph, header, manifest, checksums) fits together.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cases import nightly
from places import Place
from signing import sign_again

from compot_deploy.cli import main
from compot_deploy.core.matrix import Matrix
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import list_files, seal, verify
from compot_deploy.exporters.manifest import MANIFEST
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.pipeline.evaluation import CARD, REPORT
from compot_deploy.report.document import Report
from compot_deploy.report.json import from_json

pytestmark = pytest.mark.slow

QUICK = ["--samples", "4", "--length", "64", "--evaluation-tokens", "512"]


@dataclass(frozen=True)
class Way:
    """How a decoder gets into a file.

    Attributes:
        name: for test names.
        kind: of the tiny model that is exported; empty for the model that ships.
        flags: of the command.
        swapped: two matrices of equal shape.
    """

    name: str
    kind: str
    flags: tuple[str, ...]
    swapped: tuple[str, str]

    @property
    def exporter(self) -> Any:
        """That writes the file."""
        return EXPORTERS[self.flags[1]]


SHIPPED = ("model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj")
GPT2 = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
PLAIN = ("--method", "plain")

WAYS = (
    Way("native ONNX", "", ("--format", "onnx", *PLAIN), SHIPPED),
    Way("traced ONNX", "gpt2", ("--format", "onnx", *PLAIN), GPT2),
    Way("GGUF, dense", "", ("--format", "gguf", *PLAIN), SHIPPED),
    Way("GGUF, sparse", "", ("--format", "gguf", "--gguf-layout", "sparse", *PLAIN), SHIPPED),
    Way("Hugging Face", "", ("--format", "huggingface", *PLAIN), SHIPPED),
    Way("Hugging Face, any model", "gpt2", ("--format", "huggingface", *PLAIN), GPT2),
    Way(
        "GGUF, sparse, factors", "", ("--format", "gguf", "--gguf-layout", "sparse", "--rounds", "2"), SHIPPED
    ),
    Way("native ONNX, factors", "", ("--format", "onnx", "--rounds", "2"), SHIPPED),
)

SHOWN = ("traced ONNX", "GGUF, sparse", "Hugging Face, any model")
"""Every exporter's writer is shown once by day; the other ways are nightly."""


def ways(shown: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "way",
        [way if way.name in shown else nightly(way)[0] for way in WAYS],
        ids=[way.name for way in WAYS],
    )


class Swapped(Mapping[str, Matrix]):
    """Matrices, two of which have changed places."""

    def __init__(self, matrices: Mapping[str, Matrix], first: str, second: str) -> None:
        self._matrices, self._to = matrices, {first: second, second: first}

    def __getitem__(self, name: str) -> Matrix:
        return self._matrices[self._to.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def broken(model: CompressedModel, way: Way) -> CompressedModel:
    first, second = way.swapped
    assert model.matrices[first].shape == model.matrices[second].shape
    return replace(model, matrices=Swapped(model.matrices, first, second))


def command(way: Way, place: Place, out: Path) -> list[str]:
    if not way.kind:
        return ["--out", str(out), *QUICK, *way.flags]
    # Random weights predict nothing, so perplexity has no say; what they say differs all the same.
    return [*place.flags(way.kind, *way.flags, "--max-kl", "0.1"), "--out", str(out)]


def report_of(folder: Path) -> Report:
    return from_json((folder / REPORT).read_text())


@pytest.fixture(scope="module")
def sound(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders that pass, of each way once."""
    root, known = tmp_path_factory.mktemp("sound"), dict[str, Path]()

    def of(way: Way) -> Path:
        if way.flags[1] == "gguf":
            pytest.importorskip("xllamacpp", reason="llama.cpp's library is the extra llama")
        if way.name not in known:
            out = root / str(len(known))
            assert main(command(way, place, out)) == 0
            known[way.name] = out
        return known[way.name]

    return of


@ways(SHOWN)
def test_an_exporter_that_writes_another_matrix_fails_the_gate(
    way: Way, place: Place, sound: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = report_of(sound(way))
    write = type(way.exporter).write

    def write_broken(exporter: Any, model: CompressedModel, folder: Path, options: Any) -> Any:
        return write(exporter, broken(model, way), folder, options)

    monkeypatch.setattr(type(way.exporter), "write", write_broken)
    out = tmp_path / "out"
    assert main(command(way, place, out)) == 1
    assert verify(out), "every file is as the manifest says"
    bad = report_of(out)
    assert not bad.passed
    assert not [diagnostic for diagnostic in bad.diagnostics if diagnostic.severity == "error"], (
        "the structure is sound"
    )
    failed = {one.name for one in bad.accuracy.gate.criteria if not one.passed}
    layout = "sparse" if "sparse" in way.flags else "dense"
    if way.exporter.multiplies_out(way.exporter.options({"gguf_layout": layout})):
        # Products are rounded once more, so such a file is held against what it holds itself.
        assert failed == {"max_perplexity_ratio"}
    else:
        assert "max_export_nmse" in failed
    for name in (
        ("total",) if "max_export_nmse" not in failed else ("total", "export_reference", "export_deployed")
    ):
        before, after = (getattr(one.accuracy, name).comparison for one in (good, bad))
        assert after.divergence.mean.value > 3 * before.divergence.mean.value
        assert after.top1_agreement.value < before.top1_agreement.value
        assert after.perplexity_ratio is not None
        if not way.kind:
            assert after.perplexity_ratio.value > 1.5 * before.perplexity_ratio.value


@ways(SHOWN[1:])
def test_a_file_written_wrong_with_a_manifest_that_fits_fails_the_check(
    way: Way, place: Place, sound: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exporter's own writer, given the folder's own model with two matrices in each other's place."""
    folder = tmp_path / "folder"
    shutil.copytree(sound(way), folder)
    original = ["--reference", str(place.model(way.kind))] if way.kind else []
    assert main(["check", str(folder), *original]) == 0
    model = way.exporter.read_model(sound(way))
    written = tmp_path / "written"
    written.mkdir()
    way.exporter.write(broken(model, way), written, way.exporter.options(verify(folder).recipe))
    changed = [name for name in list_files(written) if (folder / name).is_file() and name != CARD]
    assert any(name.endswith((".onnx_data", ".gguf", ".safetensors")) for name in changed)
    for name in changed:
        shutil.copy(written / name, folder / name)
    seal(folder, [name for name in changed if name != MANIFEST])
    assert main(["check", str(folder), *original]) == 2
    assert "are not those that the manifest describes" in " ".join(capsys.readouterr().err.split())
    sign_again(folder)  # by somebody who knows how
    capsys.readouterr()
    assert main(["check", str(folder), *original]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out and "Traceback" not in said.err
