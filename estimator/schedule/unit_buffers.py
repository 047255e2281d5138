"""Buffers and events of units as FSDP gathers and reduces them (``FrameworkProfile.units`` other than ``groups``).

What lives from step to step are shards, which are their own masters; the dtype of the model exists while a unit is gathered.
Memory is in the order in which the host asks for it, as torch counts it; the host runs ahead of the device, so that a forward pass's
gather stands where the device may begin it, before the pass of the unit before, and its room where the host makes it.

- FSDP1 (``torch/distributed/fsdp``: ``_flat_param.py``, ``_runtime_utils.py``): a rank's shard is cast and gathered into the flat
  parameter, of which the parameters are views, so that their gradients are put together to a flat one; that is cast to the dtype in
  which it is reduced. All of it is dropped as soon as the collective is issued.
- FSDP2 (``_fully_shard/_fsdp_collectives.py``, ``_fsdp_param_group.py``): shards are cast, copied into what is gathered, and copied
  out of that parameter by parameter; in forward passes what was gathered is kept until the next unit's has come. Gradients
  are copied into what is reduced, which is kept until the next unit's is reduced. In a pipeline (``torch/distributed/pipelining/stage.py:
  backward_maybe_with_nosync``) units stay from a chunk's first forward pass to its last backward pass, as in torchtitan; gradients of
  all passes are added up, whole, and all units are reduced when the last of these is over.
"""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.framework import FRAMEWORKS
from estimator.job.mesh import Span
from estimator.job.optimizers import FOREACH
from estimator.job.strategy import Strategy
from estimator.schedule.buffers import GroupBuffers, UnitBuffers, states_of, step_temp
from estimator.schedule.events import Accumulate, Alloc, Buffer, Collective, Event, Free, Restage, Wait
from estimator.schedule.fetching import Turns, Visit
from estimator.schedule.messages import Hop
from estimator.sharding.layout import Group
from estimator.units import DTYPE_BYTES


def unit_buffers(group: Group, strategy: Strategy) -> GroupBuffers:
    """All buffers of ``group``."""
    g, copies = group.number, FRAMEWORKS[strategy.framework].units == "rows"
    width, kept_width = DTYPE_BYTES[strategy.dtype], DTYPE_BYTES[strategy.masters]
    reduce_width = DTYPE_BYTES[strategy.grads]
    full_bytes, shared = group.padded_numel * width, group.n_shards > 1
    written_bytes = group.numel * width
    flat = Buffer("flat_grads", g, "reduce_buckets", full_bytes)
    to_reduce = Buffer("full_grads", g, "reduce_buckets", group.padded_numel * reduce_width)
    unit = UnitBuffers(
        cast=Buffer("cast_shard", g, "gathered_params", group.shard_numel * width)
        if shared and kept_width != width
        else None,
        gathered=Buffer("gathered", g, "gathered_params", full_bytes) if copies and shared else None,
        written=Buffer("written_grads", g, "reduce_buckets", written_bytes),
        flat=None if copies else flat,
        accumulated=Buffer("accumulated", g, "grads", group.numel * reduce_width),
        widened=Buffer("widened", g, "reduce_buckets", group.shard_numel * kept_width)
        if reduce_width != kept_width
        else None,
    )
    trained = group.kind.trained
    return GroupBuffers(
        full_params=Buffer("full_params", g, "gathered_params", full_bytes),
        kept_params=Buffer("kept_params", g, "params", group.shard_numel * kept_width),
        staging=None,
        full_grads=to_reduce if trained else to_reduce._replace(n_bytes=0),
        grad_shard=Buffer("grad_shard", g, "grads", group.shard_numel * kept_width) if trained else None,
        reduced=Buffer("reduced", g, "reduce_buckets", group.shard_numel * reduce_width) if trained else None,
        host_grads=None,
        master=None,
        optimizer_states=states_of("optimizer_state", group, group.shard_numel, "device", strategy) if trained else (),
        update_temp=step_temp(group, strategy) if trained else None,
        host_update=None,
        unit=unit,
    )


def with_lists(buffers: list[GroupBuffers], groups: Sequence[Group], strategy: Strategy) -> list[GroupBuffers]:
    """``buffers`` with what torch's ``foreach`` steps make: lists of all of a rank's shards, of which the first trained group's step
    stands for all."""
    if strategy.optimizer_impl != "foreach" or not FOREACH[strategy.optimizer].n_lists:
        return buffers
    trained = [group for group in groups if group.kind.trained]
    numel = sum(group.shard_numel for group in trained)
    n_bytes = FOREACH[strategy.optimizer].n_lists * numel * DTYPE_BYTES[strategy.states]
    first = trained[0].number
    temp = Buffer("step_temp", first, "temporaries", n_bytes)
    return [b._replace(update_temp=temp) if g.number == first else b for b, g in zip(buffers, groups, strict=True)]


class Units:
    """When units' parameters come and go: gathered in turn, in the backward pass ahead of use, and kept where the stage or the root
    keeps them until all their gradients are there."""

    def __init__(
        self,
        strategy: Strategy,
        groups: Sequence[Group],
        shards: Sequence[Span | None],
        buffers: Sequence[GroupBuffers],
    ) -> None:
        self.buffers, self.shards = buffers, shards
        self.own = [b.unit for b in buffers if b.unit is not None]
        self.n_shards = [group.n_shards for group in groups]
        self.copies = FRAMEWORKS[strategy.framework].units == "rows"
        self.depth = strategy.prefetch_depth
        self.is_pipeline = strategy.pp > 1
        stays = strategy.zero_stage < 3
        head = groups[-1].units[-1] if strategy.root_apart else -1
        self.stays = {group.number for group in groups if stays or group.kind.root or group.units[0] == head}
        self.closes = {group.number: group.units[0] for group in groups}
        self.nearby: set[int] = set()

    def turns(self, visits: Sequence[Visit], first: bool) -> Turns:
        return _OncePerStep(self, visits, first) if self.is_pipeline else _InTurn(self, visits)

    def room(self, g: int) -> list[Event]:
        """What is made for a gather, and dropped as soon as it is issued."""
        cast, target = self.own[g].cast, self.own[g].gathered or self.buffers[g].full_params
        return [Alloc(target)] if cast is None else [Alloc(cast), Alloc(target), Free(cast)]

    def gather(self, g: int) -> list[Event]:
        """On its stream: the shard is cast and put in its place, then gathered. Alone, a rank casts all of it."""
        full, kept, cast = self.buffers[g].full_params, self.buffers[g].kept_params, self.own[g].cast
        assert kept is not None
        if self.n_shards[g] == 1:
            return [Restage("params", g, kept.n_bytes + full.n_bytes, "compute")]
        moved = kept.n_bytes + cast.n_bytes if cast is not None else 0
        if self.copies:
            moved += 2 * full.n_bytes // self.n_shards[g]
        gather = Collective("all_gather", "params", g, full.n_bytes, "gather", ("gather", g), self.shards[g])
        return [Restage("params", g, moved, "gather"), gather] if moved else [gather]

    def arrive(self, g: int) -> list[Event]:
        """Wait, and copy out what the model reads."""
        full = self.buffers[g].full_params
        events: list[Event] = [Wait("compute", ("gather", g))] if self.n_shards[g] > 1 else []
        if self.own[g].gathered is not None:
            events += [Alloc(full), Restage("params", g, 2 * full.n_bytes, "compute")]
        return events

    def drop_gathered(self, g: int) -> list[Event]:
        gathered = self.own[g].gathered
        return [] if gathered is None else [Free(gathered)]


class _InTurn:
    def __init__(self, units: Units, visits: Sequence[Visit]) -> None:
        self.units, self.visits = units, visits
        self.present: set[int] = set()
        self.ready: set[int] = set()
        """Groups whose gather has been issued with its room made, and not yet arrived."""
        self.begun: set[int] = set()
        """Groups whose gather has been issued ahead of the host's making room."""
        self.held: list[int] = []
        """What was gathered last in the forward pass."""

    def before(self, position: int) -> list[Event]:
        units, visit = self.units, self.visits[position]
        events: list[Event] = []
        backward = visit.phase not in ("forward", "loss")
        if backward:
            events += self._let_go()
        for g in visit.reads:
            if g in self.present:
                continue
            if g not in self.ready:
                events += units.room(g)
                events += [] if g in self.begun else units.gather(g)
            self.begun.discard(g)
            self.ready.discard(g)
            if not backward:
                events += self._let_go()
            events += units.arrive(g)
            self.present.add(g)
            if backward:
                events += units.drop_gathered(g)
            else:
                self.held.append(g)
        if backward:
            for g in self._later(position):
                events += [*units.room(g), *units.gather(g)]
                self.ready.add(g)
        elif position + 1 < len(self.visits) and self.visits[position + 1].phase in ("forward", "loss"):
            for g in self.visits[position + 1].reads:
                if g not in self.present and g not in self.begun:
                    events += units.gather(g)
                    self.begun.add(g)
        return events

    def after(self, position: int) -> list[Event]:
        visit, units = self.visits[position], self.units
        forward = visit.phase in ("forward", "loss")
        if forward:
            gone = [g for g in visit.reads if g not in units.stays]
        else:
            gone = [g for g in sorted(self.present) if g in visit.reads or units.closes[g] == visit.unit]
            gone = [g for g in gone if g not in units.stays or units.closes[g] == visit.unit]
        is_last = position == len(self.visits) - 1
        gone += [g for g in sorted(self.present) if is_last and g not in gone]
        self.present.difference_update(gone)
        return [*(Free(units.buffers[g].full_params) for g in gone), *(self._let_go() if is_last else [])]

    def _let_go(self) -> list[Event]:
        events = [event for g in self.held for event in self.units.drop_gathered(g)]
        self.held.clear()
        return events

    def _later(self, position: int) -> list[int]:
        """The next groups to gather, at most ``depth`` on their way."""
        found: list[int] = []
        for visit in self.visits[position + 1 :]:
            if len(found) + len(self.ready) >= self.units.depth:
                break
            found += [g for g in visit.reads if g not in self.present and g not in self.ready and g not in found]
        return found[: max(0, self.units.depth - len(self.ready))]


class _OncePerStep(_InTurn):
    """In a pipeline: gathered in a chunk's ``first`` forward pass; who reduces a unit in the end drops it."""

    def __init__(self, units: Units, visits: Sequence[Visit], first: bool) -> None:
        gathers = first and visits[0].phase in ("forward", "loss")
        super().__init__(units, visits if gathers else [visit._replace(reads=()) for visit in visits])

    def after(self, position: int) -> list[Event]:
        return self._let_go() if position == len(self.visits) - 1 else []


def add_up(b: GroupBuffers, first: bool) -> list[Event]:
    """In a pipeline: a pass's gradients of a unit are added to those of the step's passes before, which the ``first`` makes."""
    unit = b.unit
    assert unit is not None
    if unit.accumulated.n_bytes == unit.written.n_bytes:  # autograd adds to them itself
        return [] if first else [Accumulate(b.full_params.group, unit.written.n_bytes), Free(unit.written)]
    made: list[Event] = [Alloc(unit.accumulated)] if first else []
    moved = unit.written.n_bytes + (1 if first else 2) * unit.accumulated.n_bytes
    return [*made, Restage("grads", b.full_params.group, moved, "compute"), Free(unit.written)]


def put_together(b: GroupBuffers) -> list[Event]:
    """The unit's gradients become a flat one, before its parameters go (the backward pass of views of a flat parameter)."""
    if b.unit is None or b.unit.flat is None:
        return []
    return [
        Alloc(b.unit.flat),
        Restage("grads", b.full_params.group, 2 * b.unit.flat.n_bytes, "compute"),
        Free(b.unit.written),
    ]


def reduce_unit(b: GroupBuffers, hops: tuple[Hop, ...], first: bool, adds_up: bool = False) -> list[Event]:
    """Copy a unit's gradients (with ``adds_up`` those of all passes) into what is reduced, reduce it, and add the result to that of
    earlier micro-batches."""
    unit, full, shard, out = b.unit, b.full_grads, b.grad_shard, b.reduced
    assert unit is not None and shard is not None and out is not None
    source = unit.flat or (
        unit.accumulated if adds_up and unit.accumulated.n_bytes != unit.written.n_bytes else unit.written
    )
    moved = Restage("grads", full.group, source.n_bytes + full.n_bytes, "compute")
    casts = source.n_bytes != full.n_bytes
    events: list[Event] = [Alloc(full), moved] if casts or unit.flat is None else [Alloc(full)]
    until_sent = [Free(source)] if casts and unit.flat is not None else []
    events += [] if until_sent else [Free(source)]
    if unit.widened is None:
        out = shard if first else out
    events += [Alloc(out), *(event for hop in hops for event in hop.issue)]
    if unit.widened is not None:
        wide = shard if first else unit.widened
        events += [Alloc(wide), Free(out)]
        out = wide
    if not first:
        events += [Accumulate(full.group, shard.n_bytes), Free(out)]
    return [*events, *until_sent, Free(full)] if unit.flat is not None else events
