"""The gate in front of GGUF: a tiny model with the features of the real one goes through torch and llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_models
import pytest

from compot_deploy.cli import main
from compot_deploy.exporters.gguf import metadata
from compot_deploy.exporters.gguf.kinds import KINDS
from compot_deploy.llama import gate

pytest.importorskip("xllamacpp", reason="the extra llama is not installed")


@pytest.fixture(autouse=True)
def asked_anew() -> Any:
    gate._objection.cache_clear()
    yield
    gate._objection.cache_clear()


def config_of(case: str) -> dict[str, Any]:
    return {**gguf_models.CASES[case].config().to_dict(), "model_type": case.split()[0]}


def test_the_tiny_model_keeps_the_features_of_the_large_one() -> None:
    large = gguf_models.CASES["gemma3_text"].config()
    large.hidden_size, large.num_attention_heads, large.num_key_value_heads = 2048, 64, 8
    made = gate.small({**large.to_dict(), "model_type": "gemma3_text"})
    assert made["head_dim"] == large.head_dim and made["rope_parameters"] == large.rope_parameters
    assert made["layer_types"] == large.layer_types and made["num_key_value_heads"] == 1
    assert made["hidden_size"] == 2 * large.head_dim and made["vocab_size"] == 128


def test_an_error_in_the_table_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: queries and keys in the order of transformers, where llama.cpp wants neighbours."""
    config = config_of("granite")
    assert gate.objection(config) is None
    gate._objection.cache_clear()
    wrong = {**KINDS, "granite": replace(KINDS["granite"], orders={})}
    monkeypatch.setattr(metadata, "KINDS", wrong)
    assert "other logits in llama.cpp" in str(gate.objection(config))
    folder, out = gguf_models.save(tmp_path / "m", "granite"), tmp_path / "out"
    assert main([str(folder), "--method", "plain", "--format", "gguf", "--out", str(out)]) == 3
    assert "other logits in llama.cpp" in capsys.readouterr().err and not out.exists()


def test_an_abort_of_llama_cpp_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: blocks of one kind alone, which the table refuses."""
    config = {**config_of("lfm2"), "layer_types": ["full_attention"] * 3}
    wrong = {**KINDS, "lfm2": replace(KINDS["lfm2"], further=lambda settings: None)}
    monkeypatch.setattr(metadata, "KINDS", wrong)
    assert "refused by llama.cpp" in str(gate.objection(config))
