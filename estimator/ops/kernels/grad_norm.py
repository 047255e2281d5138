"""Sum of squares of many tensors and overflow check."""

from __future__ import annotations

from collections.abc import Iterable

from estimator.ops.kernels.chip import Tile
from estimator.ops.kernels.tables import n_chunks, rounded_chunk
from estimator.ops.operator import Op

UNROLL = 4
_CHUNK = 16_384
RESULT_BYTES = 8
"""fp32 sum of squares and overflow flag."""


def chunk_elements(tile: Tile, itemsize: int) -> int:
    """Elements that one block sums."""
    return rounded_chunk(_CHUNK, tile.threads * (16 // itemsize) * UNROLL)


def partial_bytes(sizes: Iterable[int], tile: Tile, itemsize: int) -> int:
    """Bytes of the chunks' own results, two fp32 each: there during one call on tensors of ``sizes`` elements."""
    return 8 * n_chunks(sizes, chunk_elements(tile, itemsize))


def cost(numel: int, dtype: str, itemsize: int) -> Op:
    """One call on ``numel`` elements; tables and partial sums (24 bytes for 16,384 elements) are left out."""
    return Op("grad_norm", "elementwise", False, dtype, 3 * numel, numel * itemsize, launches=2)
