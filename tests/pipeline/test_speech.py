"""Laws of the pipeline for models that hear and write: recordings in, evaluated folders out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import spoken
import torch

from compot_deploy.accuracy.towers import OnnxTowers, TorchTowers
from compot_deploy.cli import main
from compot_deploy.core.matrix import Factorized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import unlisted_files, verify
from compot_deploy.exporters.onnx.tensors import TOWERS
from compot_deploy.models.listening import load_listener
from compot_deploy.models.source import open_source
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.models.whole import model_of
from compot_deploy.pipeline.evaluation import REPORT
from compot_deploy.pipeline.recordings import RECORDINGS
from compot_deploy.pipeline.texts import read_evaluation
from compot_deploy.report.document import Report
from compot_deploy.report.json import from_json

pytestmark = pytest.mark.slow
FORMATS = ("onnx", "huggingface")


@dataclass(frozen=True)
class Made:
    """A model, its recordings, and the folders that were made of it."""

    model: Path
    speech: Path
    out: Path

    def report(self, form: str) -> Report:
        return from_json((self.out / form / REPORT).read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("speech")
    found = Made(
        spoken.save(root / "model", encoder_layers=1, decoder_layers=1),
        spoken.record(root / "recordings", 12),
        root / "out",
    )
    formats = [flag for form in FORMATS for flag in ("--format", form)]
    flags = ["--bits", "3.5", "--method", "compot", "--min-top1", "0.01", "--max-wer-increase", "100"]
    command = [
        str(found.model),
        "--calibration",
        str(found.speech),
        *formats,
        *flags,
        "--out",
        str(found.out),
    ]
    assert main(command) == 0
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_a_report_counts_word_errors_beside_divergence(made: Made, form: str) -> None:
    report = made.report(form)
    total = report.accuracy.total
    assert total is not None and report.passed
    figures = total.comparison
    assert figures.divergence is not None and figures.divergence.mean.value > 1e-6
    assert figures.perplexity_ratio is None and figures.top1_agreement is not None
    assert figures.word_errors is not None and figures.candidate_word_errors is not None
    assert report.accuracy.export_reference.comparison.nmse < 1e-9
    assert {one.name for one in report.accuracy.gate.criteria} >= {"max_wer_increase", "min_top1"}
    beside = report.accuracy.continuations
    assert len(beside) == 1 and all(one.exact == one.compressed for one in beside)
    assert not [one for one in report.diagnostics if one.severity in ("error", "warning")]
    recordings = (made.out / form / RECORDINGS).stat().st_size
    files = sum(record.bytes for record in verify(made.out / form).files)
    assert report.sizes.artifact < files - recordings


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_is_checked_again_by_itself(made: Made, form: str, tmp_path: Path) -> None:
    folder = made.out / form
    assert unlisted_files(folder, verify(folder)) == ()
    limits = ["--max-wer-increase", "100", "--report-dir", str(tmp_path)]
    assert main(["check", str(folder), "--reference", str(made.model), *limits]) == 0
    again = from_json((tmp_path / "report.json").read_text()).accuracy
    before = made.report(form).accuracy
    assert again.evaluation.digest == before.evaluation.digest
    assert again.total is not None and before.total is not None
    assert again.total.comparison.word_errors == before.total.comparison.word_errors
    assert main(["check", str(folder), "--reference", str(made.model), "--max-wer-increase", "0"]) in (0, 1)


def test_both_formats_hold_the_same_matrices_of_both_towers(made: Made) -> None:
    one, other = (EXPORTERS[form].read_model(made.out / form) for form in FORMATS)
    names = set(open_source(made.model).layout.names)
    assert names < set(one.matrices) and set(one.matrices) == set(other.matrices)
    assert any(isinstance(one.matrices[name], Factorized) for name in names if ".encoder." in name)
    assert any(isinstance(one.matrices[name], Factorized) for name in names if ".decoder." in name)
    for name in one.matrices:
        assert torch.equal(one.matrices[name].dequantize(), other.matrices[name].dequantize())
    assert set(one.tensors) >= {name for name in other.tensors if "sinusoid" not in name}


def test_onnxruntime_writes_what_torch_writes_token_by_token_and_side_by_side(made: Made) -> None:
    folder = made.out / "onnx"
    model = EXPORTERS["onnx"].read_model(folder)
    source = open_source(made.model)
    listener = load_listener(folder, model.config)
    evaluation = read_evaluation(folder, load_tokenizer(folder), model.config)
    torch_runner = TorchTowers(model_of(model), source.task)
    onnx_runner = OnnxTowers(folder, exact=True, threads=1)
    (utterance,) = evaluation.text.utterances
    wanted = torch_runner.write(utterance, listener)
    assert onnx_runner.write(utterance, listener) == wanted and len(wanted) >= 3
    (batch,) = source.task.batches([utterance, utterance[:4]])
    torch.testing.assert_close(onnx_runner.outputs(batch), torch_runner.outputs(batch), rtol=1e-4, atol=1e-4)


def test_the_graphs_are_those_that_optimum_and_transformers_js_look_for(made: Made) -> None:
    encoder, decoder = (
        onnx.load(made.out / "onnx" / graph, load_external_data=False).graph for graph in TOWERS
    )
    assert [value.name for value in encoder.input] == ["input_features"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    caches = [
        f"{layer}.{side}.{kind}"
        for layer in range(open_source(made.model).settings.decoder_layers)
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    inputs = ["input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in caches)]
    assert [value.name for value in decoder.input] == [*inputs, "use_cache_branch"]
    assert [value.name for value in decoder.output] == ["logits", *(f"present.{name}" for name in caches)]
    for graph in TOWERS:
        assert (made.out / "onnx" / f"{graph}_data").is_file()
    config = json.loads((made.out / "onnx" / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer.json"):
        assert (made.out / "onnx" / name).is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give --calibration FOLDER"),
        (["--calibration", "self"], "writes no text that it could be calibrated on"),
        (["--calibration", "nowhere"], "is neither a file nor a data set"),
        (["--calibration", "SPEECH", "--max-perplexity-ratio", "1.1"], "does not apply to a speech model"),
        (["--calibration", "SPEECH", "--max-wer-increase", "-1"], "a limit is a number from 0 on"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_in_a_sentence(
    flags: list[str], sentence: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(made.speech) if flag == "SPEECH" else flag for flag in flags]
    command = [str(made.model), "--format", "huggingface", *given, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
