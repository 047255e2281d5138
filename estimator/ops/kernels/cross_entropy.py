"""Softmax cross-entropy over the vocabulary."""

from __future__ import annotations

from estimator.ops.operator import Op


def cost(
    n_rows: int, vocab_size: int, dtype: str, itemsize: int, *, reduction: str = "mean", early_gradient: bool = False,
    factor_is_one: bool = True,
) -> tuple[Op, Op]:  # fmt: skip
    """Forward and backward of one ``cross_entropy`` call that ignores no row.

    With ``early_gradient`` the second read of a row is from cache, and the backward pass multiplies the logits by the loss's
    own gradient unless ``factor_is_one``. In fp16 the factor holds a mean's number of rows, so that it never is.
    """
    n, size = n_rows * vocab_size, n_rows * vocab_size * itemsize
    mean, summed = reduction == "mean", reduction != "none"
    over_rows = mean * (8 * n_rows + 8) + summed * (4 * n_rows + 4 + 4 * mean)
    launches = 1 + mean + summed
    if not early_gradient:
        moved = 2 * size + 16 * n_rows + (4 if summed else 4 * n_rows) + 4 * mean
        return (
            Op("cross_entropy", "loss", False, dtype, 4 * n, size + 20 * n_rows + over_rows, launches=launches),
            Op("cross_entropy_backward", "loss", True, dtype, 4 * n, moved),
        )
    later = mean and dtype == "fp16"
    moved = 2 * size + 12 * n_rows + over_rows + (4 if mean and not later else 0)
    scaled = later or not factor_is_one
    return (
        Op("cross_entropy", "loss", False, dtype, 8 * n, moved, launches=launches),
        Op(
            "cross_entropy_backward", "loss", True, dtype, n * scaled, 4 + 2 * size * scaled + 12 * later,
            launches=1 + later,
        ),
    )  # fmt: skip
