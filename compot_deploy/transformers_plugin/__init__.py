"""Compressed models as transformers models: saved, loaded, generated with, fine-tuned like any other.

``import compot_deploy`` is enough for ``AutoModelForCausalLM.from_pretrained`` and its like; this package gives
the classes by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compot_deploy.transformers_plugin.configuration import CompotConfig
    from compot_deploy.transformers_plugin.filling import from_compressed

__all__ = ["CompotConfig", "from_compressed"]

_HOMES = {
    "CompotConfig": "configuration",
    "from_compressed": "filling",
}


def __getattr__(name: str) -> Any:
    # transformers is imported by whoever needs a model class, not by whoever reads a layout.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.startswith("Compot"):
        doors = importlib.import_module(f"{__name__}.doors")
        if name in doors.DOORS:
            return doors.DOORS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
