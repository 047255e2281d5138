"""Head and cross-entropy together, in chunks of rows."""

from __future__ import annotations

from estimator.ops.kernels.chip import ceil_div
from estimator.ops.operator import Op

_LEAST_CHUNK_ROWS = 1024
_LINE_BYTES = 128


def default_chunk_rows(n_rows: int, width: int, vocab_size: int) -> int:
    """Rows of a chunk whose logits take about as much as the hidden states (Liger-Kernel's rule), but no fewer than 1024,
    below which reading the weight again for every chunk costs more than the products."""
    rows = max(_LEAST_CHUNK_ROWS, ceil_div(n_rows * width, vocab_size))
    return max(1, min(n_rows, 1 << (rows - 1).bit_length()))


def logits_stride(vocab_size: int, itemsize: int) -> int:
    """Elements from one row of a chunk's logits to the next: rows start at cache lines."""
    line = _LINE_BYTES // itemsize
    return ceil_div(vocab_size, line) * line


def cost(
    shape: tuple[int, int, int], dtype: str, itemsize: int, *, bias: bool = False, chunk_rows: int | None = None,
    factor_is_one: bool = True, of_weights: bool = True,
) -> tuple[list[Op], list[Op]]:  # fmt: skip
    """Forward and backward of one call on ``(rows, D, V)`` with gradients of everything (or of hidden states alone, where not
    ``of_weights``), reduction "mean", no row ignored.

    The backward pass multiplies the gradients by the loss's own gradient, unless ``factor_is_one``. In fp16 the factor holds
    the number of rows, so that it never is. The bias's gradient is one sum over each chunk in plain torch.
    """
    n_rows, width, vocab_size = shape
    rows = chunk_rows or default_chunk_rows(n_rows, width, vocab_size)
    weight, late = vocab_size * width, dtype == "fp16"
    forward = [Op("linear_cross_entropy", "loss", False, dtype, 0, 12 * n_rows + 16, launches=2)]
    for start in range(0, n_rows, rows):
        here = min(rows, n_rows - start)
        logits, h, w = here * vocab_size * itemsize, here * width * itemsize, weight * itemsize
        flops, moved = 2 * here * weight, 2 * logits + 12 * here + (0 if late else 4)
        forward += [
            Op("head", "matmul", False, dtype, flops, h + w + logits + bias * vocab_size * itemsize, (1, here, vocab_size, width)),
            Op("cross_entropy", "loss", False, dtype, 8 * here * vocab_size, moved),
            Op("head_grad_input", "matmul", True, dtype, flops, logits + w + h, (1, here, width, vocab_size)),
        ]  # fmt: skip
        if not of_weights:
            continue
        forward += [
            Op("head_grad_weight", "matmul", True, dtype, flops, logits + h + w * (2 if start else 1), (1, vocab_size, width, here)),
        ]  # fmt: skip
        if bias:
            moved = logits + vocab_size * (16 if start else 4)
            forward.append(
                Op("head_grad_bias", "elementwise", True, dtype, here * vocab_size, moved, launches=2 if start else 1)
            )
    bias = bias and of_weights
    n, scaled = (3 if bias else 2) if of_weights else 1, late or not factor_is_one
    numel = n_rows * width + weight * of_weights
    moved = 4 * n + scaled * 2 * (numel * itemsize + bias * 4 * vocab_size) + 20 * late
    backward = [
        Op(
            "linear_cross_entropy_backward", "loss", True, dtype, scaled * (numel + bias * vocab_size), moved,
            launches=n + 2 * late,
        )
    ]  # fmt: skip
    if bias and itemsize < 4:
        backward.append(Op("head_grad_bias", "elementwise", True, dtype, 0, vocab_size * (4 + itemsize)))
    return forward, backward
