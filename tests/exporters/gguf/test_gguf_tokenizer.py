"""Tokenizers in GGUF: llama.cpp gives the same ids as Hugging Face, and what it cannot do is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from cases import nightly
from reference_gguf import compressed
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf.library import load_library
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.pre_tokenizers import EXPRESSIONS, detect_pre_tokenizer
from compot_deploy.exporters.gguf.token_check import ids_of, read_by
from compot_deploy.exporters.gguf.tokenizer import tokenizer_keys
from compot_deploy.exporters.gguf.writer import write

SPLITS = {name: expression for expression, name in EXPRESSIONS.items()}
VOCABULARY = 700


def lines(count: int) -> list[str]:
    """Ordinary and awkward text: numbers, marks, runs of spaces, newlines, other scripts, emoji, contractions."""
    rng = random.Random(0)
    words = [
        *tiny.WORDS.split(),
        "I'll", "WE'VE", "don't", "3.14159", "2026", "100000", "x=y+1;", "(a)[b]{c}", "café", "naïve", "Straße",
        "привет", "мир", "日本語", "🙂", "👩‍🚀", "  ", "   ", "\t", "\n", "\n\n", " \n ", "...", "!?", "--", "_id_",
        "http://a.b/c?d=e", "CamelCaseWord", "über", "١٢٣", "a\u00a0b", "'s", "'", "S'il",
    ]  # fmt: skip
    return ["".join(rng.choice(words) + rng.choice(["", " ", " ", " "]) for _ in range(rng.randint(1, 12)))
            for _ in range(count)]  # fmt: skip


def save_tokenizer(folder: Path, tokenizer: Tokenizer, begin: bool) -> None:
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 256, "clean_up_tokenization_spaces": False, "chat_template": "{{ messages }}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_level(folder: Path, steps: list[Any], begin: bool) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines(400),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    save_tokenizer(folder, tokenizer, begin)


def sentencepiece_style(folder: Path) -> None:
    """BPE with byte fallback and a prepended space, as Llama 2 has it."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = normalizer
    trained.train_from_iterator(
        [line for line in lines(400) if line.isascii() and "\n" not in line],
        trainers.BpeTrainer(vocab_size=VOCABULARY - 300, show_progress=False),
    )
    state = json.loads(trained.to_str())["model"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    # Ids in another order than the merges, so that scores cannot be confused with ids.
    for token in random.Random(1).sample(sorted(state["vocab"]), len(state["vocab"])):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    save_tokenizer(folder, tokenizer, True)


def split(name: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


KINDS: dict[str, list[Any] | None] = {
    "sentencepiece": None,
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": split("llama-bpe"),
    "qwen2": split("qwen2"),
    "tekken": split("tekken"),
    "gpt-4o": split("gpt-4o"),
}


def model_folder(folder: Path, kind: str) -> Path:
    folder.mkdir()
    tiny.model("llama", vocab_size=VOCABULARY).save_pretrained(folder)
    steps = KINDS[kind]
    if steps is None:
        sentencepiece_style(folder)
    else:
        byte_level(folder, steps, begin=kind in ("llama-bpe", "gpt-2"))
    return folder


@pytest.mark.consumer
@pytest.mark.parametrize(
    "kind", [kind if kind in ("sentencepiece", "gpt-2", "qwen2") else nightly(kind)[0] for kind in KINDS]
)
def test_ids_equal_those_of_hugging_face_on_a_thousand_lines(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    from transformers import AutoTokenizer

    from compot_deploy.llama.model import LlamaModel

    folder = model_folder(tmp_path / "model", kind)
    path = tmp_path / "model.gguf"
    write(compressed(folder), path, GgufOptions(type="F16"))
    reference = AutoTokenizer.from_pretrained(folder)
    with LlamaModel(path) as llama:
        differing = [
            line for line in lines(1000) if llama.tokenize(line) != list(reference(line)["input_ids"])
        ]
    assert not differing, (len(differing), differing[:3])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece"])
def test_the_pre_tokenizer_is_recognized_by_what_it_does(tmp_path: Path, kind: str) -> None:
    folder = model_folder(tmp_path / "model", kind)
    keys = tokenizer_keys(folder, {"vocab_size": VOCABULARY}).keys
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == kind
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.ggml.add_bos_token"] is (kind in ("llama-bpe", "gpt-2"))
    assert keys["tokenizer.ggml.bos_token_id"] == 1 and keys["tokenizer.ggml.eos_token_id"] == 2


def test_an_unknown_pre_tokenizer_is_refused_with_those_that_are_known() -> None:
    state = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}}
    with pytest.raises(UnsupportedModelError, match="llama-bpe"):
        detect_pre_tokenizer(state)
    prefixed = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}
    with pytest.raises(UnsupportedModelError, match="gpt-2"):
        detect_pre_tokenizer(prefixed)


UNLISTED: dict[str, list[Any]] = {
    "deepseek-coder": [
        pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "bloom": [
        pre_tokenizers.Split(Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
}


@pytest.mark.consumer
@pytest.mark.parametrize("kind", UNLISTED)
def test_a_pre_tokenizer_that_is_not_listed_is_found_by_what_llama_cpp_reads(
    tmp_path: Path, kind: str
) -> None:
    """Whichever name is found, its ids are those of Hugging Face on lines that nobody chose it by."""
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    from transformers import AutoTokenizer

    byte_level(tmp_path, UNLISTED[kind], begin=False)
    with pytest.raises(UnsupportedModelError):
        detect_pre_tokenizer(json.loads((tmp_path / "tokenizer.json").read_text()))
    keys = tokenizer_keys(tmp_path, {"vocab_size": VOCABULARY}).keys
    reference, library = AutoTokenizer.from_pretrained(tmp_path), load_library()
    with read_by(library, keys) as vocabulary:
        differing = [
            line
            for line in lines(300)
            if ids_of(library, vocabulary, line) != list(reference(line)["input_ids"])
        ]
    assert not differing, (keys["tokenizer.ggml.pre"], len(differing), differing[:3])


@pytest.mark.consumer
def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    steps = [
        pre_tokenizers.Split(Regex("[aeiou]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    byte_level(tmp_path, steps, begin=False)
    with pytest.raises(UnsupportedModelError, match="not one that"):
        tokenizer_keys(tmp_path, {"vocab_size": VOCABULARY})


def test_a_unigram_tokenizer_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.Unigram([("a", 0.0), ("<unk>", -1.0)], unk_id=1)).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UnsupportedModelError, match="Unigram"):
        tokenizer_keys(tmp_path, {"vocab_size": 2})


def test_rows_without_a_token_are_named_and_recorded(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "gpt-2")
    made = tokenizer_keys(folder, {"vocab_size": VOCABULARY + 5})
    tokens, types = made.keys["tokenizer.ggml.tokens"], made.keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    assert tokens[-1] == f"[PAD{VOCABULARY + 4}]" and types[-1] == 5
    assert any("named [PADn]" in note for note in made.notes)
    with pytest.raises(UnsupportedModelError, match="only 100 rows"):
        tokenizer_keys(folder, {"vocab_size": 100})


def as_vocabulary_and_merges(folder: Path) -> None:
    """The same tokenizer in the two files of old, for a class of transformers that reads them."""
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "</s>",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))


def test_a_tokenizer_of_vocabulary_and_merges_is_written_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "qwen2")
    as_vocabulary_and_merges(folder)
    keys = tokenizer_keys(folder, {"vocab_size": VOCABULARY}).keys
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.ggml.eos_token_id"] == 2


@pytest.mark.consumer
def test_llama_cpp_stops_at_every_token_that_ends_a_text(tmp_path: Path) -> None:
    """Those of generation_config.json and the tokenizer's own; a note names those that there is no key for."""
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    folder = model_folder(tmp_path / "model", "gpt-2")
    for ends in ([7], [7, 8, 9], [7, 8, 9, 10, 11]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        made = tokenizer_keys(folder, {"vocab_size": VOCABULARY, "eos_token_id": 300})
        assert stops_of(made.keys) == {2, *ends} and not made.notes
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(7, 14))}))
    made = tokenizer_keys(folder, {"vocab_size": VOCABULARY})
    assert stops_of(made.keys) == {2, 7, 8, 9, 10, 11}
    assert any("does not stop at 12, 13" in note for note in made.notes)


def stops_of(keys: Any) -> set[int]:
    """Ids at which llama.cpp ends a text, by its own word."""
    library = load_library()
    with read_by(library, keys) as vocabulary:
        return {index for index in range(VOCABULARY) if library.llama_vocab_is_eog(vocabulary, index)}


@pytest.mark.consumer
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    """Planted: the expression is one that llama.cpp has, and the digits are split before it."""
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    folder = model_folder(tmp_path / "model", "llama-bpe")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = SPLITS["qwen2"]
    state["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UnsupportedModelError, match=r"llama\.cpp reads 'Hello.*Use another --format"):
        tokenizer_keys(folder, {"vocab_size": VOCABULARY})


@pytest.mark.consumer
def test_what_llama_cpp_puts_around_special_tokens_is_noted(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    folder = model_folder(tmp_path / "model", "sentencepiece")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"], state["pre_tokenizer"] = None, {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(state))
    notes = " ".join(tokenizer_keys(folder, {"vocab_size": VOCABULARY}).notes)
    assert "text that begins with a space" in notes and "text around special tokens" in notes


def test_a_token_twice_is_refused_before_llama_cpp_aborts_at_it(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "gpt-2")
    state = json.loads((folder / "tokenizer.json").read_text())
    word = next(text for text, index in state["model"]["vocab"].items() if index == 40)
    state["added_tokens"].append(
        {**state["added_tokens"][0], "id": VOCABULARY, "content": word, "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(state))
    try:
        tokens = tokenizer_keys(folder, {"vocab_size": VOCABULARY + 1}).keys["tokenizer.ggml.tokens"]
    except UnsupportedModelError as error:
        assert "twice" in str(error)
    else:  # a library that keeps one of them
        assert isinstance(tokens, list) and len(set(tokens)) == len(tokens)


def test_a_folder_without_a_tokenizer_makes_a_file_without_one(tmp_path: Path) -> None:
    made = tokenizer_keys(tmp_path, {"vocab_size": 10})
    assert made.keys == {"tokenizer.ggml.model": "none"} and "no tokenizer" in made.notes[0]
