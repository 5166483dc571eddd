"""Shapes of tensors are checked while tests run: functions and dataclasses that write them are, no others.

The hook that jaxtyping has for pytest wraps every function of a package. Three quarters of ours say nothing about
shapes; to wrap them too was more than a third of the time that the tests took. mypy reads the other annotations.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

CHECK = f"__import__({__name__!r}).checked"

OFTEN = 100
"""Calls of a function that are checked, whatever happens."""

RARELY = 50
"""Of later calls, each so-many-th is checked."""

EVERY = os.environ.get("COMPOT_DEPLOY_EVERY_SHAPE") == "1"


def checked(stated: Any) -> Any:
    """A function, or a class, whose shapes are checked when it is called."""
    plain = stated.__init__ if isinstance(stated, type) else stated
    always = jaxtyped(stated, typechecker=beartype)
    if EVERY or inspect.isgeneratorfunction(stated):
        return always
    if isinstance(stated, type):
        always.__init__ = _now_and_then(plain, always.__init__)
        return always
    return _now_and_then(stated, always)


def _now_and_then(plain: Any, strict: Any) -> Any:
    calls = itertools.count()

    @functools.wraps(plain)
    def one_of_them(*arguments: Any, **options: Any) -> Any:
        call = next(calls)
        return (strict if call < OFTEN or call % RARELY == 0 else plain)(*arguments, **options)

    return one_of_them


_IMPORTED = re.compile(r"^from jaxtyping import (.+)$", re.M)


def shape_names(sources: Sequence[str]) -> frozenset[str]:
    """Names that stand for arrays of a shape: those of jaxtyping, and what a module calls a type made of them.

    >>> sorted(shape_names(["from jaxtyping import Float\\nGram = Float[Tensor, 'n n']"]))
    ['Float', 'Gram']
    """
    names = {
        name.strip() for source in sources for line in _IMPORTED.findall(source) for name in line.split(",")
    }
    if names:
        alias = re.compile(rf"^(\w+)(?:: TypeAlias)? = .*\b(?:{'|'.join(sorted(names))})\[", re.M)
        names.update(name for source in sources for name in alias.findall(source))
    return frozenset(names)


class Checks(ast.NodeTransformer):
    """Puts the check on each function, and on each class, whose annotations name a shape; `placed` counts them."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.placed = 0

    def _names_a_shape(self, annotations: Sequence[ast.AST | None]) -> bool:
        return any(
            isinstance(node, ast.Name) and node.id in self.names
            for annotation in annotations
            if annotation is not None
            for node in ast.walk(annotation)
        )

    def _check(self, node: Any) -> ast.expr:
        self.placed += 1
        decorator = ast.parse(CHECK, mode="eval").body
        for part in ast.walk(decorator):
            ast.copy_location(part, node)
        return decorator

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        if self._names_a_shape([node.returns, *(one and one.annotation for one in arguments)]):
            node.decorator_list.append(self._check(node))  # the innermost: it has the annotations
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        if self._names_a_shape([line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]):
            node.decorator_list.insert(0, self._check(node))  # the outermost: @dataclass comes first
        self.generic_visit(node)
        return node


def checked_code(source: str, path: str, names: frozenset[str]) -> tuple[CodeType | None, int]:
    """A module's code with its checks, and how many there are; no code where there are none."""
    if not any(name in source for name in names):
        return None, 0
    checks = Checks(names)
    tree = checks.visit(ast.parse(source, path))
    return compile(tree, path, "exec", dont_inherit=True), checks.placed


class _Loader(SourceFileLoader):
    names: frozenset[str] = frozenset()

    def get_code(self, fullname: str) -> CodeType | None:
        code, placed = checked_code(self.get_data(self.path).decode(), self.path, self.names)
        return code if placed else super().get_code(fullname)  # from __pycache__, like any other module


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package
        self.names: frozenset[str] | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        if self.names is None:
            self.names = shape_names(list(_sources(Path(spec.loader.path).parent)))
        loader = _Loader(spec.loader.name, spec.loader.path)
        loader.names = self.names
        spec.loader = loader
        return spec


def _sources(folder: Path) -> Iterator[str]:
    for here, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                yield (Path(here) / name).read_text()


def check_shapes_of(package: str) -> None:
    """From now on, whatever is imported of a package checks the shapes that it writes.

    Raises:
        RuntimeError: A part of it is imported already, and would go unchecked.
    """
    early = sorted(name for name in sys.modules if name == package or name.startswith(f"{package}."))
    if early:
        raise RuntimeError(f"imported before their shapes could be checked: {', '.join(early)}")
    sys.meta_path.insert(0, _Finder(package))
