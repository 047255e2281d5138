"""RMSNorm and LayerNorm: what a call costs, and how its threads lie over rows."""

from __future__ import annotations

from typing import NamedTuple

from estimator.ops.kernels.chip import Chip, aligned_pack, ceil_div
from estimator.ops.operator import Op


class NormCall(NamedTuple):
    """What the cost of a call depends on."""

    rows: int
    width: int
    dtype: str
    itemsize: int
    rms: bool
    bias: bool = False
    residual: bool = False
    dropout: bool = False
    n_partial: int = 0
    """Rows of partial weight gradients (``partial_rows``), written and read once; a few MB whatever the size of ``x``."""


def cost(call: NormCall) -> tuple[Op, Op]:
    """Forward and backward; weights have ``x``'s dtype and ``h`` has a gradient of its own where it is an output."""
    name = ("add_" if call.residual else "") + ("rms_norm" if call.rms else "layer_norm")
    n, size = call.rows * call.width, call.itemsize
    params, stats = (2 if call.bias else 1), (1 if call.rms else 2)
    fixed = params * call.width * size + stats * 4 * call.rows + 8 * call.dropout
    forward = n * size * (4 if call.residual else 2) + fixed
    partial = 2 * params * call.n_partial * call.width * 4
    backward = n * size * (3 + call.residual + call.dropout) + fixed + call.width * size + partial
    flops_forward = (4 if call.rms else 5) + call.bias + call.residual + call.dropout
    flops_backward = (10 if call.rms else 12) + call.bias + call.residual + call.dropout
    return (
        Op(name, "norm", False, call.dtype, flops_forward * n, forward),
        Op(f"{name}_backward", "norm", True, call.dtype, flops_backward * n, backward, launches=1 + params),
    )


class Rows(NamedTuple):
    """How the threads of a block lie over rows."""

    lanes: int
    """Threads of one row."""
    threads: int
    """Threads of a block."""

    @property
    def per_block(self) -> int:
        return self.threads // self.lanes


def row_threads(width: int, pack: int, elements: int) -> Rows:
    """As few threads to a row as hold it with ``elements`` each: up to a warp a power of two (at least 8 where the row has
    8 packs, so that accesses are 128 bytes side by side), whole warps above."""
    lanes = ceil_div(width, elements)
    if lanes > 32:
        lanes = ceil_div(lanes, 32) * 32
        return Rows(lanes, lanes)
    lanes = max(lanes, min(8, ceil_div(width, pack)))
    return Rows(1 << (lanes - 1).bit_length(), 128)


def backward_blocks(n_rows: int, rows: Rows, chip: Chip) -> int:
    """Blocks of the backward kernel, each of which writes one fp32 row of partial weight gradients."""
    return min(ceil_div(n_rows, rows.per_block), chip.persistent_blocks(rows.threads))


def partial_rows(n_rows: int, width: int, itemsize: int, chip: Chip) -> int:
    """Rows of fp32 partial weight gradients (as many of bias gradients) of a backward call on aligned tensors.

    ``itemsize``: bytes per element of the narrowest tensor. A LayerNorm with bias has two such ``[rows, width]`` tensors.
    """
    rows = row_threads(width, aligned_pack(itemsize, width), chip.tile.row_elements_backward)
    return backward_blocks(n_rows, rows, chip)
