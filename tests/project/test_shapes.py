"""Shapes of tensors are checked in every test, wherever the code writes them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import checked_code, shape_names

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


def test_a_wrong_shape_is_refused_where_it_is_passed() -> None:
    with pytest.raises(TypeCheckError, match="gptq"):
        gptq(torch.zeros(4, 3), torch.eye(5), Grid(4, 4))


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
