"""Dropout of a branch and its addition to the residual stream: what a call costs."""

from __future__ import annotations

from estimator.ops.operator import Op


def cost(numel: int, dtype: str, itemsize: int) -> tuple[Op, Op]:
    """Forward and backward of one call on ``numel`` elements."""
    n_bytes = numel * itemsize
    return (
        Op("dropout_residual", "elementwise", False, dtype, 2 * numel, 3 * n_bytes + 8),
        Op("dropout_residual_backward", "elementwise", True, dtype, numel, 2 * n_bytes + 8),
    )
