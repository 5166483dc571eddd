"""Ask what a budget would be spent on, before anything is exported.

Each matrix gets the scheme that costs the model least for its bytes: plain integers of some grid, or a dictionary with
codes. To be quick, the first two blocks of the model that ships stand for a model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from compot_deploy.embedded import MODEL
from compot_deploy.pipeline.deploy import plan

BITS = 2.2


def first_blocks(folder: Path, blocks: int) -> Path:
    """The model that ships, cut short."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    model.config.layer_types = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def main() -> None:
    """Plan, and print one line per choice."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = first_blocks(Path(scratch) / "two-blocks", 2)
        out = str(Path(scratch) / "out")
        draft = plan(str(folder), bits=BITS, samples=8, length=64, out=out, evaluation_tokens=256)
        chosen = draft.plans[0]
        for choice in chosen.chosen:
            names = ", ".join(name.removeprefix("model.layers.") for name in choice.names)
            print(f"{names:<60} {choice.candidate.scheme!s:>24} {choice.candidate.bytes:>8,} bytes")
        weights = sum(rows * columns for rows, columns in draft.sizes.values())
        print(
            f"{chosen.bytes:,} of {chosen.budget:,} bytes, {chosen.bytes * 8 / weights:.3f} bits per weight "
            f"(asked: {BITS})"
        )


if __name__ == "__main__":
    main()
