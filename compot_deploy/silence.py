"""Switches that keep the libraries below from reporting home; set before any of them is imported.

A model is compressed, evaluated and run on its owner's machine, and nobody else is told. onnxruntime from 1.32 on looks
its maker's host up and writes a device id below the home directory as soon as it is imported: the only thing that
stops it is its variable, set before. Whoever wants to report says so in the environment, which is never overruled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Final

SWITCHES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime, onnxruntime-genai
        "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and transformers, datasets, peft through it
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets
        "RAY_USAGE_STATS_ENABLED": "0",  # ray, and every process that it starts
    }
)
"""Variable to the value that silences whoever reads it."""

GENERAL: Final = "DO_NOT_TRACK"
"""What several libraries read beside their own variable (https://donottrack.sh)."""


def silence(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set each switch that the user has not set.

    The general one says no to everything, so it is left alone where the user has said anything about a single
    library; and a user who has set it to ``0`` wants none of this.
    """
    if environment.get(GENERAL, "1").strip().lower() in ("0", "false", "no", "off"):
        return
    if not any(name in environment for name in SWITCHES):
        environment.setdefault(GENERAL, "1")
    for name, value in SWITCHES.items():
        environment.setdefault(name, value)
