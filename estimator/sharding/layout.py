"""The one sharding arithmetic: how parameters become flat, padded, evenly split groups.

Units are put together into *groups*; a group's parameters lie one after another in a flat buffer, each starting at
a multiple of ``ALIGNMENT_NUMEL`` elements, and the buffer is padded so that all ranks own equally long, aligned shards
(Rajbhandari et al. 2020, section 5; the flat layout of DeepSpeed and FSDP1). Estimator and runtime both read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from estimator.job.strategy import Strategy
from estimator.sharding.units import Param, Unit
from estimator.units import DTYPE_BYTES

ALIGNMENT_NUMEL = 8
"""Elements to which every parameter and shard is aligned: 16 bytes in bf16, what vector loads and tensor cores want."""


def align(numel: int, to: int = ALIGNMENT_NUMEL) -> int:
    """Smallest multiple of ``to`` that is >= ``numel``."""
    return -(-numel // to) * to


@lru_cache(maxsize=4096)
def flat_numel(params: tuple[Param, ...]) -> int:
    """Elements that ``params`` take in a flat buffer, alignment included."""
    return sum(align(p.numel) for p in params)


class Group(NamedTuple):
    """Consecutive units whose parameters share one flat buffer. All sizes in elements."""

    number: int
    units: range
    """Indices of its units, in forward order."""
    numel: int
    """Aligned parameters, without the padding at the end."""
    padded_numel: int
    """``shard_numel`` times the shard count."""
    shard_numel: int


class Slot(NamedTuple):
    """Where one parameter lies in its group's flat buffer."""

    unit: int
    param: Param
    offset: int


class Layout(NamedTuple):
    """Groups of a model in forward order, for ``n_shards`` ranks."""

    units: tuple[Unit, ...]
    groups: tuple[Group, ...]
    n_shards: int
    """Ranks that split optimizer state (and grads, parameters): the data-parallel size, or 1 under stage 0."""
    group_of_unit: tuple[int, ...]

    def slots(self, group: Group) -> Iterator[Slot]:
        """Every parameter of ``group`` with its offset in elements."""
        offset = 0
        for unit in group.units:
            for param in self.units[unit].params:
                yield Slot(unit, param, offset)
                offset += align(param.numel)


def make_layout(units: Sequence[Unit], strategy: Strategy, zero_stage: int, dp: int) -> Layout:
    """Group ``units`` and split every group over the ranks.

    Where parameters come and go (stage 3, parameter offload) each unit is a group of its own; elsewhere units are
    put together, from the last to the first as backward produces gradients, until a group holds ``bucket_bytes``.
    """
    n_shards = dp if zero_stage >= 1 else 1
    per_unit = zero_stage == 3 or strategy.offload_param
    limit = 0 if per_unit else strategy.bucket_bytes // DTYPE_BYTES[strategy.dtype]
    spans: list[tuple[range, int]] = []
    stop, numel = len(units), 0
    for start in range(len(units) - 1, -1, -1):
        numel += flat_numel(units[start].params)
        if numel >= limit or start == 0:
            spans.append((range(start, stop), numel))
            stop, numel = start, 0
    spans.reverse()
    groups: list[Group] = []
    group_of_unit: list[int] = []
    for index, (span, span_numel) in enumerate(spans):
        shard = align(-(-span_numel // n_shards))
        groups.append(Group(index, span, span_numel, shard * n_shards, shard))
        group_of_unit += [index] * len(span)
    return Layout(tuple(units), tuple(groups), n_shards, tuple(group_of_unit))
