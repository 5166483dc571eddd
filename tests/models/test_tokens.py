"""Laws of calibration text: reproducible, within the vocabulary, never silently too little."""

from __future__ import annotations

from pathlib import Path

import any_models
import pytest
import tiny
import torch
from transformers import AutoTokenizer

from compot_deploy.errors import InputError
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.text_files import read_text, records_of_lines
from compot_deploy.models.tokens import (
    load_tokenizer,
    make_windows,
    sample_from_model,
    windows_of_lines,
    windows_of_records,
    windows_of_text,
)

COMMON = {"samples": 4, "length": 16, "seed": 0, "vocabulary": 320}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(tiny.save(tmp_path_factory.mktemp("model") / "llama"))


def test_the_same_seed_draws_the_same_windows(checkpoint: ModelSource) -> None:
    tokenizer = load_tokenizer(checkpoint.folder)
    text = "".join(f"{tiny.WORDS}{number} " for number in range(20))
    first, second = (windows_of_text(text, tokenizer, source="t", **COMMON) for _ in range(2))
    other = windows_of_text(text, tokenizer, source="t", **(COMMON | {"seed": 1}))
    assert first.digest == second.digest != other.digest
    assert len(first.windows) == 4
    assert all(len(window) == 16 for window in first.windows)


def test_windows_start_as_the_model_expects(checkpoint: ModelSource) -> None:
    tokenizer = load_tokenizer(checkpoint.folder)
    assert tokenizer.first == (1,)
    windows = windows_of_text(tiny.WORDS * 20, tokenizer, source="t", **COMMON)
    assert all(int(window[0]) == 1 for window in windows.windows)


def test_fewer_windows_than_asked_for_are_noted(checkpoint: ModelSource) -> None:
    windows = windows_of_text(
        tiny.WORDS, load_tokenizer(checkpoint.folder), source="t", **(COMMON | {"samples": 1000})
    )
    assert "1000 were asked for" in windows.notes[0]


def test_a_long_text_is_sampled_from_all_over(checkpoint: ModelSource) -> None:
    text = "a" * 200_000 + tiny.WORDS * 3000
    windows = windows_of_text(text, load_tokenizer(checkpoint.folder), source="t", **COMMON)
    assert len(windows.windows) == 4
    assert len({tuple(window.tolist()) for window in windows.windows}) > 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b"  \n\n", "is empty"),
        (b"\xff\xfe\x00text", "is not UTF-8 text"),
        (b"text\0text", "is binary"),
    ],
)
def test_what_is_not_text_is_refused(content: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=named):
        read_text(path)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.txt does not exist"):
        read_text(tmp_path / "no.txt")


def test_too_short_a_text_is_refused_with_both_numbers(checkpoint: ModelSource) -> None:
    with pytest.raises(InputError, match=r"fewer than one window of 16"):
        windows_of_text("the fox", load_tokenizer(checkpoint.folder), source="t", **COMMON)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="token id 320, but the model knows ids 0 to 319"):
        make_windows([[1, 2], [3, 320]], "t", 320)


def test_json_lines_give_one_window_a_line(checkpoint: ModelSource) -> None:
    tokenizer = load_tokenizer(checkpoint.folder)
    text = '{"text": "the quick brown fox"}\n\n{"text": "lazy dog"}\n'
    windows = windows_of_records(records_of_lines(text, "t"), tokenizer, source="t", **COMMON)
    assert len(windows.windows) == 2
    assert len({len(window) for window in windows.windows}) == 2
    with pytest.raises(InputError, match="line 2 cannot be read: it is not JSON"):
        records_of_lines('{"text": "a"}\n{', "t")
    with pytest.raises(InputError, match='line 1 has neither "text"'):
        records_of_lines('{"prompt": "a"}', "t")


def test_the_model_writes_the_same_text_twice_and_leaves_the_global_seed_alone(
    checkpoint: ModelSource,
) -> None:
    model, tokenizer = tiny.model("llama"), load_tokenizer(checkpoint.folder)
    state = torch.get_rng_state()
    first, second = (sample_from_model(model, tokenizer, batch=3, **COMMON) for _ in range(2))
    assert first.digest == second.digest
    assert torch.equal(torch.get_rng_state(), state)
    assert all(len(window) == 16 and int(window[0]) == 1 for window in first.windows)


# -- whole texts, as encoders read them ------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(any_models.save(tmp_path_factory.mktemp("model") / "bert", "bert"))


LONG = COMMON | {"length": 64}
LINES = [
    "the quick brown fox jumps over the lazy dog",
    "too short",
    "a small model reads every word of this text and learns nothing",
    "   the quick brown fox jumps over the lazy dog  ",
    "",
    "because its weights are random numbers",
]


def test_a_whole_text_has_its_special_tokens_at_both_ends_and_is_cut(encoder: ModelSource) -> None:
    tokenizer = load_tokenizer(encoder.folder)
    own = AutoTokenizer.from_pretrained(encoder.folder)
    for length in (4, 9, 200):
        ids = tokenizer.whole(LINES[0], length)
        assert ids == own(LINES[0], truncation=True, max_length=length).input_ids
        assert ids[0] == 1 and ids[-1] == 2 and len(ids) <= length
    assert len(tokenizer.whole(LINES[0], 4)) == 4


def test_a_line_is_a_text_where_it_is_long_enough_and_new(encoder: ModelSource) -> None:
    tokenizer = load_tokenizer(encoder.folder)
    windows = windows_of_lines("\n".join(LINES), tokenizer, source="t", **LONG)
    expected = [tokenizer.whole(LINES[number], 64) for number in (0, 2, 5)]
    assert [window.tolist() for window in windows.windows] == expected
    assert "holds 3 lines of text; 4 were asked for" in windows.notes[0]
    assert len({len(window) for window in windows.windows}) > 1
    some = windows_of_lines("\n".join(LINES), tokenizer, source="t", **LONG | {"samples": 2})
    assert len(some.windows) == 2 and not some.notes
    assert {tuple(window.tolist()) for window in some.windows} < {tuple(ids) for ids in expected}
    again = windows_of_lines("\n".join(LINES), tokenizer, source="t", **LONG | {"samples": 2})
    assert again.digest == some.digest
    drawn = {
        windows_of_lines(
            "\n".join(LINES), tokenizer, source="t", **LONG | {"samples": 2, "seed": seed}
        ).digest
        for seed in range(8)
    }
    assert len(drawn) > 1


def test_lines_that_are_all_too_short_are_refused(encoder: ModelSource) -> None:
    with pytest.raises(InputError, match="no line of at least 20 characters"):
        windows_of_lines("a\nb\n" * 50, load_tokenizer(encoder.folder), source="t", **COMMON)


def test_json_lines_are_whole_texts_where_the_model_reads_those(encoder: ModelSource) -> None:
    tokenizer = load_tokenizer(encoder.folder)
    text = '{"text": "the quick brown fox"}\n{"text": "lazy dog"}\n'
    windows = windows_of_records(records_of_lines(text, "t"), tokenizer, source="t", whole=True, **COMMON)
    assert [window.tolist() for window in windows.windows] == [
        tokenizer.whole("the quick brown fox", 16),
        tokenizer.whole("lazy dog", 16),
    ]
