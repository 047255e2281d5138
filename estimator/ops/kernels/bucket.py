"""Many tensors copied into a flat one and back, or scaled in place."""

from __future__ import annotations

from estimator.ops.kernels.chip import Tile
from estimator.ops.kernels.tables import rounded_chunk
from estimator.ops.operator import Op

_CHUNK = 8192


def chunk_elements(tile: Tile, itemsize: int) -> int:
    """Elements that one block copies; ``itemsize``: bytes of the wider of the two dtypes."""
    return rounded_chunk(_CHUNK, tile.threads * (16 // itemsize) * tile.unroll)


def cost(numel: int, source: tuple[str, int], target: tuple[str, int], *, scaled: bool) -> Op:
    """One copy of ``numel`` elements between two dtypes, each given as name and bytes; tables are left out."""
    narrow = min(source, target, key=lambda dtype: dtype[1])[0]
    n_bytes = numel * (source[1] + target[1]) + (4 if scaled else 0)
    return Op("bucket_copy", "elementwise", False, narrow, numel if scaled else 0, n_bytes)
