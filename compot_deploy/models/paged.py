"""A model too large to hold: the weights of a block come when it is called, and go when it has run.

Everything else of the model is in its place, so it is a model of transformers like any other, with caches and greedy
text; each call of it reads all weights once. What is small is held as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from compot_deploy.core.matrix import Matrix
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.sites import WHOLE
from compot_deploy.models.skeleton import unload
from compot_deploy.models.source import ModelSource
from compot_deploy.models.whole import fill, model_of, put_in, unfilled, whole_model

HELD: Final = 2**30
"""Bytes of float32 weights up to which a model is held as a whole."""


def original_to_run(
    source: ModelSource,
    matrices: Mapping[str, Matrix] | None = None,
    *,
    device: str | torch.device = "cpu",
    held: int = HELD,
) -> Any:
    """The original in float32, some of its matrices replaced; paged where it is large.

    Args:
        source: the model.
        matrices: that take the place of its own, by name; may read lazily from disk.
        device: where it runs.
        held: bytes up to which it is held as a whole.
    """
    given = matrices or {}
    if _bytes_of(source.meta) <= held or source.layout.blocks == (WHOLE,):
        return put_in(whole_model(source, device=device), source.sites, given)
    place = torch.device(device)
    model = source.skeleton(device=place, dtype=torch.float32, head=True)
    blocks = source.layout.blocks
    put_in(model, source.sites, {name: given[name] for name in given if not _inside(name, blocks)})

    sites = [name for name in given if name in source.sites]
    names = {path: [name for name in sites if _inside(name, (path,))] for path in blocks}

    def load(path: str) -> None:
        source.load(model, path, device=place, dtype=torch.float32)
        weights = {name: given[name].dequantize() for name in names[path]}
        source.replace(model.get_submodule(path), path, weights, torch.float32)

    return _paged(model, blocks, load)


def compressed_to_run(model: CompressedModel, *, held: int = HELD) -> Any:
    """A compressed model multiplied out, in float32; paged where it is large.

    Args:
        model: what an exporter is given, or reads back.
        held: bytes up to which it is held as a whole.

    Raises:
        InputError: see `model_of`.
    """
    made = unfilled(model)
    blocks = tuple(_blocks_of(made))
    if _bytes_of(made) <= held or not blocks:
        return model_of(model)
    fill(made, model, lambda name: not _inside(name, blocks))
    return _paged(made, blocks, lambda path: fill(made, model, lambda name: _inside(name, (path,))))


def _paged(model: Any, blocks: Sequence[str], load: Callable[[str], None]) -> Any:
    """Let each block bring its weights when it is called."""

    def paged(path: str, block: nn.Module) -> Any:
        run = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            load(path)
            try:
                return run(*args, **kwargs)
            finally:
                unload(block)

        return forward

    for path in blocks:
        block = model.get_submodule(path)
        unload(block)
        block.forward = paged(path, block)
    return model


def _blocks_of(model: nn.Module) -> Iterator[str]:
    """What stands in the outermost lists of a model: they hold one block after the other."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not _inside(path, lists):
            lists.append(path)
            yield from (f"{path}.{number}" for number in range(len(module)))


def _inside(name: str, paths: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{path}." for path in paths))


def _bytes_of(model: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())
