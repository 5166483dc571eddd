"""Whether the graphs of a model of two towers compute what torch does, asked of a tiny one of the same features.

Before any work a random model of the same settings, with few blocks and small widths, is traced and written, and
onnxruntime is held against torch: texts side by side with padding, and one text token by token through the caches.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from compot_deploy.accuracy.towers import OnnxTowers, TorchTowers
from compot_deploy.core.matrix import Dense
from compot_deploy.errors import MissingDependencyError
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.traced import write
from compot_deploy.models.compressed import CompressedModel, tied_config
from compot_deploy.models.configuration import for_model
from compot_deploy.models.example import example_of
from compot_deploy.models.outline import outline_of_config
from compot_deploy.models.small import small_towers, with_random_weights
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Task, Utterance, task_of
from compot_deploy.models.whole import model_of

LIMIT: Final = 1e-4
"""Largest difference of a logit over the spread of logits."""

_LENGTHS: Final = ((9, 7), (5, 6), (7, 7))
"""Tokens that the encoder reads, where it reads tokens, and that the decoder is given."""


def towers_objection(source: ModelSource) -> str | None:
    """Why a model is not written to ONNX; None where both agree, where nobody can be asked, and for all other models.

    Raises:
        UnsupportedModelError: torch's exporter cannot trace it.
    """
    if not source.task.has_towers:
        return None
    layout = source.layout
    config = tied_config(source.config, layout.head, layout.tied)
    try:
        furthest = _difference(json.dumps(small_towers(config), sort_keys=True))
    except MissingDependencyError:
        return None
    if furthest <= LIMIT:
        return None
    return (
        f"a tiny {source.model_type} with the features of this one has other logits in onnxruntime than in torch: they "
        f"differ by {furthest:.2g} of their spread, and {LIMIT:g} is rounding. Use another --format."
    )


@lru_cache(maxsize=8)
def _difference(config: str) -> float:
    return difference(json.loads(config))


def difference(config: Mapping[str, Any]) -> float:
    """Largest difference of a logit between torch and onnxruntime over the spread of logits, for random weights.

    Args:
        config: of a small model.

    Raises:
        MissingDependencyError: onnxruntime or torch's exporter is not there.
        UnsupportedModelError: the model cannot be traced.
    """
    task = task_of(config)
    assert task is not None and task.has_towers
    with torch.random.fork_rng(devices=()), tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        folder = Path(place)
        made = _random(config, task, place)
        model = model_of(made)
        write(made, folder, OnnxOptions())
        one, other = TorchTowers(model, task), OnnxTowers(folder, exact=True, threads=1)
        utterances = _utterances(model, task, int(config["vocab_size"]))
        (batch,) = task.batches(utterances)
        wanted, found = one.outputs(batch), other.outputs(batch)
        furthest = float((found - wanted)[batch.real].abs().max())
        states: list[Any] = [None, None]
        for token in utterances[0].tokens.view(1, -1, 1).unbind(1):
            steps: list[Tensor] = []
            for number, begun in enumerate((one.begun(utterances[0]), other.begun(utterances[0]))):
                logits, states[number] = begun(token, states[number])
                steps.append(logits)
            furthest = max(furthest, float((steps[1] - steps[0]).abs().max()))
        return furthest / float(wanted[batch.real].std())


def _random(config: Mapping[str, Any], task: Task, place: str) -> CompressedModel:
    """A random model in the form that exporters take, nothing quantized."""
    import transformers

    settings = for_model(config)
    model = getattr(transformers, task.auto_class).from_config(settings).float().eval()
    with_random_weights(model)
    where = f"A tiny {settings.model_type}"
    named = {**config, "architectures": [type(model).__name__]}
    outline = outline_of_config(named, where)
    state = {
        name: value.detach()
        for name, value in {**model.state_dict(), **dict(model.named_parameters())}.items()
        if value.is_floating_point()
    }
    matrices = {
        name: Dense(outline.stored(name, state.pop(f"{name}.weight")).contiguous()) for name in outline.names
    }
    return outline.compressed(named, matrices, state, place)


def _utterances(model: Any, task: Task, vocabulary: int) -> list[Utterance]:
    """Something to read of several lengths, and tokens that are written of it."""
    found = []
    for read, written in _LENGTHS:
        tokens = torch.randint(vocabulary, (written,))
        if task.listens:
            argument, sound = next(iter(example_of(model, task).items()))
            found.append(Utterance(tokens, torch.randn(sound.shape[1:]), 1, argument))
        else:
            found.append(Utterance(tokens, torch.randint(vocabulary, (read,)), 1, "input_ids"))
    return found
