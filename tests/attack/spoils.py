"""Ways to spoil an exported folder, as a mistake or an enemy would; each must fail, with and without the original.

    python tests/attack/spoils.py

Most of them write every hash anew afterwards, those of files and those of matrices: whoever can change a folder can do
that. The folder is of the model that ships, int8 in ONNX; what is called original is a copy of that model. Whoever
checks asks for a KL divergence of at most 0.01, forty times that of the sound export, but for the spoils that are about
limits of the folder's own.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

sys.path += [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]

import spoilt_papers
import spoilt_weights
import torch
from enemy import OWN_LIMITS, SPOILS, STRICT

from compot_deploy import check, deploy
from compot_deploy.embedded import MODEL
from compot_deploy.errors import CompotDeployError
from compot_deploy.pipeline.evaluation import REFERENCE

assert spoilt_papers and spoilt_weights, "imported for what they add to the ways"

LIMITS: Final = {"max_kl": 0.01}


def prepare(root: Path) -> Path:
    """The original, an export of it, and the reference file, kept elsewhere."""
    shutil.copytree(MODEL, root / "original")
    (made,) = deploy(
        str(root / "original"),
        method="plain",
        quant="int8",
        samples=4,
        length=64,
        evaluation_tokens=256,
        out=str(root / "out"),
    )
    assert made.passed
    shutil.copyfile(root / "out" / REFERENCE, root / "kept.safetensors")
    return root


def references(root: Path) -> dict[str, str]:
    """With the original, and without it."""
    return {"original": str(root / "original"), "reference file": str(root / "kept.safetensors")}


def fooled(root: Path, what: str, number: int) -> Iterator[str]:
    """Spoil a copy, and tell in which way the check was fooled; nothing if it was not."""
    place = root / f"spoilt-{number}"
    place.mkdir()
    folder = place / "out"
    shutil.copytree(root / "out", folder)
    SPOILS[what](folder)
    for how, reference in references(root).items():
        try:
            limits = {} if what in OWN_LIMITS else LIMITS
            found = check(folder, reference=reference, limits=limits, strict=what in STRICT)
        except CompotDeployError:
            continue
        except Exception as error:
            yield f"{what}: a traceback with the {how}: {type(error).__name__}: {error}"
            continue
        if found.passed:
            yield f"{what}: passes with the {how}"
    shutil.rmtree(place)


def main() -> int:
    """All of them."""
    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = prepare(Path(scratch))
        for reference in references(root).values():
            assert check(root / "out", reference=reference, limits=LIMITS, strict=True).passed
        for number, what in enumerate(SPOILS):
            began = time.process_time()
            found = list(fooled(root, what, number))
            wrong += found
            sys.stdout.write(f"{time.process_time() - began:5.1f} s  {'; '.join(found) or what}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(SPOILS)} ways, {len(wrong)} of {2 * len(SPOILS)} checks fooled\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
