"""Every type of model that GGUF takes: logits of a tiny random model, torch against the file in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import tiny
import torch
from reference_gguf import factorized_by_svd, quantized_by_rounding

from compot_deploy.cli import main
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import ArtifactError, UnsupportedModelError
from compot_deploy.exporters.gguf.exporter import GgufExporter
from compot_deploy.exporters.gguf.kinds import KINDS
from compot_deploy.exporters.gguf.metadata import describe
from compot_deploy.exporters.gguf.model import read
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama.model import LlamaModel
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.outline import outline_of
from compot_deploy.models.source import open_source

pytest.importorskip("xllamacpp", reason="the extra llama is not installed")

EXACT = 1e-4
TABULATED = 2e-3
"""llama.cpp looks GELU up in a table of float16."""

BY_DAY = ("gemma3_text", "phi3", "gpt2")
TOKENS = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(3))


def by_day(case: str) -> Any:
    return pytest.param(case, marks=() if case in BY_DAY else pytest.mark.nightly)


def limit(case: str) -> float:
    return EXACT if KINDS[case.split()[0]].activations[0] in ("silu", "relu2") else TABULATED


def factorized(name: str, weight: torch.Tensor) -> Matrix:
    return factorized_by_svd(weight, 24, name, Grid(4, 32), Pattern(2, 4))


def integers(name: str, weight: torch.Tensor) -> Matrix:
    return quantized_by_rounding(weight, Grid(8 if "0" in name else 4, 32))


def furthest(path: Path, wanted: torch.Tensor, execution: Any) -> float:
    with LlamaModel(path, exact=True, execution=execution, context=64) as model:
        return float(np.abs(model.logits(TOKENS[0].tolist()) - wanted.numpy()).max())


def same_again(model: CompressedModel, path: Path) -> None:
    back = read(path, outline_of(model))
    assert set(back.matrices) == set(model.matrices) and back.tied == model.tied
    for name, matrix in model.matrices.items():
        assert torch.equal(matrix.dequantize(), back.matrices[name].dequantize()), name
    for name, tensor in model.tensors.items():
        assert torch.allclose(tensor, back.tensors[name], atol=2e-7, rtol=0), name


def test_every_kind_has_a_case() -> None:
    shown = {case.split()[0] for case in gguf_models.CASES}
    assert shown | {"mistral"} == set(KINDS)  # Mistral is Llama, and has laws of its own


@pytest.mark.parametrize("case", [by_day(case) for case in gguf_models.CASES])
def test_logits_of_a_file_are_those_of_torch(tmp_path: Path, case: str) -> None:
    """Positions go far beyond every window; matrices are floating point, integers and factors."""
    folder = gguf_models.save(tmp_path / "m", case)
    path = tmp_path / "m.gguf"
    assert GgufExporter().supports(open_source(folder)) is None
    model = gguf_models.model(folder)
    wanted = gguf_models.torch_logits(folder, TOKENS, model)
    assert wanted.std() > 0.3
    write(model, path, GgufOptions(type="F32"))
    assert furthest(path, wanted, "auto") < limit(case)
    same_again(model, path)
    model = gguf_models.model(folder, integers)
    wanted = gguf_models.torch_logits(folder, TOKENS, model)
    write(model, path, GgufOptions(table_type="F32"))
    assert furthest(path, wanted, "expand") < limit(case)
    same_again(model, path)
    model = gguf_models.model(folder, factorized)
    if not KINDS[case.split()[0]].factorized:
        with pytest.raises(UnsupportedModelError, match="dense"):
            write(model, path, GgufOptions(layout="sparse"))
        return
    wanted = gguf_models.torch_logits(folder, TOKENS, model)
    write(model, path, GgufOptions(layout="sparse"))
    assert furthest(path, wanted, "float") < limit(case)
    assert furthest(path, wanted, "expand") < limit(case)
    same_again(model, path)


def test_a_folder_is_read_back_from_its_own_files(tmp_path: Path) -> None:
    """Queries, keys and values that were one matrix are one again; an untied head stays apart."""
    exporter, folder = GgufExporter(), tmp_path / "out"
    folder.mkdir()
    model = gguf_models.model(gguf_models.save(tmp_path / "m", "phi3"), factorized)
    exporter.write(model, folder, exporter.options({"gguf_layout": "sparse"}))
    back = exporter.read_model(folder)
    assert set(back.matrices) == set(model.matrices) and set(back.tensors) == set(model.tensors)
    assert (back.tied, back.tables) == (model.tied, model.tables)
    for name, matrix in model.matrices.items():
        assert torch.equal(matrix.dequantize(), back.matrices[name].dequantize()), name
    assert exporter.lint(folder) == ()
    (folder / "config.json").write_text(json.dumps({**back.config, "model_type": "llama"}))
    with pytest.raises(ArtifactError, match="phi3"):
        exporter.read_model(folder)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an activation": ("phi3", {"hidden_act": "relu"}, "activation 'relu'"),
    "another scale of queries": ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
    "no softcaps": ("gemma2", {"final_logit_softcapping": None}, "softcaps"),
    "windows in other blocks": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "sliding window",
    ),
    "rope in other blocks": ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "every fourth"),
    "rope in every block": ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "every fourth"),
    "a scaling without a tensor": (
        "granite",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "llama3",
    ),
    "a part of a head": (
        "olmo2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "attention scaled by the block": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scaled in another way",
    ),
    "a window in small models": (
        "exaone4",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "sliding windows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_feature_that_llama_cpp_would_ignore_is_refused(case: str) -> None:
    kind, changes, message = REFUSED[case]
    config = gguf_models.CASES[kind].config().to_dict() | {"model_type": kind.split()[0]}
    describe(config)
    with pytest.raises(UnsupportedModelError, match=message):
        describe(config | changes)


def test_texts_longer_than_a_file_can_be_asked_for_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "m", "mistral", sliding_window=100)
    out = tmp_path / "out"
    assert main([str(folder), "--format", "gguf", "--method", "plain", "--out", str(out)]) == 2
    assert "--length 100" in capsys.readouterr().err and not out.exists()


def test_a_type_without_an_entry_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="no way for a opt here"):
        describe({"model_type": "opt"})


def test_every_key_matters_that_is_no_size(tmp_path: Path) -> None:
    """The comparison sees what it should: a window, a cap and the base of sliding blocks."""
    folder = gguf_models.save(tmp_path / "m", "gemma3_text")
    model = gguf_models.model(folder)
    wanted = gguf_models.torch_logits(folder, TOKENS, model)
    path = tmp_path / "m.gguf"
    for changes in (
        {"sliding_window": 9},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ):
        other = CompressedModel(
            model.architecture,
            {**model.config, **changes},
            model.matrices,
            model.tensors,
            model.tied,
            model.source,
            model.tables,
        )
        write(other, path, GgufOptions(type="F32"))
        assert furthest(path, wanted, "auto") > 5 * TABULATED
