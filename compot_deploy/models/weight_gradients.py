"""Gradients of a loss at the parameters of a model, block by block: one block's weights and their gradients in memory.

Forwards the inputs of all blocks are kept; backwards each block is loaded once more, run on them, and asked for the
gradients at its parameters, which are summed over the batches. See `compot_deploy.models.backward`, which asks the same
way for gradients at products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compot_deploy.models.backward import Flow, run_again, run_forwards
from compot_deploy.models.skeleton import unload
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch

Judge: TypeAlias = Callable[[Tensor, int], Tensor]
"""Output of the model for a batch, and the batch's number → gradient of a loss at that output."""

OUTSIDE = None
"""In the place of a block's path: what stands outside of all blocks."""


def gradients_backwards(
    source: ModelSource,
    model: Any,
    batches: Sequence[Batch],
    judge: Judge,
    wanted: Callable[[str | None], Sequence[str]],
    *,
    device: str = "cpu",
    step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str | None, dict[str, Tensor]]]:
    """Block after block, the last one first, and then what is outside: gradients by full name of the parameter.

    The caller may change the parameters of a block as soon as it has its gradients: nothing reads them again. What is
    given may lack parameters that the loss does not depend on.

    Args:
        source: the model, in float32.
        model: its skeleton, which is left as it was.
        batches: what it reads; those that are run at a time.
        judge: called once for each batch, in order.
        wanted: names of the parameters of a block, or of those outside.
        device: where to compute.
        step: called after every block, forwards and backwards.

    Raises:
        UnsupportedModelError: a block gives something else when it is run again.
    """
    blocks = source.layout.blocks
    flows = [Flow(gradients=[{}]) for _ in batches]
    outside = {name: model.get_parameter(name) for name in wanted(OUTSIDE)}
    sums: dict[str, Tensor] = {}

    def follow(flow: Flow, value: Tensor, gradient: Tensor) -> None:
        parts = flow.add(0, value, gradient, also=list(outside.values()))
        _add(sums, dict(zip(outside, parts, strict=True)))

    try:
        for parameter in outside.values():
            parameter.requires_grad_(True)
        stream = BlockStream(source, batches, device=device, finish=True, differentiates=True, model=model)
        with stream:
            run_forwards(stream, flows, len(blocks), step)
            numbers = iter(range(len(flows)))

            def behind(output: Tensor, batch: Batch, left: list[Tensor], head: Any) -> None:
                number = next(numbers)
                flows[number].left.append(left)
                flows[number].rows = stream.looked_up(number)
                with torch.no_grad():
                    gradient = judge(output, number)
                follow(flows[number], output, gradient)

            stream.finish_with(behind)
            step()
        for block in reversed(blocks):
            yield block, _through(source, model, block, flows, wanted(block), follow, device)
            step()
        yield OUTSIDE, sums
    finally:
        for parameter in outside.values():
            parameter.requires_grad_(False)


def _through(
    source: ModelSource,
    model: Any,
    block: str,
    flows: Sequence[Flow],
    names: Sequence[str],
    follow: Callable[[Flow, Tensor, Tensor], None],
    device: str,
) -> dict[str, Tensor]:
    """Gradients at the parameters of the last block of all flows; those at its inputs go on."""
    source.load(model, block, device=torch.device(device), dtype=torch.float32)
    module, prefix = model.get_submodule(block), f"{block}." if block else ""
    parameters = {name: module.get_parameter(name.removeprefix(prefix)) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums: dict[str, Tensor] = {}
    for flow in flows:
        again = run_again(module, block, flow)
        reached = again.reached(flow.gradients[0])
        if not reached:
            continue
        values, gradients = zip(*reached, strict=True)
        asked = [*again.own, *parameters.values()]
        parts = torch.autograd.grad(values, asked, gradients, allow_unused=True)
        for value, part in zip(again.before, parts, strict=False):
            if part is not None and value.requires_grad:
                follow(flow, value, part)
        _add(sums, dict(zip(parameters, parts[len(again.own) :], strict=True)))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    unload(module)
    return sums


def _add(sums: dict[str, Tensor], more: dict[str, Tensor | None]) -> None:
    for name, gradient in more.items():
        if gradient is not None and name in sums:
            sums[name] += gradient
        elif gradient is not None:
            sums[name] = gradient
