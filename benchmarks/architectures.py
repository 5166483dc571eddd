"""Tiny random models of the architectures that people ship, each planned, exported, and checked; a table of what works.

::

    python benchmarks/architectures.py [--only TYPE ...] [--formats onnx gguf huggingface] [--bits 2.5] [--out TABLE.md]

For each type and format: whether the plan at so many bits per weight was made, the folder written and `check` passed,
and how far the file's outputs are from torch's with the same matrices: the largest difference over the spread of the
outputs, every quantized product computed in float32. More than 1e-4 is a failure, and so is a file that cannot be made;
what the code refuses before any work stands there in its own words. The exit code is 1 if something failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tiny_architectures import KINDS, save, write_text

from compot_deploy import check, deploy
from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.accuracy.texts import OnnxTexts, TorchTexts
from compot_deploy.errors import CompotDeployError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import Task
from compot_deploy.models.whole import model_of

LARGEST = 1e-4
"""Difference over the spread of outputs that is rounding."""

LENGTHS = (40, 33)
"""Of the texts that torch and the file are compared on, padded side by side."""

LOOSE: dict[str, dict[str, float]] = {
    "generation": {"max_kl": 1e3},
    "embedding": {"min_cosine": -1.0},
    "token-classification": {"max_kl": 1e3},
}
"""Limits that every random model meets: its accuracy at so few bits says nothing."""


_LEAST = {"gguf": 5.0}
"""Bits per weight below which a format has no plan: a dense GGUF file multiplies factors out, and Q4_0 takes 4.5."""


@dataclass(frozen=True)
class Row:
    """What came of one type in one format.

    Attributes:
        kind: of the model.
        format: as ``--format`` takes it.
        said: what it is or why not, for the table.
        difference: the file's from torch's; None where it was not measured.
        refused: the code refused it before any work.
        seconds: for all of it.
    """

    kind: str
    format: str
    said: str
    difference: float | None
    refused: bool
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether this is neither a refusal nor right."""
        return not self.refused and (self.difference is None or not self.difference < LARGEST)


def rows(kind: str, formats: Sequence[str], bits: float, place: Path) -> list[Row]:
    """One type in every format."""
    folder, found = save(place / "model", kind), []
    text = write_text(place / "text.txt")
    for form in formats:
        start = time.monotonic()
        said, difference, refused = _made(folder, text, form, bits, place / form)
        found.append(Row(kind, form, said, difference, refused, time.monotonic() - start))
    return found


def _made(folder: Path, text: Path, form: str, bits: float, out: Path) -> tuple[str, float | None, bool]:
    """What is said of it, the difference, and whether it was refused."""
    try:
        source = open_source(folder)
        objection = EXPORTERS[form].supports(source)
        task = source.task
    except CompotDeployError as error:
        return _short(error, folder), None, True
    if objection is not None:
        return objection, None, True
    limits: dict[str, Any] = LOOSE[task.kind]
    try:
        deploy(
            str(folder),
            out=str(out),
            format=(form,),
            bits=max(bits, _LEAST.get(form, 0.0)),
            calibration=str(text),
            samples=6,
            length=32,
            evaluation_tokens=256,
            search="predicted",
            **limits,
        )
        found = check(out, reference=str(folder), limits=limits)
        difference = _difference(out, task) if form == "onnx" else _of_report(found.report)
    except CompotDeployError as error:
        return _short(error, folder), None, False
    except Exception as error:  # a benchmark of many goes on
        return f"{type(error).__name__}: {_short(error, folder)}", None, False
    criteria = found.report.accuracy.gate.criteria
    failed = [one.sentence for one in criteria if not one.passed]
    return ("passed", difference, False) if found.passed else (", ".join(failed), None, False)


def _difference(out: Path, task: Task) -> float:
    """Of an ONNX folder's outputs from torch's with the same matrices."""
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(3, 256, (length,), generator=generator) for length in LENGTHS]
    model = model_of(EXPORTERS["onnx"].read_model(out))
    if task.generates:  # the rest of the text behind a cache
        runner, tokens = OnnxRunner(out, 0), windows[0][None]
        with torch.no_grad():
            wanted, found = model(tokens).logits, torch.cat(list(runner.logits(tokens, LENGTHS[1])), 1)
        return float((found - wanted).abs().max() / wanted.std())
    (batch,) = task.batches(windows)
    wanted, found = TorchTexts(model, task).outputs(batch), OnnxTexts(out, exact=True).outputs(batch)
    if wanted.dim() == 3:
        wanted, found = wanted[batch.real], found[batch.real]
    return float((found - wanted).abs().max() / wanted.std())


def _of_report(report: Any) -> float:
    """Of any other folder, on the text that it was evaluated on: the root of the mean square."""
    return float(report.accuracy.export_reference.comparison.nmse) ** 0.5


def _short(error: Exception, folder: Path) -> str:
    return str(error).replace(f"{folder}: ", "").strip().partition(". ")[0]


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| model type | format | result | difference | s |", "|---|---|---|---|---|"]
    for row in found:
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        said = f"refused: {row.said}" if row.refused else row.said
        lines.append(f"| {row.kind} | {row.format} | {said} | {difference} | {row.seconds:.0f} |")
    right = {row.kind for row in found if not row.refused and not row.failed}
    lines.append(f"\n{len(right)} types in some format, {sum(row.failed for row in found)} failures.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Everything, or what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), default=list(KINDS), metavar="TYPE")
    parser.add_argument("--formats", nargs="+", choices=sorted(EXPORTERS), default=["onnx"])
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for kind in options.only:
        with tempfile.TemporaryDirectory() as place:
            found += rows(kind, options.formats, options.bits, Path(place))
        print(
            *table(found[-len(options.formats) :]).splitlines()[2:-2], sep="\n", file=sys.stderr, flush=True
        )
    print(table(found))
    if options.out is not None:
        options.out.write_text(table(found), encoding="utf-8")
    return int(any(row.failed for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
