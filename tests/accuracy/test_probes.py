"""Laws of probes: far positions must be finite and exact, and what a model says must follow from what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.probes import LONGEST, Probes
from compot_deploy.models.tasks import GENERATION

VOCABULARY, CONTEXT = 40, 300
WINDOWS = [torch.arange(30), torch.arange(5, 35)]


class Reader:
    """A runner of a function of tokens and positions."""

    name, vocabulary, context = "reader", VOCABULARY, CONTEXT

    def __init__(self, say: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._say = say

    def logits(self, tokens: Tensor, chunk: int) -> Iterator[Tensor]:
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        for start in range(0, tokens.shape[1], chunk):
            yield self._say(tokens[:, start : start + chunk], places[:, start : start + chunk])

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        return (0,) * new_tokens


TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


def sound(tokens: Tensor, places: Tensor) -> Tensor:
    return TABLE[tokens] * (1 + places[..., None] / 1000)


def found(file: Callable[[Tensor, Tensor], Tensor], context: int = CONTEXT) -> dict[str, bool]:
    probes = Probes(GENERATION, WINDOWS, context, VOCABULARY)
    for role, say in (("reference", sound), ("compressed", sound), ("exact", file), ("exported", file)):
        probes.visit([role], Reader(say))
    return {one.name: one.passed for one in probes.criteria(Gate())}


def behind(position: int, value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda tokens, places: torch.where(places[..., None] > position, value, sound(tokens, places))


def test_a_sound_file_passes_all_of_them() -> None:
    assert found(sound) == {"long_nonfinite": True, "long_export_nmse": True, "input_dependence": True}
    # Windows that are as long as the context have seen everything.
    assert found(sound, context=30) == {"input_dependence": True}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_far_behind_the_windows_fails(value: float) -> None:
    assert not found(behind(100, value))["long_nonfinite"]


def test_what_is_wrong_far_behind_the_windows_fails() -> None:
    wrong = found(lambda tokens, places: sound(tokens, places) + (places[..., None] > 250) * TABLE[0])
    assert wrong == {"long_nonfinite": True, "long_export_nmse": False, "input_dependence": True}


@pytest.mark.parametrize(
    "say",
    [
        lambda tokens, places: torch.zeros(*tokens.shape, VOCABULARY),
        lambda tokens, places: TABLE[0].expand(*tokens.shape, VOCABULARY),
        lambda tokens, places: TABLE[places % VOCABULARY],
        lambda tokens, places: torch.ones(*tokens.shape, VOCABULARY) * tokens[..., None],
    ],
    ids=["zeros", "one distribution", "a distribution for each position", "constant over the vocabulary"],
)
def test_what_does_not_follow_from_the_text_fails(say: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not found(say)["input_dependence"]


def test_what_was_not_visited_fails() -> None:
    probes = Probes(GENERATION, WINDOWS, CONTEXT, VOCABULARY)
    assert not all(one.passed for one in probes.criteria(Gate()))


def test_the_long_window_is_bounded() -> None:
    read: list[int] = []

    def counted(tokens: Tensor, places: Tensor) -> Tensor:
        read.append(int(places.max()) + 1)
        return sound(tokens, places)

    Probes(GENERATION, WINDOWS, 10**6, VOCABULARY).visit(["exact"], Reader(counted))
    assert max(read) == LONGEST
