"""Model and tokens to one Gram matrix per shared input, block by block.

``G = Σ xᵀx`` over every calibration token, x being the input that one or more linears of a block share.
One block and its activations are in memory at a time: weights are read from the checkpoint when their block
runs and dropped afterwards. Products are taken and summed in float64. Padding is excluded; because attention
is causal and padding stands on the right, it never reaches a real token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor, nn

from compot_deploy.errors import InputError
from compot_deploy.models.checkpoint import Checkpoint
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.models.transformers_versions import hidden_states_of

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Gram:
    """Second moments of one shared input.

    Attributes:
        matrix: shape (in, in), float64, ``Σ xᵀx``.
        tokens: how many rows x were summed.
    """

    matrix: Float64[Tensor, "inputs inputs"]
    tokens: int


def importance(gram: Float64[Tensor, "inputs inputs"]) -> Float32[Tensor, " inputs"]:
    """Mean square of each input relative to that of all: how much its rounding errors matter.

    The diagonal of the Gram over its mean, which is what llama.cpp calls an importance matrix.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    return (diagonal / mean if mean > 0 else torch.ones_like(diagonal)).float().contiguous()


Replacements: TypeAlias = Callable[[Mapping[str, Gram]], Mapping[str, Tensor]]
"""Grams of a block to the weights that it goes on with."""


class BlockStream:
    """Runs a decoder over calibration windows one block after the other.

    Call `advance` for block 0, 1, 2 …; each call moves the hidden states through that block. A caller that
    wants later blocks to see compressed earlier ones passes the replaced weights.
    """

    def __init__(self, checkpoint: Checkpoint, windows: TokenWindows, *, device: str, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype = getattr(torch, dtype)
        self._skeleton = _skeleton(checkpoint)
        self._batches = self._embed(windows)
        self._next = 0

    def advance(
        self, layer: int, *, capture: bool = True, replacements: Replacements | None = None
    ) -> dict[str, Gram]:
        """Run one block over every window.

        Args:
            layer: number of the block; must be the one after the last.
            capture: collect Grams; without, only the hidden states move on.
            replacements: makes, from the Grams, weights (in, out) by linear path inside the block. They take the
                place of the checkpoint's *after* the Grams were taken, so what flows on is the output of the
                compressed block.

        Returns:
            Shared input name to Gram; empty without `capture`.

        Raises:
            InputError: the weights of the block are damaged.
        """
        if layer != self._next:
            raise ValueError(f"Block {self._next} comes next, not block {layer}.")
        block = self._load(layer)
        grams: dict[str, Gram] = {}
        with torch.no_grad():
            if capture:
                grams = self._capture(block, keep_outputs=replacements is None)
            if replacements is not None:
                for path, weight in replacements(grams).items():
                    block.get_submodule(path).weight = nn.Parameter(
                        weight.T.to(self._device, self._dtype), requires_grad=False
                    )
            if not capture or replacements is not None:
                self._run(block)
        self._next += 1
        return grams

    # -- pieces ----------------------------------------------------------------------------------------

    def _embed(self, windows: TokenWindows) -> list[tuple[Tensor, Tensor]]:
        table = self._checkpoint.tensors[f"{self._checkpoint.architecture.embedding}.weight"]
        batches = []
        rows: list[Tensor] = []
        for window in windows.windows:
            longest = max([len(window), *(len(row) for row in rows)])
            if rows and longest * (len(rows) + 1) > TOKENS_PER_BATCH:
                batches.append(self._batch(rows, table))
                rows = []
            rows.append(window)
        batches.append(self._batch(rows, table))
        return batches

    def _batch(self, rows: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        real = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return table[ids].to(self._device, self._dtype), real.to(self._device)

    def _load(self, layer: int) -> nn.Module:
        prefix = self._checkpoint.architecture.block_path(layer) + "."
        block: nn.Module = self._skeleton.model.layers[layer]
        state = {}
        for name in block.state_dict():
            if prefix + name not in self._checkpoint.tensors:
                raise InputError(f"{self._checkpoint.folder}: the tensor {prefix + name} is missing.")
            state[name] = self._checkpoint.tensors[prefix + name].to(self._device, self._dtype)
        block.load_state_dict(state, assign=True)
        # The skeleton forgets the block as soon as its caller does: memory is one block.
        self._skeleton.model.layers[layer] = nn.Identity()
        return block.eval()

    def _arguments(self, hidden: Tensor) -> dict[str, Any]:
        length = hidden.shape[1]
        positions = torch.arange(length, device=self._device)[None]
        embeddings = self._skeleton.model.rotary_emb(hidden, positions)
        return {
            "position_embeddings": embeddings,
            "position_ids": positions,
            "attention_mask": self._mask(length),
            "use_cache": False,
        }

    def _mask(self, length: int) -> Tensor | None:
        config = self._skeleton.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or kinds[self._next] == "sliding_attention"
        if not slides or not window or window >= length:
            return None  # plain causal attention
        index = torch.arange(length, device=self._device)
        distance = index[:, None] - index[None]
        return ((distance >= 0) & (distance < window))[None, None]

    def _run(self, block: nn.Module) -> None:
        for number, (hidden, real) in enumerate(self._batches):
            self._batches[number] = (hidden_states_of(block(hidden, **self._arguments(hidden))), real)

    def _capture(self, block: nn.Module, *, keep_outputs: bool) -> dict[str, Gram]:
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        mask: list[Tensor] = []

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                rows = inputs[0][mask[0]].double()
                product = rows.T @ rows
                sums[name] = sums[name] + product if name in sums else product
                counts[name] = counts.get(name, 0) + len(rows)

            return collect

        handles = [
            block.get_submodule(shared.linears[0]).register_forward_pre_hook(hook(shared.name))
            for shared in self._checkpoint.architecture.inputs
        ]
        try:
            for number, (hidden, real) in enumerate(self._batches):
                mask[:] = [real]
                output = hidden_states_of(block(hidden, **self._arguments(hidden)))
                if keep_outputs:
                    self._batches[number] = (output, real)
        finally:
            for handle in handles:
                handle.remove()
        return {name: Gram(total.cpu(), counts[name]) for name, total in sums.items()}


def collect_grams(
    model: nn.Module,
    inputs: Mapping[str, str],
    batches: Callable[[], Any],
    forward: Callable[[Any], Any],
    mask: Callable[[Any], Bool[Tensor, "batch tokens"]],
) -> dict[str, Gram]:
    """Grams of any torch model that fits in memory; for encoders and other models without a block stream.

    Args:
        model: the whole model.
        inputs: name of a shared input to the path of a linear that reads it.
        batches: gives an iterable of batches.
        forward: runs the model on one batch.
        mask: which tokens of a batch are real, shape (batch, tokens).

    Returns:
        Name to Gram, float64.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    current: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Float[Tensor, "batch tokens inputs"], ...]], None]:
        def collect(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][current[0]].double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return collect

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(name)) for name, path in inputs.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches():
                current[:] = [mask(batch)]
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Gram(total.cpu(), counts[name]) for name, total in sums.items()}


def _skeleton(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # The rotary frequencies are computed, not stored: build that one small module for real.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model
