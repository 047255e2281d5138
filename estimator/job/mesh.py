"""Which ranks of a job work together: the mesh of parallel axes, and the groups that collectives join."""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

Axis = Literal["tp", "cp", "dp", "pp"]
"""Tensor, context, data and pipeline parallel."""


class Span(NamedTuple):
    """Groups of ``size`` of a job's ranks, from each to the next ``stride`` further.

    ``Span(4)`` of 8 ranks: 0-3 and 4-7. ``Span(2, 4)``: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
    """

    size: int
    stride: int = 1

    def ranks(self, rank: int) -> list[int]:
        """The ranks of the group that ``rank`` is in, in order."""
        first = rank - rank // self.stride % self.size * self.stride
        return [first + i * self.stride for i in range(self.size)]

    def place(self, rank: int) -> int:
        """``rank``'s own place in its group."""
        return rank // self.stride % self.size


class Mesh(NamedTuple):
    """A job's ranks along its axes: ``rank = tp + n_tp * (cp + n_cp * (dp + n_dp * pp))``.

    Those that talk most are neighbours (Narayanan et al. 2021, section 3.2). Ranks that differ in ``cp`` or ``dp`` alone hold
    the same parameters: over them, the *data ranks*, ZeRO shards and gradients are summed.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def size(self) -> int:
        return prod(self)

    @property
    def n_data(self) -> int:
        """Ranks that hold the same parameters."""
        return self.cp * self.dp

    def span(self, axis: Axis) -> Span:
        """The groups of ranks that differ in ``axis`` alone."""
        place = self._fields.index(axis)
        return Span(self[place], prod(self[:place]))

    def data_span(self, size: int | None = None, stride: int = 1) -> Span | None:
        """Groups of ``size`` data ranks, each ``stride`` data ranks further; ``None``, for all, where all ranks are such."""
        if size is None and stride == 1 and self.size == self.n_data:
            return None
        return self.data_groups(self.n_data if size is None else size, stride)

    def data_groups(self, size: int, stride: int = 1) -> Span:
        """Groups of ``size`` data ranks, each ``stride`` data ranks further."""
        return Span(size, stride * self.tp)

    def place(self, axis: Axis, rank: int) -> int:
        """Where ``rank`` stands along ``axis``."""
        return self.span(axis).place(rank)

    def data_place(self, rank: int) -> int:
        """Where ``rank`` stands among its data ranks."""
        return self.data_groups(self.n_data).place(rank)
