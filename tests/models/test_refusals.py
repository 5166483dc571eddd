"""Models that cannot be taken are refused in a sentence: what they are, where it lies, why, and what to use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import transformers

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models import refusals
from compot_deploy.models.source import open_source

MADE: Mapping[str, tuple[Callable[[], Any], str, str]] = {
    "experts that are multiplied all at once": (
        lambda: transformers.Llama4TextConfig(
            **tiny.COMMON,
            num_local_experts=4,
            interleave_moe_layer_step=1,
            head_dim=16,
            intermediate_size_mlp=64,
        ),
        "Llama4ForCausalLM",
        r"A llama4_text \(Llama4ForCausalLM\) is a mixture of experts of a kind that is not supported: "
        r"model\.layers\.0\.feed_forward\.experts is multiplied with in a way of its own\. Use a model",
    ),
    "products of its own": (
        lambda: transformers.FalconConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
        "FalconForCausalLM",
        r"A falcon \(FalconForCausalLM\) is not supported: it multiplies with "
        r"transformer\.h\.0\.self_attention\.query_key_value, a FalconLinear, in a way of its own, and so with all "
        r"8 matrices of its blocks; .* Use a model",
    ),
    "no tokens": (
        lambda: transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
        ),
        "ViTModel",
        r"A vit \(ViTModel\) reads pixel_values, and only models that read tokens are supported\. Use a model",
    ),
}


@pytest.mark.parametrize("what", MADE)
def test_a_model_that_cannot_be_taken_says_what_where_why_and_what_next(what: str, tmp_path: Path) -> None:
    configure, name, said = MADE[what]
    getattr(transformers, name)(configure()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as refused:
        _ = open_source(tmp_path).layout
    assert re.match(f"{re.escape(str(tmp_path))}: {said}", str(refused.value)), refused.value


def test_a_pass_that_stops_elsewhere_names_the_part_and_the_reason(tmp_path: Path) -> None:
    source = open_source(any_models.save(tmp_path, "bert"))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("values are needed\nand more")

    source.meta.get_submodule("encoder.layer.1.attention.self").query.forward = broken
    with pytest.raises(
        UnsupportedModelError,
        match=r"A bert \(BertModel\) cannot be looked at without its weights: "
        r"encoder\.layer\.1\.attention\.self\.query \(Linear\) stops with RuntimeError: values are needed\. Use",
    ):
        _ = source.layout


def test_experts_that_are_passed_over_are_not_left_alone_in_silence(tmp_path: Path) -> None:
    """Attention is seen, the experts are multiplied all at once: half of a model is not what was asked for."""
    import torch

    source = open_source(any_models.save(tmp_path, "bert"))
    block = source.meta.get_submodule("encoder.layer.0")
    block.experts = torch.nn.Module()
    block.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 64, 32, device="meta"))
    with pytest.raises(
        UnsupportedModelError, match=r"encoder\.layer\.0\.experts is multiplied with in a way of its own"
    ):
        _ = source.layout


def test_a_matrix_that_is_not_seen_is_noted(tmp_path: Path) -> None:
    source = open_source(any_models.save(tmp_path / "bert", "bert"))
    assert refusals.note_on(source.meta, source.layout) == ()
    config = transformers.MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    (note,) = refusals.note_on(source.meta, source.layout)
    assert note.startswith("backbone.layers.0.mixer.dt_proj stay")
