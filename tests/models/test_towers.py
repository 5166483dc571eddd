"""Laws of models whose encoder reads text and whose decoder writes it: nothing of either tower is lost or mixed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import translators
from torch import nn

from compot_deploy.errors import InputError
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch, Utterance
from compot_deploy.models.whole import whole_model
from compot_deploy.models.writing import load_writer

LENGTHS = ((7, 5), (6, 4), (7, 7), (3, 2))
"""Tokens that are read and written: the longest of a batch are as many."""


def batches_of(source: ModelSource) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    utterances = [
        Utterance(
            torch.randint(4, 300, (written,), generator=draw),
            torch.randint(4, 300, (read,), generator=draw),
            1,
            "input_ids",
        )
        for read, written in LENGTHS
    ]
    return source.task.batches([*utterances, *(utterances[:1] * 300)])


def saved(folder: Path, kind: str) -> Path:
    """A folder; of T5 with a head of its own, as version 1.1 has it, where that is asked for."""
    if kind != "t5 apart":
        return translators.save(folder, kind)
    model = translators.model("t5")
    tensors = {
        name: value.clone() for name, value in model.state_dict().items() if "embed_tokens" not in name
    }
    tensors["lm_head.weight"] = torch.randn(320, 32, generator=torch.Generator().manual_seed(7))
    translators.save(folder, "t5", tie_word_embeddings=False)
    (folder / "model.safetensors").unlink()
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["t5", "t5 apart", "bart", "marian"])
def test_the_whole_model_and_the_streamed_one_give_what_transformers_gives(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", kind)
    source = open_source(folder)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    model, batches = whole_model(source), batches_of(source)
    assert source.tied is (kind != "t5 apart") and len(batches) > 1
    with BlockStream(source, batches, finish=True) as stream:
        for _ in source.layout.blocks:
            stream.advance(capture=False)
        streamed = stream.outputs()
    with torch.no_grad():
        for batch, found in zip(batches, streamed, strict=True):
            wanted = loaded(**batch.arguments, use_cache=False).logits
            assert torch.equal(model(**batch.arguments, use_cache=False).logits, wanted)
            assert torch.equal(found, wanted)


def test_grams_leave_out_what_fills_up_texts_of_either_tower(tmp_path: Path) -> None:
    source = open_source(translators.save(tmp_path / "m", "t5"))
    batches, model = batches_of(source), whole_model(source)
    read, written = (
        sum(int(mask.sum()) for mask in masks)
        for masks in zip(*[b.masks[::-1] for b in batches], strict=True)
    )
    sums: dict[str, torch.Tensor] = {}
    now: list[Batch] = []

    def hook(name: str) -> Any:
        def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            reads = inputs[0].shape[1] == now[0].arguments["input_ids"].shape[1]
            rows = inputs[0][now[0].masks[int(reads)]].double()
            sums[name] = sums.get(name, torch.zeros(())) + rows.T @ rows

        return seen

    for name in source.layout.names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            now[:] = [batch]
            model(**batch.arguments)
    crossed = {"layer.1.EncDecAttention.k"}
    with BlockStream(source, batches) as stream:
        for block in source.layout.blocks:
            grams = stream.advance()
            for group in source.layout.of(block):
                heard = block.startswith("encoder.") or group.name in crossed
                assert grams[group.name].tokens == (read if heard else written)
                torch.testing.assert_close(
                    grams[group.name].matrix, sums[group.names[0]], rtol=1e-5, atol=1e-4
                )
    assert read != written


def test_masks_of_both_towers_are_told_apart_by_their_size(tmp_path: Path) -> None:
    source = open_source(translators.save(tmp_path / "m", "t5"))
    for batch in batches_of(source):
        real, heard = batch.masks
        assert real.numel() != heard.numel() and len(real) == len(heard)
        assert torch.equal(batch.arguments["attention_mask"].bool(), heard)
        assert not bool((batch.compared & ~real).any())


def test_a_writer_begins_and_ends_as_the_folder_says(tmp_path: Path) -> None:
    folder = translators.save(tmp_path / "m", "bart")
    source = open_source(folder)
    writer = load_writer(folder, source.config)
    assert (writer.beginning, writer.end, writer.suppressed, writer.longest) == ((3,), {2}, (0,), 12)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    generation.forced_bos_token_id = 9
    generation.save_pretrained(folder)
    assert load_writer(folder, source.config).beginning == (3, 9)
    generation.decoder_start_token_id = None
    generation.save_pretrained(folder)
    with pytest.raises(InputError, match="no text can begin"):
        load_writer(folder, {})
