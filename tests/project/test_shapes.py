"""Shapes of tensors are checked in every test, wherever the code writes them."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import shapes
import torch
from jaxtyping import Float, TypeCheckError
from shapes import checked_code, shape_names
from torch import Tensor

import compot_deploy
from compot_deploy.core.grid import Grid
from compot_deploy.quant.gptq import gptq

SOURCES = {
    str(Path(here) / name): (Path(here) / name).read_text(encoding="utf-8")
    for here, _, names in os.walk(Path(compot_deploy.__file__).parent, followlinks=True)
    for name in names
    if name.endswith(".py")
}
NAMES = shape_names(list(SOURCES.values()))


def test_a_wrong_shape_is_refused_where_it_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "EVERY", True)
    checked = shapes.checked(inspect.unwrap(gptq))
    with pytest.raises(TypeCheckError, match="gptq"):
        checked(torch.zeros(4, 3), torch.eye(5), Grid(4, 4))


def test_what_is_called_often_is_checked_at_first_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "EVERY", False)

    @shapes.checked
    def square(gram: Float[Tensor, "n n"]) -> None: ...

    @shapes.checked
    @dataclass(frozen=True)
    class Square:
        gram: Float[Tensor, "n n"]

    for made in (square, Square):
        refused = 0
        for _ in range(2 * shapes.OFTEN):
            try:
                made(torch.zeros(2, 3))
            except TypeCheckError:
                refused += 1
        assert refused == shapes.OFTEN + shapes.OFTEN // shapes.RARELY


def test_every_module_that_writes_shapes_checks_them() -> None:
    written = re.compile(rf"(?:: |-> )(?:\w+\[)*(?:{'|'.join(NAMES)})\b")
    modules = {path for path, source in SOURCES.items() if written.search(source)}
    checked = {path for path, source in SOURCES.items() if checked_code(source, path, NAMES)[1]}
    assert len(modules) > 40
    assert modules <= checked


def test_only_what_names_a_shape_is_checked() -> None:
    source = (
        "from jaxtyping import Float\n"
        "Gram = Float[Tensor, 'n n']\n"
        "class Held:\n"
        "    gram: Gram | None\n"
        "    def square(self) -> 'int': ...\n"
        "def plain(count: int) -> str:\n"
        "    def inner(*rows: dict[str, Float[Tensor, 'n']]): ...\n"
        "def shaped(gram: Gram) -> None: ...\n"
        "def returned() -> tuple[Float[Tensor, ''], int]: ...\n"
    )
    names = shape_names([source])
    assert names == {"Float", "Gram"}
    assert checked_code(source, "written.py", names)[1] == 4
    assert checked_code("def plain(count: int) -> str: ...", "plain.py", names) == (None, 0)
