"""What there is to choose about a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compot_deploy.errors import RecipeError
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.index import LAYOUTS, Layout


@dataclass(frozen=True)
class GgufOptions:
    """What to write.

    Attributes:
        layout: ``dense`` (default, runs everywhere), ``factorized`` or ``sparse``.
        type: ggml type of the linears in a dense file. ``auto`` carries integers over exactly (Q4_0 up to 4
            bits, Q8_0 above) and takes Q8_0 for factors that are multiplied out. Other layouts ignore it.
        table_type: ggml type of a floating-point embedding or head. None: `type` when that is a floating
            type or Q8_0, F16 with ``auto``, otherwise Q8_0. In factorized files None keeps what it is.
        importance: linear to the diagonal of its Gram, shape (in,); weights the rounding of a dense file.
        name: ``general.name``; None takes the folder name of the source.
        provenance: written as ``compot.<key>``: recipe, calibration hash, versions.
    """

    layout: Layout = "dense"
    type: str = "auto"
    table_type: str | None = None
    importance: Mapping[str, Tensor] | None = None
    name: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise RecipeError(f"The GGUF layout {self.layout!r} does not exist. Use {', '.join(LAYOUTS)}.")
        if self.type != "auto":
            gguf_quantize.check_type(self.type)
        if self.table_type is not None:
            gguf_quantize.check_type(self.table_type)
