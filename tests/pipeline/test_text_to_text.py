"""Laws of the pipeline for models whose encoder reads text and whose decoder writes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import tiny
import torch
import transformers
import translators

from compot_deploy.accuracy import towers_gate
from compot_deploy.accuracy.towers import OnnxTowers, TorchTowers
from compot_deploy.cli import main
from compot_deploy.core.matrix import Factorized, Quantized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.tensors import TOWERS
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import open_source
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.models.whole import model_of
from compot_deploy.models.writing import load_writer
from compot_deploy.pipeline.evaluation import REPORT
from compot_deploy.pipeline.texts import read_evaluation
from compot_deploy.report.json import from_json

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
FORMATS = ("onnx", "huggingface")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model under ``model``, and what was made of it under ``out``."""
    place = tmp_path_factory.mktemp("translator")
    model = translators.save(place / "model", "t5")
    words = tiny.WORDS.split() * 3
    lines = [" ".join(words[at : at + 6 + at % 5]) for at in range(40)]
    (place / "lines.txt").write_text("\n".join(dict.fromkeys(lines)))
    formats = [flag for form in FORMATS for flag in ("--format", form)]
    flags = ["--bits", "3.5", "--method", "compot", "--min-top1", "0.01", "--samples", "12", "--length", "16"]
    text = ["--calibration", str(place / "lines.txt"), "--evaluation-tokens", "64"]
    assert main([str(model), *text, *formats, *flags, "--out", str(place / "out")]) == 0
    return place


@pytest.mark.parametrize("form", FORMATS)
def test_a_report_has_divergence_and_texts_and_a_folder_is_checked_by_itself(
    root: Path, form: str, tmp_path: Path
) -> None:
    folder = root / "out" / form
    report = from_json((folder / REPORT).read_text())
    total = report.accuracy.total
    assert total is not None and report.passed
    assert total.comparison.divergence is not None and total.comparison.divergence.mean.value > 1e-6
    assert total.comparison.top1_agreement is not None and total.comparison.word_errors is None
    assert report.accuracy.export_reference.comparison.nmse < 1e-9
    assert len(total.greedy) == len(report.accuracy.continuations) >= 3
    assert all(one.exact == one.compressed for one in report.accuracy.continuations)
    assert not [one for one in report.diagnostics if one.severity in ("error", "warning")]
    limits = ["--min-top1", "0.01", "--report-dir", str(tmp_path)]
    assert main(["check", str(folder), "--reference", str(root / "model"), *limits]) == 0
    again = from_json((tmp_path / "report.json").read_text()).accuracy
    assert again.evaluation.digest == report.accuracy.evaluation.digest
    assert again.total is not None and again.total.comparison == total.comparison


def test_both_formats_hold_the_same_matrices_of_both_towers(root: Path) -> None:
    one, other = (EXPORTERS[form].read_model(root / "out" / form) for form in FORMATS)
    assert set(one.matrices) == set(other.matrices) > set(open_source(root / "model").layout.names)
    for side in ("encoder.", "decoder."):
        assert any(
            isinstance(one.matrices[name], Factorized) for name in one.matrices if name.startswith(side)
        )
    assert isinstance(one.matrices["shared"], Quantized)
    for name in one.matrices:
        assert torch.equal(one.matrices[name].dequantize(), other.matrices[name].dequantize())


def test_every_runtime_writes_what_torch_writes_alone_and_beside_longer_texts(root: Path) -> None:
    folder = root / "out" / "onnx"
    model = EXPORTERS["onnx"].read_model(folder)
    task = open_source(root / "model").task
    writer = load_writer(folder, model.config)
    evaluation = read_evaluation(folder, load_tokenizer(folder), model.config)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(root / "out" / "huggingface")
    in_torch, packed = (TorchTowers(made, task) for made in (model_of(model), loaded.unpack().eval()))
    runner = OnnxTowers(folder, exact=True, threads=1)
    for utterance in evaluation.text.utterances:
        wanted = in_torch.write(utterance, writer)
        assert runner.write(utterance, writer) == packed.write(utterance, writer) == wanted
        assert len(wanted) >= 3
    for batch in task.batches(evaluation.text.utterances):
        outputs = in_torch.outputs(batch)[batch.real]
        for other in (runner, packed):
            torch.testing.assert_close(other.outputs(batch)[batch.real], outputs, rtol=1e-4, atol=1e-4)


def test_the_graphs_are_those_that_optimum_and_transformers_js_look_for(root: Path) -> None:
    encoder, decoder = (
        onnx.load(root / "out" / "onnx" / graph, load_external_data=False).graph for graph in TOWERS
    )
    assert [value.name for value in encoder.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    assert {"input_ids", "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"} == {
        value.name for value in decoder.input if not value.name.startswith("past_key_values.")
    }
    caches = [value.name for value in decoder.output if value.name != "logits"]
    assert caches == [
        f"present.{layer}.{side}.{kind}"
        for layer in range(2)
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    config = json.loads((root / "out" / "onnx" / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_writes_from_the_command_line(
    root: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(root / "out" / form), "--prompt", "some words to be read", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_graph_that_computes_something_else_is_noticed_before_any_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(root / "model")
    assert towers_gate.towers_objection(source) is None
    write = towers_gate.write

    def wrong(made: CompressedModel, folder: Path, options: OnnxOptions) -> object:
        norm = "decoder.block.1.layer.1.layer_norm.weight"
        return write(
            replace(made, tensors={**made.tensors, norm: 1.01 * made.tensors[norm]}), folder, options
        )

    monkeypatch.setattr(towers_gate, "write", wrong)
    towers_gate._difference.cache_clear()
    assert "other logits in onnxruntime" in str(towers_gate.towers_objection(source))
    towers_gate._difference.cache_clear()


@pytest.mark.parametrize("kind", [kind for kind in translators.CONFIGS if kind != "t5"])
def test_every_kind_computes_in_onnxruntime_what_it_computes_in_torch(kind: str, tmp_path: Path) -> None:
    source = open_source(translators.save(tmp_path / "m", kind))
    assert towers_gate.towers_objection(source) is None


def test_limits_that_a_model_of_two_towers_has_no_figure_for_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(root / "model"), "--format", "huggingface", "--max-wer-increase", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "does not apply to a text-to-text model" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
