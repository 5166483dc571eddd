"""Laws of the pipeline for mixtures of experts: all of it as for other models, and what is said of idle experts."""

from __future__ import annotations

from pathlib import Path

import any_models
import pytest
import torch
from places import few_schemes
from safetensors.torch import load_file, save_file
from texts import write_lines
from transformers import AutoModelForCausalLM

from compot_deploy import check, deploy, factorize
from compot_deploy.exporters import EXPORTERS


def with_idle_experts(folder: Path) -> Path:
    """A model whose first router finds all experts alike, so that the same two are given every token."""
    path = any_models.save(folder, "qwen2_moe") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gate.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.nightly
def test_experts_are_planned_like_all_matrices_and_idle_ones_are_counted(tmp_path: Path) -> None:
    model, text = with_idle_experts(tmp_path / "m"), write_lines(tmp_path / "text.txt")
    out, limits = tmp_path / "out", {"max_kl": 1e3}
    with few_schemes():
        (made,) = deploy(
            str(model),
            out=str(out),
            format=("huggingface",),
            bits=3.4,
            calibration=str(text),
            samples=8,
            length=32,
            evaluation_tokens=256,
            **limits,
        )
    assert made.passed and check(out, reference=str(model), limits=limits).passed
    assert made.report.accuracy.export_reference.comparison.nmse < 1e-9
    # Two experts of one block, each with what its gate and its other matrices read.
    assert any(
        "no token of the calibration text reached 4 inputs of experts" in note for note in made.report.notes
    )
    experts = [layer for layer in made.report.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 3
    assert all(layer.sensitivity is not None and layer.sensitivity > 0.0 for layer in experts)
    assert len([name for name in EXPORTERS["huggingface"].read(out) if ".experts." in name]) == len(experts)


def test_a_mixture_in_memory_is_factorized_expert_by_expert_and_loads_again(tmp_path: Path) -> None:
    model = any_models.model("qwen2_moe")
    tokens = torch.randint(3, any_models.VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    made = factorize(model, [batch], quant="int4", ratio=0.1, rounds=2, allocation="uniform")
    assert sum(".experts." in linear.name for linear in made.linears) == 2 * 4 * 3
    assert not any(linear.name.endswith((".gate", "expert_gate")) for linear in made.linears)
    made.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, made.model(tokens).logits)
