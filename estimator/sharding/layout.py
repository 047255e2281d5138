"""The one sharding arithmetic: how parameters become flat, padded, evenly split groups.

Units are put together into *groups*; a group's parameters lie one after another in a flat buffer, each starting at
a multiple of ``ALIGNMENT_NUMEL`` elements, and the buffer is padded so that all ranks own equally long, aligned shards
(Rajbhandari et al. 2020, section 5; the flat layout of DeepSpeed and FSDP1). Estimator and runtime both read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from estimator.job.framework import FRAMEWORKS
from estimator.job.optimizers import OPTIMIZERS, factored_numel
from estimator.job.strategy import Strategy
from estimator.sharding.units import Param, Unit, splits_of

ALIGNMENT_NUMEL = 8
"""Elements to which every parameter and shard is aligned: 16 bytes in bf16, what vector loads and tensor cores want."""


_NO_LIMIT = 1 << 62

BLOCK_NUMEL = {"int8": 256, "int4": 256, "one_bit": 1024}
"""Elements that share a scale in compressed messages."""
ADACOMP_BIN, ADACOMP_SHARE = 512, 8
"""AdaComp chooses the largest of so many neighbours (the paper: 500), and sends at most one of so many elements."""


def align(numel: int, to: int = ALIGNMENT_NUMEL) -> int:
    """Smallest multiple of ``to`` that is >= ``numel``."""
    return -(-numel // to) * to


@lru_cache(maxsize=4096)
def flat_numel(params: tuple[Param, ...]) -> int:
    """Elements that ``params`` take in a flat buffer, alignment included."""
    return sum(align(p.numel) for p in params)


class Kind(NamedTuple):
    """What the parameters of one group have in common; a unit has a group for each kind that occurs in it."""

    trained: bool = True
    """False: frozen. They have neither gradients nor optimizer state and are not reduced."""
    resident: bool = False
    """Where parameters come and go (stage 3, parameter offload): these are small and stay, as under stage 2 on the device."""
    split: bool = False
    """Tensor-parallel ranks each hold a part of their own. False: all of it, as does everyone without tensor parallelism."""
    shared: bool = False
    """Another pipeline stage has the same group."""
    table: str = ""
    """The one parameter in it, where that is exchanged row by row."""
    expert: bool = False
    """Expert-parallel ranks each hold experts of their own: of the data ranks, every ``ep``-th has the same."""
    idle: bool = False
    """Nothing computes with them: where parameters come and go they stay away."""
    root: bool = False
    """Of no block, where a framework gathers all of these together."""


@lru_cache(maxsize=4096)
def params_by_kind(params: tuple[Param, ...], small_numel: int) -> dict[Kind, tuple[Param, ...]]:
    """``params`` taken apart; at most ``small_numel`` elements make one resident."""
    by_kind: dict[Kind, tuple[Param, ...]] = {}
    for param in params:
        axes = {split.axis for split in splits_of(param.split)}
        resident = param.numel <= small_numel
        kind = Kind(param.trained, resident, "tp" in axes, param.shared, expert="ep" in axes, idle=param.idle)
        if param.rows and param.trained:
            kind = kind._replace(table=param.name)
        by_kind[kind] = (*by_kind.get(kind, ()), param)
    return by_kind


class Group(NamedTuple):
    """Parameters of one kind, of consecutive units, that share one flat buffer. All sizes in elements."""

    number: int
    units: range
    """Indices of its units, in forward order; the first and the last have parameters in it."""
    numel: int
    """Aligned parameters, without the padding at the end."""
    padded_numel: int
    """``shard_numel`` times the shard count."""
    shard_numel: int
    kind: Kind = Kind()
    factored_numel: int = 0
    """Numbers of a factored second moment (Adafactor)."""
    vector_numel: int = 0
    """Elements that are in no matrix of a block (Muon)."""
    largest_numel: int = 0
    """Elements of the largest parameter, where the optimizer steps parameter by parameter."""

    @property
    def n_shards(self) -> int:
        """Ranks that split its states."""
        return self.padded_numel // self.shard_numel


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
    """Ranks that split optimizer state (and grads, parameters): ``shard_count``; of experts that ``ep`` ranks share, fewer do."""
    groups_of_unit: tuple[tuple[int, ...], ...]
    """Numbers of the groups that hold a unit's own parameters."""
    small_numel: int = 0
    """Parameters of at most so many elements are resident."""

    def slots(self, group: Group) -> Iterator[Slot]:
        """Every parameter of ``group`` with its offset in elements."""
        offset = 0
        for unit in group.units:
            kind = group.kind._replace(root=False)
            for param in params_by_kind(self.units[unit].params, self.small_numel).get(kind, ()):
                yield Slot(unit, param, offset)
                offset += align(param.numel)


def shard_count(strategy: Strategy, zero_stage: int, dp: int) -> int:
    """Ranks that share one copy of the states."""
    if strategy.has_servers:
        return strategy.n_servers
    return (strategy.shard_size or dp) if zero_stage >= 1 else 1


def alignment_of(strategy: Strategy, zero_stage: int, dp: int) -> int:
    """Elements of which shards are a multiple: whole blocks where they are compressed."""
    if FRAMEWORKS[strategy.framework].units == "flat":
        return 1
    if zero_stage == 3 and strategy.quantized_weights:
        return BLOCK_NUMEL["int8"]
    if zero_stage >= 2 and strategy.quantized_grads:
        return BLOCK_NUMEL["int4"]
    if strategy.grad_compression == "one_bit" and dp > 1:
        return BLOCK_NUMEL["one_bit"] * (dp if zero_stage == 0 else 1)  # every rank serves a part of the sum
    return ALIGNMENT_NUMEL


def make_layout(
    units: Sequence[Unit], strategy: Strategy, zero_stage: int, dp: int, chunks: Sequence[range] = ()
) -> Layout:
    """Group ``units`` and split every group over the ranks.

    Where parameters come and go (stage 3, parameter offload) each unit is a group of its own; elsewhere, and for those of
    at most ``persistent_numel`` elements, units are put together, from the last to the first as backward produces
    gradients, until a group holds ``bucket_bytes``. Frozen parameters have groups of their own. No group has units of two of
    ``chunks`` (a pipeline rank's, by index).
    """
    n_shards = shard_count(strategy, zero_stage, dp)
    by_rows = FRAMEWORKS[strategy.framework].units == "rows"
    by_unit = FRAMEWORKS[strategy.framework].units != "groups"
    has_root = by_unit and not apart(units, strategy)
    per_unit = zero_stage == 3 or strategy.offload_param or by_unit
    small_numel = strategy.resident_numel if per_unit else 0
    parts = [params_by_kind(unit.params, small_numel) for unit in units]
    if has_root:
        parts = [p if _is_block(u) else _as_root(p) for u, p in zip(units, parts, strict=True)]
    bucket_numel = strategy.bucket_numel
    spans: list[tuple[range, int, Kind]] = []
    for kind in dict.fromkeys(kind for part in parts for kind in part):
        limit = 0 if (per_unit and not kind.resident) or kind.table else bucket_numel
        limit = _NO_LIMIT if kind.root else limit
        for chunk in chunks or (range(len(units)),):
            sizes = {i: flat_numel(parts[i][kind]) for i in chunk if kind in parts[i]}
            spans += [(span, numel, kind) for span, numel in _spans(sizes, limit)]
    spans.sort(key=lambda s: (s[0].start, s[0].stop))
    groups: list[Group] = []
    groups_of_unit: list[tuple[int, ...]] = [() for _ in units]
    for index, (span, numel, kind) in enumerate(spans):
        n_own = max(1, n_shards // strategy.ep) if kind.expert else n_shards
        if by_rows:
            own = [p for unit in span for p in parts[unit].get(kind, ())]
            shard, numel = rows_numel(tuple(own), n_own), sum(p.numel for p in own)
        else:
            shard = align(-(-numel // n_own), alignment_of(strategy, zero_stage, dp))
        group = Group(index, span, numel, shard * n_own, shard, kind)
        if not OPTIMIZERS[strategy.optimizer].flat:
            group = _with_shapes(group, [(units[unit], parts[unit].get(kind, ())) for unit in span])
        groups.append(group)
        for unit in span:
            if kind in parts[unit]:
                groups_of_unit[unit] += (index,)
    return Layout(tuple(units), tuple(groups), n_shards, tuple(groups_of_unit), small_numel)


def _with_shapes(group: Group, params: Sequence[tuple[Unit, tuple[Param, ...]]]) -> Group:
    """``group`` with what an optimizer must know that does not step all elements alike."""
    every = [(unit, param) for unit, of_unit in params for param in of_unit]
    return group._replace(
        factored_numel=sum(factored_numel(param.shape) for _, param in every),
        vector_numel=sum(p.numel for unit, p in every if len(p.shape) < 2 or not _is_block(unit)),
        largest_numel=max(param.numel for _, param in every),
    )


def apart(units: Sequence[Unit], strategy: Strategy) -> bool:
    """Whether embedding and head are units that a framework gathers by themselves: not where they share a table."""
    return strategy.root_apart and not any(unit.borrows for unit in units)


def _is_block(unit: Unit) -> bool:
    return unit.kind not in ("embed", "head")


def _as_root(parts: dict[Kind, tuple[Param, ...]]) -> dict[Kind, tuple[Param, ...]]:
    return {kind._replace(root=True): params for kind, params in parts.items()}


@lru_cache(maxsize=4096)
def rows_numel(params: tuple[Param, ...], n_shards: int) -> int:
    """Elements of one rank's shards of ``params``, each cut into equal numbers of rows, the last ones padded."""
    return sum(-(-p.shape[0] // n_shards) * (p.numel // p.shape[0]) for p in params)


def _spans(sizes: dict[int, int], limit: int) -> Iterator[tuple[range, int]]:
    """Units, given by index with their elements, put together from the last on until ``limit`` elements are reached."""
    indices = sorted(sizes, reverse=True)
    last, numel = -1, 0
    for index in indices:
        last = index if numel == 0 else last
        numel += sizes[index]
        if numel >= limit or index == indices[-1]:
            yield range(index, last + 1), numel
            numel = 0
