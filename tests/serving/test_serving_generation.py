"""Laws of an answer: draws follow the model, pieces join to the text, turns come in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from servers import ToyEngine
from tokenizers import Tokenizer, decoders, models

from compot_deploy.serving.engines import Opened
from compot_deploy.serving.generation import Chooser, ClientLeftError, Piece, Service, Text, Turns, scores
from compot_deploy.serving.request import RequestError, Sampling

LETTERS = "ab\u00e9\u20ac\U0001f600 "


def pieces(text: bytes, **sampling: object) -> list[Piece]:
    service = Service(Opened(ToyEngine(text), "toy", None, {}))
    return list(service.answer([1], Sampling(**{"temperature": 0.0, "max_tokens": 500, **sampling})))  # type: ignore[arg-type]


def test_draws_follow_the_probabilities_and_top_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def shares(temperature: float, top_p: float) -> np.ndarray:
        choose = Chooser(Sampling(temperature=temperature, top_p=top_p, seed=7))
        return np.bincount([choose(logits) for _ in range(2000)], minlength=4) / 2000

    assert np.abs(shares(1.0, 1.0) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert np.abs(shares(1.0, 0.7) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert np.abs(shares(0.5, 1.0) - np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365).max() < 0.03
    assert shares(1.0, 0.0)[0] == shares(0.0, 1.0)[0] == 1


def test_scores_are_logarithms_of_the_probabilities_at_temperature_one() -> None:
    logits = np.log(np.array([0.15, 0.5, 0.3, 0.05], np.float32)) + 3
    told = scores(logits, 3, 2)
    assert [token for token, _ in told] == [3, 1, 2]
    assert np.allclose(np.exp([logprob for _, logprob in told]), [0.05, 0.5, 0.3], rtol=1e-6)
    assert scores(np.array([0, -np.inf], np.float32), 1, 0) == ((1, -9999.0),)  # JSON has no infinity


def metaspace() -> Tokenizer:
    """As Llama 2 has it: words begin with a mark, bytes stand for what has no token, the first space is dropped."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁", "▁▁", "c", "▁the"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "byte level"])
def decode(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[int]], str]:
    if request.param == "bytes":
        return ToyEngine(b"").decode
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer_files(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda tokens: str(tokenizer.decode(list(tokens)))


@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from(list(LETTERS.encode())))))
def test_pieces_join_to_the_text_of_all_tokens(
    decode: Callable[[Sequence[int]], str], tokens: list[int]
) -> None:
    text = Text(decode)
    assert "".join([*map(text.add, tokens), text.rest()]) == decode(tokens)


# A letter in bytes; or a token whose text depends on what stands before it, or that has none.
UNITS = st.one_of(
    st.sampled_from([[1 + byte for byte in letter.encode()] for letter in LETTERS]),
    st.sampled_from([[0], *([id] for id in range(257, 263))]),
)


@given(st.lists(UNITS))
def test_pieces_join_for_tokens_that_depend_on_what_stands_before(units: list[list[int]]) -> None:
    tokenizer, tokens = metaspace(), [token for unit in units for token in unit]
    text = Text(lambda ids: str(tokenizer.decode(list(ids))))
    assert "".join([*map(text.add, tokens), text.rest()]) == tokenizer.decode(tokens)


def test_the_time_of_a_token_does_not_grow_with_the_text() -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return bytes(tokens).decode("utf-8", "replace")

    text = Text(decode)
    for byte in (LETTERS * 100).encode():
        text.add(byte)
    assert longest <= 8


@given(st.text(LETTERS, max_size=30), st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=4))
def test_a_stop_ends_the_text_where_it_is_first_complete(text: str, stops: list[str]) -> None:
    got = pieces(text.encode(), stop=tuple(stops), alternatives=0)
    # Slowly: the shortest beginning that holds a stop ends before the stop.
    whole, reason = text, "stop" if len(text.encode()) < 500 else "length"
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            whole = text[: min(found)]
            break
    assert "".join(piece.text for piece in got) == whole and got[-1].reason == reason
    told = [one for piece in got for one in piece.scored]
    assert "".join(one.text for one in told if "\ufffd" not in one.text) == "".join(
        letter for letter in whole if letter.isascii()
    )
    assert [one.offset for one in told] == sorted(one.offset for one in told)


def test_an_answer_of_all_its_tokens_ends_by_length() -> None:
    assert pieces(b"abcdef", max_tokens=3)[-1].reason == "length"
    assert pieces(b"abc", max_tokens=4)[-1].reason == "stop"
    assert "".join(piece.text for piece in pieces("\u20ac".encode()[:2])) == "\ufffd"


def test_an_answer_nobody_waits_for_is_not_computed() -> None:
    engine = ToyEngine(b"a" * 100)
    service = Service(Opened(engine, "toy", None, {}))
    with pytest.raises(ClientLeftError):
        list(service.answer([1], Sampling(), lambda: engine.computed >= 3))
    assert engine.computed == 3
    assert len(list(service.answer([1], Sampling(max_tokens=2)))) == 3  # and the next has its turn


def test_turns_come_in_order_and_who_leaves_is_passed_over() -> None:
    turns, order, left = Turns(most=10), [], threading.Event()

    def come(number: int) -> None:
        try:
            with turns.turn(lambda: number == 1 and left.is_set()):
                order.append(number)
        except ClientLeftError:
            order.append(-number)

    with turns.turn(lambda: False):
        threads = []
        for number in range(4):
            threads.append(threading.Thread(target=come, args=[number]))
            threads[-1].start()
            while len(turns._tickets) < number + 2:
                time.sleep(0.001)
        left.set()
        threads[1].join(10)
        assert order == [-1]
    for thread in threads:
        thread.join(10)
    assert order == [-1, 0, 2, 3]


def test_more_than_may_wait_are_told_so() -> None:
    turns = Turns(most=1)
    with (
        turns.turn(lambda: False),
        pytest.raises(RequestError, match="1 requests wait already") as raised,
        turns.turn(lambda: False),
    ):
        pass
    assert raised.value.status == 503
    with turns.turn(lambda: False):
        pass
