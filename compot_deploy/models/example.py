"""What a model is shown so that it can be looked at: the smallest input that its forward pass takes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from compot_deploy.models.tasks import Task

_SAMPLES: Final = 16_000
"""Of sound, for models that read it as it is: enough for every stem of convolutions."""


def example_of(model: nn.Module, task: Task, *, tokens: int = 4) -> dict[str, Tensor]:
    """Arguments of the forward pass of a model, of zeros.

    Args:
        model: of transformers, on whatever device.
        task: what it is for.
        tokens: how many.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    if not task.has_towers:
        return {"input_ids": ids}
    if not task.listens:
        source = torch.zeros(1, tokens + 1, dtype=torch.int64, device=device)
        return {"input_ids": source, "decoder_input_ids": ids}
    name = sound_argument(model)
    return {name: torch.zeros(1, *sound_sizes(model), device=device), "decoder_input_ids": ids}


def sound_argument(model: Any) -> str:
    """The argument of a speech model's forward pass that takes what is heard."""
    return str(model.main_input_name)


def sound_sizes(model: Any) -> tuple[int, ...]:
    """Sizes of what a speech model hears, without the batch: bands and frames of a window, or some samples."""
    config = model.config
    bands = getattr(config, "num_mel_bins", None)
    if bands is None:
        return (_SAMPLES,)
    # Whisper reads windows of one length: a convolution halves the frames.
    return int(bands), 2 * int(config.max_source_positions)
