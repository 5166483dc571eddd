"""The slow way: a whole model in memory, as transformers loads it, every text read alone, looked at through hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compot_deploy.models.source import ModelSource


def loaded(folder: Path, auto_class: str) -> Any:
    """A model as transformers loads it, attention spelled out."""
    return getattr(transformers, auto_class).from_pretrained(folder, attn_implementation="eager").eval()


def hooked_grams(
    model: Any, names: Sequence[str], windows: Sequence[Tensor], change: Callable[[Any], None] | None = None
) -> Mapping[str, Tensor]:
    """``Σ xᵀx`` of the inputs of some modules, float64, one text at a time: there is no padding anywhere.

    Args:
        model: whole.
        names: paths of modules that multiply their input with a matrix.
        windows: texts as tokens.
        change: something to do to the model first.
    """
    if change is not None:
        change(model)
    sums: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(collect(name)) for name in names]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return sums


def outputs(model: Any, source: ModelSource, windows: Sequence[Tensor]) -> list[Tensor]:
    """What a whole model gives for each text."""
    with torch.no_grad():
        return [source.task.output(model(input_ids=window[None]))[0] for window in windows]


class Recorded(Mapping[str, Tensor]):
    """Tensors of a model; remembers which were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors
