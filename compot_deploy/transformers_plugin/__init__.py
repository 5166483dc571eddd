"""Compressed models as transformers models: saved, loaded, generated with, fine-tuned like any other.

``import compot_deploy`` is enough for ``AutoModelForCausalLM.from_pretrained`` and its like; this package gives
the classes by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compot_deploy.transformers_plugin.configuration import CompotConfig
    from compot_deploy.transformers_plugin.modeling import from_compressed

__all__ = ["CompotConfig", "from_compressed"]

_HOMES = {
    "CompotConfig": "configuration",
    "from_compressed": "modeling",
}


def __getattr__(name: str) -> Any:
    # transformers is imported by whoever needs a model class, not by whoever reads a layout.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.startswith("Compot"):
        modeling = importlib.import_module(f"{__name__}.modeling")
        if name in modeling.DOORS:
            return modeling.DOORS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
