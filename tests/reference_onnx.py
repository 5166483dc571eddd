"""Slow, obvious versions of what the ONNX exporter does, to test against."""

from __future__ import annotations

from compot_deploy.weights import Quantized


def reference_nbits_bytes(matrix: Quantized) -> list[list[bytes]]:
    """The MatMulNBits bytes, bit by bit: one number per block, code j shifted by j·bits."""
    rows, outputs = matrix.shape
    bits, group = matrix.grid.bits, matrix.grid.group
    result = []
    for output in range(outputs):
        blocks = []
        for start in range(0, rows, group):
            number = 0
            for j in range(group):
                integer = int(matrix.integers[start + j, output]) if start + j < rows else 0
                number += (integer + 2 ** (bits - 1)) << (j * bits)
            blocks.append(number.to_bytes(group * bits // 8, "little"))
        result.append(blocks)
    return result


def reference_blocked_bytes(matrix: Quantized) -> bytes:
    """The DequantizeLinear bytes: signed integers row by row, one number for all of them."""
    bits = matrix.grid.bits
    number = 0
    for j, integer in enumerate(matrix.integers.flatten().tolist()):
        number += (integer % 2**bits) << (j * bits)
    return number.to_bytes(-(-matrix.integers.numel() * bits // 8), "little")
