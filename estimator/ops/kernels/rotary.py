"""Rotary position embedding: what a call costs."""

from __future__ import annotations

from estimator.ops.operator import Op


def cost(
    shape: tuple[int, int, int, int], rotary_dim: int, dtype: str, itemsize: int, *, in_place: bool
) -> tuple[Op, Op]:
    """Forward and backward of one call on ``[B, S, H, D]`` with tables of the same dtype; backward is not in place."""
    batch, seq_len, heads, head_dim = shape
    rows = batch * seq_len * heads
    flops = 3 * rows * rotary_dim
    tables = seq_len * rotary_dim * itemsize
    moved = rotary_dim if in_place else head_dim
    return (
        Op("rotary", "elementwise", False, dtype, flops, 2 * rows * moved * itemsize + tables),
        Op("rotary_backward", "elementwise", True, dtype, flops, 2 * rows * head_dim * itemsize + tables),
    )
