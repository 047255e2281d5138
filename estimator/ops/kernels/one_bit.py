"""Signs of gradients with a scale per block."""

from __future__ import annotations

from estimator.ops.kernels.chip import ceil_div
from estimator.ops.operator import Op


def sign_bytes(numel: int) -> int:
    """Bytes of the signs of ``numel`` elements."""
    return ceil_div(numel, 8)


def stored_bytes(numel: int, block: int) -> int:
    """Bytes of signs and scales (one fp32 for each ``block`` elements)."""
    return sign_bytes(numel) + 4 * ceil_div(numel, block)


def cost(numel: int, block: int, dtype: str, itemsize: int, *, pieces: int = 1) -> tuple[Op, Op]:
    """``one_bit_pack`` of ``numel`` elements, and ``one_bit_sum`` of so many ``pieces``; elements of ``dtype``."""
    stored = stored_bytes(numel, block)
    return (
        Op("one_bit_pack", "elementwise", False, dtype, 4 * numel, numel * (itemsize + 8) + stored),
        Op("one_bit_sum", "elementwise", False, dtype, (pieces + 1) * numel, pieces * stored + numel * itemsize),
    )
