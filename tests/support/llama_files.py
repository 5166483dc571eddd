"""GGUF files of tiny models, and what torch makes of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_gguf import compressed, shared_change

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.models.compressed import CompressedModel

EXACT = 1e-4

TOKENS = torch.randint(3, 320, (1, 50), generator=torch.Generator().manual_seed(3))
CHANGES: dict[str, Any] = {
    "factorized": shared_change(Grid(4, 64), DENSE, 0.6, head=4),
    "sparse": shared_change(Grid(4, 64), Pattern(2, 4), 0.6, head=4),
    "sparse 4:8": shared_change(Grid(4, 32), Pattern(4, 8), 0.6),
}


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(TOKENS).logits[0].float().numpy())


def exported(folder: Path, name: str, **options: Any) -> tuple[CompressedModel, Path]:
    layout = name.split()[0]
    model = compressed(folder, CHANGES.get(name), Grid(8, 64) if layout != "dense" else None)
    path = folder / f"{name.replace(' ', '-').replace(':', '')}.gguf"
    write(model, path, GgufOptions(layout=layout, **options))  # type: ignore[arg-type]
    return model, path
