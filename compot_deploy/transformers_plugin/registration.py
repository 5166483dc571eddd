"""transformers learns of our model type when it is imported, not when we are: neither has to wait for the other.

``import compot_deploy`` stays cheap. As soon as transformers' tables of configurations and models exist (or if
they exist already), ours are entered, so ``AutoModelForCausalLM.from_pretrained`` knows the type ``compot``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import MappingProxyType, ModuleType
from typing import Any, Final

HOOKS: Final = MappingProxyType(
    {
        "transformers.models.auto.configuration_auto": "compot_deploy.transformers_plugin.configuration",
        "transformers.models.auto.modeling_auto": "compot_deploy.transformers_plugin.doors",
    }
)
"""Module of transformers → our module that enters itself there, and is imported once it has been executed."""


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of `HOOKS` as Python would, and imports ours after them."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        if fullname not in HOOKS or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute: Callable[[ModuleType], None] = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # Does nothing while ours is being imported, which is what imported theirs.
            importlib.import_module(HOOKS[fullname])

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Enter our types into transformers, now or when it is imported. Repeated calls do nothing."""
    if any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, AfterImport())
    for theirs, ours in HOOKS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
