"""The name under which exported folders import the model classes: their ``compot_modeling.py`` says so, old ones too.

The classes themselves are at home in `compot_deploy.transformers_plugin`.
"""

from __future__ import annotations

from typing import Any

from compot_deploy import transformers_plugin


def __getattr__(name: str) -> Any:
    return getattr(transformers_plugin, name)
