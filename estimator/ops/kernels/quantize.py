"""Blockwise quantisation, and the sum of several quantised tensors."""

from __future__ import annotations

from estimator.ops.kernels.chip import ceil_div
from estimator.ops.operator import Op

FORMAT_BITS = {"int8": 8, "int4": 4, "e4m3": 8, "e5m2": 8}
"""Bits of a code by the format's name."""


def code_bytes(numel: int, format: str) -> int:
    """Bytes of the codes of ``numel`` elements."""
    return ceil_div(numel * FORMAT_BITS[format], 8)


def stored_bytes(numel: int, format: str, block: int) -> int:
    """Bytes of codes and scales (one fp32 for each ``block`` elements)."""
    return code_bytes(numel, format) + 4 * ceil_div(numel, block)


def cost(
    numel: int, format: str, block: int, dtype: str, itemsize: int, *, pieces: int = 1, stochastic: bool = False
) -> tuple[Op, Op]:
    """``quantize`` of ``numel`` elements, and ``dequantize_sum`` of so many ``pieces``; elements of ``dtype``."""
    stored, seed = stored_bytes(numel, format, block), 8 if stochastic else 0
    return (
        Op("quantize", "elementwise", False, dtype, (5 if stochastic else 4) * numel, numel * itemsize + stored + seed),
        Op("dequantize_sum", "elementwise", False, dtype, (2 * pieces + 1) * numel, pieces * stored + numel * itemsize),
    )
