"""compot-deploy: compress a transformer, ship it to edge devices, prove its accuracy.

::

    from compot_deploy import check, deploy, factorize, plan, Recipe

    (made,) = deploy("folder-or-hub-id", bits=2.5, out="small")
    assert made.passed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compot_deploy.silence import silence as _silence

_silence()  # before anything that would report home is imported

from compot_deploy import errors  # noqa: E402
from compot_deploy.transformers_plugin import registration as _registration  # noqa: E402

if TYPE_CHECKING:
    from compot_deploy.errors import CompotDeployError
    from compot_deploy.pipeline.check import Deployment, check
    from compot_deploy.pipeline.deploy import deploy, plan
    from compot_deploy.pipeline.in_memory import Factorization, factorize
    from compot_deploy.planning.draft import Draft
    from compot_deploy.recipe import Recipe
    from compot_deploy.report.document import Report

__version__ = "0.1.0"

__all__ = [
    "CompotDeployError",
    "Deployment",
    "Draft",
    "Factorization",
    "Recipe",
    "Report",
    "check",
    "deploy",
    "errors",
    "factorize",
    "plan",
]

_HOMES = {
    "CompotDeployError": "errors",
    "Deployment": "pipeline.check",
    "Draft": "planning.draft",
    "Factorization": "pipeline.in_memory",
    "Recipe": "recipe",
    "Report": "report.document",
    "check": "pipeline.check",
    "deploy": "pipeline.deploy",
    "factorize": "pipeline.in_memory",
    "plan": "pipeline.deploy",
}


def __getattr__(name: str) -> Any:
    # torch and transformers are imported by whoever uses them, not by whoever reads the version.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_registration.install()
