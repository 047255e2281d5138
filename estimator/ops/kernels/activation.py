"""Activations, gated or with a bias: what a call costs, and how the threads of the biased kernels lie over rows."""

from __future__ import annotations

from typing import NamedTuple

from estimator.ops.kernels.chip import Chip, aligned_pack, ceil_div
from estimator.ops.operator import Op

FLOPS: dict[str, tuple[int, int]] = {
    "silu": (5, 9),
    "gelu": (4, 10),
    "gelu_tanh": (9, 15),
    "relu": (1, 1),
    "relu_squared": (2, 2),
}
"""Operations per element of value and slope; a transcendental function or a division counts as one."""


def cost(
    name: str, numel: int, dtype: str, itemsize: int, *, gated: bool, bias: int = 0, n_partial: int = 0
) -> tuple[Op, Op]:
    """Forward and backward of one call on ``numel`` elements, with a ``bias`` of that many elements (0: none).

    ``n_partial``: rows of the partial bias gradient (``partial_rows``), written and read once.
    """
    value, slope = FLOPS[name]
    n_bytes = numel * itemsize
    if gated:
        return (
            Op("gated_activation", "elementwise", False, dtype, (value + 1) * numel, 3 * n_bytes),
            Op("gated_activation_backward", "elementwise", True, dtype, (slope + 3) * numel, 5 * n_bytes),
        )
    extra = 1 if bias else 0
    return (
        Op("activation", "elementwise", False, dtype, (value + extra) * numel, 2 * n_bytes + bias * itemsize),
        Op(
            "activation_backward", "elementwise", True, dtype, (slope + 1 + 2 * extra) * numel,
            3 * n_bytes + 2 * bias * itemsize + 8 * n_partial * bias, launches=1 + extra,
        ),
    )  # fmt: skip


class Slabs(NamedTuple):
    """How the threads of a biased kernel lie over ``[rows, width]``."""

    threads: int
    column_threads: int
    grid: tuple[int, int]

    @property
    def n_partial(self) -> int:
        """Rows of the partial bias gradient."""
        return self.grid[1] * (self.threads // self.column_threads)


def slabs(n_rows: int, width: int, pack: int, chip: Chip) -> Slabs:
    """The biased kernels' grid for accesses of ``pack`` elements."""
    threads = chip.tile.threads
    packs = ceil_div(width, pack)
    column_threads = min(threads, 1 << max(0, packs - 1).bit_length())
    columns = ceil_div(packs, column_threads)
    most = ceil_div(n_rows, threads // column_threads * chip.tile.unroll)
    wanted = ceil_div(chip.persistent_blocks(threads), columns)
    return Slabs(threads, column_threads, (columns, max(1, min(most, wanted, 65535))))


def partial_rows(n_rows: int, width: int, itemsize: int, chip: Chip) -> int:
    """Rows of the fp32 partial bias gradient ``[rows, width]`` of a backward call on aligned tensors."""
    return slabs(n_rows, width, aligned_pack(itemsize, width), chip).n_partial
