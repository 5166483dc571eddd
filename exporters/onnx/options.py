"""What there is to choose about an ONNX folder."""

from __future__ import annotations

from dataclasses import dataclass

from compot_deploy.errors import RecipeError
from compot_deploy.exporters.onnx.nodes import FloatType
from compot_deploy.exporters.onnx.storage import OnnxCodes, OnnxOps


@dataclass(frozen=True)
class OnnxOptions:
    """What there is to choose about the folder.

    Attributes:
        ops: ``matmulnbits``: the contrib operator, 2, 4 and 8 bits; ``qdq``: linears as the standard
            DequantizeLinear and MatMul, 4 and 8 bits, which ONNX Runtime fuses to the same kernel when it
            loads. Attention, norms and the embedding are contrib operators either way.
        context: longest sequence, prompt and answer together; None takes the model's own. The rotary tables
            take 4·head_size bytes for each token of it.
        floats: type in which floating-point matrices are stored. It must hold them exactly; bfloat16 and
            float16 halve the file of an unquantized checkpoint of that type, and are cast when loaded.
        codes: ``dense``: an exact zero takes as much as any other code; ``packed``: 4-bit codes of the
            pattern 2:4 take 3 bits in the file instead of 4, and integers of 3 bits can be written at all; both
            are expanded when the file is loaded, to the graph, speed and memory of 4 bits. Others lie dense
            either way. Only with ``matmulnbits``.

    Raises:
        RecipeError: packed codes with ``qdq``.
    """

    ops: OnnxOps = "matmulnbits"
    context: int | None = None
    floats: FloatType = "float32"
    codes: OnnxCodes = "dense"

    def __post_init__(self) -> None:
        if self.codes == "packed" and self.ops != "matmulnbits":
            raise RecipeError(
                f"--onnx-codes packed expands to MatMulNBits and cannot be written as --onnx-ops {self.ops}: "
                "leave one of them out."
            )
