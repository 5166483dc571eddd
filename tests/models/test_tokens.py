"""Laws of calibration text: reproducible, within the vocabulary, never silently too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from compot_deploy.errors import InputError
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tokens import (
    load_tokenizer,
    make_windows,
    read_text,
    sample_from_model,
    windows_of_jsonl,
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
    windows = windows_of_jsonl(text, tokenizer, source="t", **COMMON)
    assert len(windows.windows) == 2
    assert len({len(window) for window in windows.windows}) == 2
    with pytest.raises(InputError, match="line 2 is not JSON"):
        windows_of_jsonl('{"text": "a"}\n{', tokenizer, source="t", **COMMON)
    with pytest.raises(InputError, match='line 1 has neither "text"'):
        windows_of_jsonl('{"prompt": "a"}', tokenizer, source="t", **COMMON)


def test_the_model_writes_the_same_text_twice_and_leaves_the_global_seed_alone(
    checkpoint: ModelSource,
) -> None:
    model, tokenizer = tiny.model("llama"), load_tokenizer(checkpoint.folder)
    state = torch.get_rng_state()
    first, second = (sample_from_model(model, tokenizer, batch=3, **COMMON) for _ in range(2))
    assert first.digest == second.digest
    assert torch.equal(torch.get_rng_state(), state)
    assert all(len(window) == 16 and int(window[0]) == 1 for window in first.windows)
