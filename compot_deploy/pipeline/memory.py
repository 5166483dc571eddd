"""What a run takes of the memory of this machine, told before it starts where there is less.

Matrices are made with one block in memory and what all texts are in front of it; most is taken for the block's widest
input. A check holds a model in torch, as a whole where it is small, and after it the exported file. Estimated from
shapes, the larger of both is within a fifth of what was measured (see LOG.md)::

    making      program + what stands outside of the blocks + one block
                + Grams of its inputs + 4.5 float64 matrices of its widest input + 24 bytes per weight that reads it
                + 4.6 bytes for every number of the hidden states
    checking    program + the model, or what stands outside of its blocks and one block + logits + a byte per weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from compot_deploy.core.memory import free_memory
from compot_deploy.errors import InputError
from compot_deploy.models.paged import HELD
from compot_deploy.models.source import ModelSource
from compot_deploy.planning.settings import Settings

PROGRAM: Final = 450 * 2**20
"""Bytes of Python, torch, transformers and a runtime."""

_WHITENED: Final = 4.5
"""float64 matrices that whitening and GPTQ hold of an input at a time, its Gram left out."""

_MADE: Final = 24
"""Bytes per weight while it is made."""

_HIDDEN: Final = 4.6
"""Bytes per number of the hidden states: float32, and an eighth of them twice."""

_LOGITS: Final = 2**28
"""Bytes of logits that are compared, and of what a runtime takes beside the weights."""

_FEWEST_SAMPLES: Final = 8
"""Windows below which a calibration is not worth its name."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes.

    Attributes:
        fixed: to make matrices, whatever the text is.
        per_token: likewise, for each token of the calibration text.
        checking: to evaluate what was made.
    """

    fixed: int
    per_token: int
    checking: int

    def of(self, tokens: int) -> int:
        """With a calibration text of so many tokens."""
        return max(self.checking, self.fixed + self.per_token * tokens)


def need_of(source: ModelSource) -> Need:
    """What compressing a model takes, from its shapes alone."""
    layout, meta = source.layout, source.meta
    inside = tuple(f"{path}." for path in layout.blocks)
    outside = sum(value.numel() for name, value in meta.named_parameters() if not name.startswith(inside))
    block = making = 0
    for path in layout.blocks:
        block = max(block, sum(value.numel() for value in meta.get_submodule(path).parameters()))
        groups = layout.of(path)
        grams = sum(group.sites[0].inputs ** 2 for group in groups)
        for group in groups:
            weights = sum(site.inputs * site.outputs for site in group.sites)
            here = 8 * grams + 8 * _WHITENED * group.sites[0].inputs ** 2 + _MADE * weights
            making = max(making, int(here))
    hidden = int(getattr(source.settings.get_text_config(), "hidden_size", None) or 0)
    every = sum(value.numel() for value in meta.parameters())
    held = 4 * every if 4 * every <= HELD else 4 * (outside + block)
    return Need(
        fixed=PROGRAM + 4 * outside + 4 * block + making,
        per_token=int(_HIDDEN * hidden),
        checking=PROGRAM + held + _LOGITS + every,
    )


def check_memory(settings: Settings) -> None:
    """Refuse what this machine has no memory for.

    Args:
        settings: of the run. Those of a cluster and of other devices are not looked at: their memory is elsewhere.

    Raises:
        InputError: says what the run needs, what is there, and which option lowers it.
    """
    recipe, there = settings.recipe, free_memory()
    if there is None or recipe.cluster is not None or settings.device != "cpu":
        return
    need = need_of(settings.source)
    tokens = recipe.samples * recipe.length
    if need.of(tokens) <= there:
        return
    fitting = (there - need.fixed) // max(1, need.per_token * recipe.length)
    advice = "Use a machine with more memory, or --cluster."
    if fitting >= _FEWEST_SAMPLES and need.checking <= there:
        advice = f"Give --samples {fitting} or less, or a smaller --length."
    raise InputError(
        f"{settings.source.folder.name} needs about {_size(need.of(tokens))} of memory here, of which "
        f"{_size(need.per_token * tokens)} for a calibration text of {tokens:,} tokens, and {_size(there)} are free. "
        f"{advice}"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
