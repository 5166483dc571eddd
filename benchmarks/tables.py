"""What a model pays for its token embedding and output head at every grid, all linears as they are.

::

    python benchmarks/tables.py [MODEL --calibration TEXT] --evaluation TEXT [--samples 128] [--grids 4/32]

For each grid: bytes as stored packed, the KL divergence on held-out text after rounding to nearest and as a plan rounds
it (GPTQ), and the loss that a plan predicts. An output head that is not tied to the embedding is a table of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.embedded import MODEL
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import Batch
from compot_deploy.models.whole import whole_model
from compot_deploy.pipeline.compress import context_of
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.sensitivity import measure_sensitivities
from compot_deploy.planning.settings import resolve
from compot_deploy.planning.table_effects import known_effects
from compot_deploy.planning.tables import head_gram, measure_tables, round_table
from compot_deploy.recipe import Recipe

GRIDS = ("8/32", "4/32", "4/64", "4/128", "3/32", "3/64", "2/32", "2/64")
"""Bits and group."""


class Loss:
    """KL divergence of the model with one table replaced, on held-out text."""

    def __init__(self, context: PlanningContext, batches: Sequence[Batch]) -> None:
        self._task, self._model = context.source.task, whole_model(context.source)
        self._batches = batches
        self._original = [self._outputs(batch).half() for batch in batches]

    def __call__(self, name: str, table: Quantized) -> float:
        """The mean over positions."""
        weight = self._model.get_submodule(name).weight.data
        before = weight.clone()
        weight.copy_(table.dequantize().T)
        losses = [
            self._task.loss(original.float(), self._outputs(batch), batch.real)
            for original, batch in zip(self._original, self._batches, strict=True)
        ]
        weight.copy_(before)
        return sum(loss.total for loss in losses) / sum(loss.count for loss in losses)

    def _outputs(self, batch: Batch) -> Tensor:
        with torch.inference_mode():
            return self._task.output(self._model(**batch.arguments))


def main() -> None:
    """Print a table for each table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder; without, the model that ships")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--grids", nargs="+", default=GRIDS, help="bits/group")
    options = parser.parse_args()
    grids = tuple(Grid(*map(int, one.split("/"))) for one in options.grids)
    recipe = Recipe(
        model=options.model,
        calibration=options.calibration,
        samples=options.samples,
        bits=4.0,
        format=("huggingface",),
    )
    settings = resolve(recipe, open_source(options.model or MODEL))
    with tempfile.TemporaryDirectory() as work:
        context = context_of(settings, Path(work))
        start = time.process_time()
        collect_grams(context)
        grams = time.process_time()
        measure_sensitivities(context)
        effects = time.process_time()
        tables = measure_tables(context, dict.fromkeys(settings.precisions, grids))
        print(
            f"processor seconds: calibration {grams - start:.1f}, sensitivities {effects - grams:.1f}, "
            f"predictions of tables {time.process_time() - effects:.1f}"
        )
        loss = Loss(context, _held_out(context, options.evaluation, options.positions))
        for one in tables:
            known = known_effects(context.work)[one.name].gram(head_gram(context, one.name))
            print(
                f"{one.name}{' (embedding and head)' if context.source.tied else ''}, GPTQ pays: {one.gptq}"
            )
            print("| grid | bytes | to nearest | GPTQ | predicted | seconds |\n|---|---|---|---|---|---|")
            for candidate, grid in zip(one.candidates, grids, strict=True):
                nearest = loss(one.name, round_table(context.source, one.name, grid))
                start = time.process_time()
                made = round_table(context.source, one.name, grid, known)
                took = time.process_time() - start
                print(
                    f"| {grid} | {candidate.bytes:,} | {nearest:.5f} | {loss(one.name, made):.5f} | "
                    f"{one.loss(candidate):.5f} | {took:.1f} |",
                    flush=True,
                )


def _held_out(context: PlanningContext, path: str, positions: int) -> list[Batch]:
    """The first positions of a text, as calibration windows are cut."""
    text = Path(path).read_text(encoding="utf-8")[: 40 * positions]
    from transformers import AutoTokenizer

    tokens = torch.tensor(AutoTokenizer.from_pretrained(context.source.folder)(text)["input_ids"])
    length = len(context.windows.windows[0])
    windows = [window for window in tokens[:positions].split(length) if len(window) > 1]
    return [batch for window in windows for batch in context.source.task.batches([window])]


if __name__ == "__main__":
    main()
