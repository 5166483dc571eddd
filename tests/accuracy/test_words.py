"""Laws of word errors: the fewest edits there are, none for what sounds the same, rates over all words."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from compot_deploy.accuracy.words import WordErrors, error_rate, word_errors, words_of


def slow_distance(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """By the definition: the last words are the same, or one is inserted, removed or replaced."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(one), len(other))


def test_errors_are_the_fewest_edits() -> None:
    draw = random.Random(0)
    for _ in range(200):
        one, other = (tuple(draw.choices("abc", k=draw.randrange(7))) for _ in range(2))
        found = word_errors(" ".join(one), " ".join(other))
        assert found == WordErrors(slow_distance(one, other), len(one))


@pytest.mark.parametrize(
    ("right", "written", "errors"),
    [
        ("The cat sat.", "the cat, sat", 0),
        ("It\u2019s twenty-one", "it's twenty one!", 0),
        ("the cat sat", "a cat sat down", 2),
        ("the cat sat", "", 3),
        ("", "word", 1),
    ],
)
def test_case_and_punctuation_are_not_heard(right: str, written: str, errors: int) -> None:
    assert word_errors(right, written).errors == errors


def test_words_keep_what_stands_inside_of_them() -> None:
    assert words_of("Don't stop: 3.5 m\u00fcde 'quoted'") == [
        "don't",
        "stop",
        "3",
        "5",
        "m\u00fcde",
        "quoted",
    ]


def test_a_rate_is_over_all_words_and_has_the_spread_of_texts() -> None:
    rate = error_rate([WordErrors(1, 10), WordErrors(3, 10)])
    assert math.isclose(rate.value, 0.2)
    assert math.isclose(rate.standard_error, 0.1)
    assert error_rate([WordErrors(2, 10)] * 5).standard_error == 0.0
    assert math.isnan(error_rate([]).value)
