"""Builds the ``StepProgram``: what one rank does in one training step, in issue order."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.strategy import Strategy
from estimator.schedule import nvme
from estimator.schedule.buffers import GroupBuffers, group_buffers, host_numel, is_offloaded, stage_of
from estimator.schedule.events import (
    Accumulate,
    Alloc,
    Buffer,
    Collective,
    Compute,
    Copy,
    Event,
    Free,
    GradNorm,
    Keep,
    Pass,
    Section,
    Span,
    StepProgram,
    Stream,
    Update,
    Wait,
)
from estimator.schedule.messages import Hop, quantized_gather, secondary_gather
from estimator.schedule.nvme import N_SLOTS
from estimator.schedule.reduction import compressed, errors, exact, sum_over_replicas
from estimator.sharding.layout import Group, Layout


class _Visit(NamedTuple):
    """One unit's turn in a micro-batch: which pass it runs and whose parameters it reads."""

    unit: int
    phase: Pass
    reads: tuple[int, ...]
    """Groups whose ``full_params`` must be present."""


def build_program(
    layout: Layout, strategy: Strategy, zero_stage: int, dp: int, n_micro_batches: int, *, fused_step: bool = False
) -> StepProgram:
    """The program of one rank. ``zero_stage`` is the stage in effect (see ``Job.zero_stage``); ``fused_step`` as for
    ``group_buffers``."""
    return _Builder(layout, strategy, zero_stage, dp, fused_step).build(n_micro_batches)


class _Builder:
    """Writes the events of one strategy. Methods are in the order in which a step meets them."""

    def __init__(self, layout: Layout, strategy: Strategy, zero_stage: int, dp: int, fused_step: bool) -> None:
        self.layout, self.strategy, self.stage, self.dp = layout, strategy, zero_stage, dp
        self.n_replicas = dp // layout.n_shards if zero_stage else 1
        self.shards = Span(layout.n_shards) if self.n_replicas > 1 else None
        self.replicas = Span(self.n_replicas, layout.n_shards)
        self.buffers = [group_buffers(g, strategy, zero_stage, fused_step=fused_step) for g in layout.groups]
        self.trained = [group for group in layout.groups if group.kind.trained]
        self.opening: list[list[int]] = [[] for _ in layout.units]
        """By unit: the groups whose gradients its backward pass begins."""
        self.closing: list[list[int]] = [[] for _ in layout.units]
        """By unit: the groups whose gradients its backward pass completes."""
        for group in self.trained:
            self.opening[group.units[-1]].append(group.number)
            self.closing[group.units[0]].append(group.number)
        fetched = {b.full_params.group: b for b in self.buffers if b.is_fetched}
        self.fetches = {g: self._fetch(b) for g, b in fetched.items()}
        self.arrivals = {g: self._arrival(b) for g, b in fetched.items()}
        self.near = self._near(fetched)
        self.releases = {g: Free(b.full_params) for g, b in fetched.items()}
        self.visits = self._visits()
        self.events: list[Event] = []
        self.leaving: list[int] = []
        self.returning: list[int] = []
        self.outgoing: list[int] = []
        self.is_split = any(b.device_part is not None for b in self.buffers)
        """Host and device each step a part: gradients stay on the device until it has stepped its own."""
        self.crossing: list[tuple[int, Hop]] = []
        self.compresses = strategy.grad_compression != "none" or strategy.quantized_grads > 0
        self.nearby: set[int] = set()
        """Groups of which the ranks nearby hold a copy, in this step."""

    def build(self, n_micro_batches: int) -> StepProgram:
        init = tuple(Alloc(b) for group in self.buffers for b in _persistent(group))
        if (compression := self.strategy.grad_compression) != "none" and self.dp > 1:
            init += tuple(Alloc(b) for group in self.trained for b in errors(group, compression, self.stage, self.dp))
        sections: list[Section] = []
        if self.strategy.delayed_update:
            init += tuple(Alloc(b) for b in self._delayed_buffers())
            self.events += [Update(g.number, g.shard_numel, "worker") for g in reversed(self.trained)]
            sections.append(self._section("delayed_update", 1))
        if self.strategy.offload_nvme:
            init += tuple(Alloc(b) for b in nvme.slots(self.trained, self.strategy))
        for first, last, repeat in self._turns(n_micro_batches):
            self._micro_batch(first, last)
            sections.append(self._section("micro_batch", repeat))
        self._optimizer()
        sections.append(self._section("optimizer", 1))
        return StepProgram(init, tuple(sections))

    def _turns(self, n_micro_batches: int) -> list[tuple[bool, bool, int]]:
        """Kinds of micro-batches in a step: whether it is the first, whether the last, and how many there are.

        The last one is special only where it alone reduces (stages 0, 1; over replicas) or sends gradients to the host.
        """
        if n_micro_batches == 1:
            return [(True, True, 1)]
        if self.stage >= 2 and self.n_replicas == 1 and not self.strategy.offload_optimizer:
            return [(True, False, 1), (False, False, n_micro_batches - 1)]
        middle = [(False, False, n_micro_batches - 2)] if n_micro_batches > 2 else []
        return [(True, False, 1), *middle, (False, True, 1)]

    def _section(self, name: str, repeat: int) -> Section:
        section = Section(name, tuple(self.events), repeat)  # type: ignore[arg-type]
        self.events = []
        return section

    def _visits(self) -> list[_Visit]:
        """Every unit's turns. Backward ends at the first unit with a trained parameter."""
        units, groups_of = self.layout.units, self.layout.groups_of_unit
        reads = [
            tuple(dict.fromkeys(g for u in (*unit.borrows, i) for g in groups_of[u] if g in self.fetches))
            for i, unit in enumerate(units)
        ]
        last, first_trained = len(units) - 1, min(group.units.start for group in self.trained)
        forward = [_Visit(i, "loss" if i == last else "forward", reads[i]) for i in range(last + 1)]
        return forward + [
            _Visit(i, "backward", reads[i] if units[i].backward_reads else ())
            for i in range(last, first_trained - 1, -1)
        ]

    # ---- a micro-batch ------------------------------------------------------------------------------------------

    def _micro_batch(self, first: bool, last: bool) -> None:
        """Forward and backward of one micro-batch; ``first`` and ``last`` of its step."""
        emit = self.events.append
        depth, visits = self.strategy.prefetch_depth, self.visits
        if first:
            self.nearby.clear()
        if last and self.strategy.offload_nvme:
            self.events += [nvme.read(group, self.strategy) for group in self.trained[:N_SLOTS]]
        present: set[int] = set()
        in_flight: set[int] = set()
        reducing: list[int] = []
        for position, visit in enumerate(visits):
            ahead = visits[position + 1 : position + 1 + depth]
            for wanted in (visit, *ahead):
                for g in wanted.reads:
                    if g not in present:
                        self.events += self.near[g].issue if g in self.nearby else self.fetches[g]
                        present.add(g)
                        in_flight.add(g)
            for g in visit.reads:
                if g in in_flight:
                    self.events += self.near[g].arrive if g in self.nearby else self.arrivals[g]
                    self.nearby.update({g} & self.near.keys())
                    in_flight.remove(g)
            backward = visit.phase == "backward"
            if backward and (first or self.stage >= 2):
                self.events += [Alloc(self.buffers[g].full_grads) for g in self.opening[visit.unit]]
            emit(Compute(visit.unit, visit.phase))
            still_wanted = {g for later in ahead for g in later.reads}
            for g in visit.reads:
                if g not in still_wanted:
                    emit(self.releases[g])
                    present.remove(g)
            for g in self.closing[visit.unit] if backward and (last or self.stage >= 2) else ():
                self._reduce(g, first)
                reducing.append(g)
                two_hops = self.n_replicas > 1 or self.compresses
                leaves_early = self.stage >= 2 or (last and (self.strategy.offload_optimizer or two_hops))
                if leaves_early and len(reducing) > 1:
                    self._finish_reduce(reducing.pop(0), first, last)
        for g in reducing:
            self._finish_reduce(g, first, last)
        self._finish_crossing(0, first, last)
        self._finish_offload(keep=0)

    def _fetch(self, b: GroupBuffers) -> list[Event]:
        """Bring a group's parameters in: copy from the host, gather from the other ranks, or both."""
        full, kept = b.full_params, b.kept_params
        assert kept is not None
        g = full.group
        if self.strategy.quantized_weights:
            return self._quantized_gather(g).issue
        events: list[Event] = [Alloc(full)]
        if b.staging is not None:
            events.append(Alloc(b.staging))
        if kept.place == "host":
            events.append(Copy("h2d", "params", g, kept.n_bytes, ("h2d", g)))
        if self.stage == 3:
            if kept.place == "host":
                events.append(Wait("gather", ("h2d", g)))
            events.append(Collective("all_gather", "params", g, full.n_bytes, "gather", ("gather", g), self.shards))
        return events

    def _arrival(self, b: GroupBuffers) -> list[Event]:
        """Make the compute stream wait for a group's parameters."""
        g = b.full_params.group
        events: list[Event] = [Wait("compute", ("gather", g) if self.stage == 3 else ("h2d", g))]
        if self.strategy.quantized_weights:
            events = self._quantized_gather(g).arrive
        if b.staging is not None:
            events.append(Free(b.staging))
        if b.secondary_params is not None:
            events.append(Keep(g, b.secondary_params.n_bytes))
        return events

    def _quantized_gather(self, g: int) -> Hop:
        group = self.layout.groups[g]
        return quantized_gather(g, group.shard_numel, self.buffers[g].full_params, Span(self.layout.n_shards))

    def _near(self, fetched: dict[int, GroupBuffers]) -> dict[int, Hop]:
        """How groups are fetched again where ranks nearby share a copy."""
        span = Span(self.strategy.secondary_shard)
        return {
            g: secondary_gather(b.full_params, b.secondary_params, span)
            for g, b in fetched.items()
            if b.secondary_params is not None
        }

    def _reduce(self, g: int, first: bool) -> None:
        """Start summing a group's gradients over the ranks, now that backward has written all of them."""
        b, hops = self.buffers[g], self._hops(g, first)
        if b.grad_shard is not None and b.reduced is not None and not self.compresses:
            self.events.append(Alloc(b.grad_shard if first else b.reduced))
        if hops:
            self.events += hops[0].issue

    def _finish_reduce(self, g: int, first: bool, last: bool) -> None:
        """The first hop is over; a second one, over replicas or of compressed sums, may follow."""
        hops, crosses = self._hops(g, first), last and self.n_replicas > 1
        if crosses and self.stage == 1:
            self.events.append(Wait("reduce", ("reduce", g)))
        elif hops:
            self.events += hops[0].arrive
        if len(hops) < 2:
            self._accumulate(g, first)
        if len(hops) == 2 or crosses:
            second = hops[1] if len(hops) == 2 else self._sum_over_replicas(g)
            self.events += second.issue
            self.crossing.append((g, second))
            self._finish_crossing(1, first, last)
        elif last:
            self._offload(g)

    def _sum_over_replicas(self, g: int) -> Hop:
        b = self.buffers[g]
        return sum_over_replicas(b, b.full_grads.n_bytes // self.layout.n_shards, self.replicas)

    def _finish_crossing(self, keep: int, first: bool, last: bool) -> None:
        """Wait for second hops; ``keep`` of them may still be under way."""
        while len(self.crossing) > keep:
            g, hop = self.crossing.pop(0)
            self.events += hop.arrive
            if len(self._hops(g, first)) == 2:
                self._accumulate(g, first)
            if last:
                self._offload(g)

    def _hops(self, g: int, first: bool) -> tuple[Hop, ...]:
        """How a group's gradients are summed over the ranks that share a copy; nothing where one rank does."""
        if self.dp == 1:
            return ()
        b = self.buffers[g]
        if not self.compresses:
            return (exact(b, self.stage, self.shards),)
        return compressed(self.layout.groups[g], b, self.strategy, self.stage, self.dp, first)

    def _accumulate(self, g: int, first: bool) -> None:
        """A group's shard is reduced: add it to those of earlier micro-batches."""
        emit, b = self.events.append, self.buffers[g]
        if b.grad_shard is None or b.reduced is None:
            return
        if not first:
            emit(Accumulate(g, b.grad_shard.n_bytes))
            emit(Free(b.reduced))
        if not self.compresses:
            emit(Free(b.full_grads))

    def _offload(self, g: int) -> None:
        """Start sending a group's gradients to an optimizer on the host."""
        emit, b = self.events.append, self.buffers[g]
        if b.host_grads is not None:
            if self.strategy.delayed_update:
                emit(Wait("host", ("update", g)))  # which reads the gradients of the step before from the same place
            emit(Copy("d2h", "grads", g, b.host_grads.n_bytes, ("d2h", g)))
            self.leaving.append(g)
            self._finish_offload(keep=1)

    def _finish_offload(self, keep: int) -> None:
        """Drop gradients that have arrived in host memory; ``keep`` copies may still be under way."""
        while len(self.leaving) > keep:
            g = self.leaving.pop(0)
            if not self.is_split:
                self._drop_copied_grads(g)

    def _drop_copied_grads(self, g: int) -> None:
        self.events.append(Wait("compute", ("d2h", g)))
        self.events.append(Free(self.buffers[g].grad_shard or self.buffers[g].full_grads))

    # ---- the optimizer step -------------------------------------------------------------------------------------

    def _optimizer(self) -> None:
        emit, s = self.events.append, self.strategy
        stream: Stream = "host" if s.offload_optimizer else "compute"
        if s.delayed_update:
            for group in self.trained:
                self._publish(group.number)
        if self.is_split:
            self._grad_norm("compute")
            self._update_device_parts()
        if s.offload_optimizer:
            for group in self.trained:
                emit(Wait("host", ("d2h", group.number)))
        if not self.is_split:
            self._grad_norm(stream)
        for group in self.trained if not s.delayed_update else ():
            if s.offload_nvme:
                emit(Wait("host", ("nvme_read", group.number)))
            self._update(group.number, host_numel(group, s) or group.shard_numel, stream)
            if s.offload_nvme:
                emit(nvme.write(group, s))
            self._publish(group.number)
            if s.offload_nvme:
                self.events += nvme.read_ahead(group, self.trained, s)
            self._finish_return(keep=1)
        self._finish_return(keep=0)
        for group in self.trained:
            if not is_offloaded(group, s) and (self._gathers(group) or s.offload_optimizer):
                emit(Wait("compute", ("gather" if self._gathers(group) else "h2d", group.number)))
        for g in self.outgoing:  # the next late step writes there
            emit(Wait("host", ("h2d", g)))
        self.outgoing.clear()
        if s.offload_nvme:
            self.events += nvme.finish(self.trained, s)

    # ---- what it is made of ---------------------------------------------------------------------------------------

    def _gathers(self, group: Group) -> bool:
        """Whether new parameters are gathered at once, not when they are needed."""
        return stage_of(group, self.stage) in (1, 2)

    def _grad_norm(self, stream: Stream) -> None:
        """Squares of this rank's gradients, summed over the ranks that hold different ones."""
        if self.strategy.grad_clip == 0 and self.strategy.dtype != "fp16":
            return
        for group in self.trained:
            n_bytes = group.shard_numel * (self.buffers[group.number].full_grads.n_bytes // group.padded_numel)
            self.events.append(GradNorm(group.number, n_bytes, stream))
        if self.stage >= 1:
            self.events.append(Collective("all_reduce", "grad_norm", -1, 4, "reduce", ("grad_norm", -1), self.shards))
            self.events.append(Wait(stream, ("grad_norm", -1)))
        if self.is_split:  # the host's part is stepped with the same norm
            last = ("grad_norm", -1) if self.stage >= 1 else ("square", self.trained[-1].number)
            self.events.append(Wait("host", last))

    def _update_device_parts(self) -> None:
        """Step what the device has of a split optimizer, and drop the gradients that the host has copied."""
        for group in self.trained:
            g, part = group.number, self.buffers[group.number].device_part
            if part is not None:
                temp = part.update_temp
                self.events += [Alloc(temp)] if temp is not None else []
                self.events.append(Update(g, part.numel, "compute"))
                self.events += [Free(temp)] if temp is not None else []
            self._drop_copied_grads(g)

    def _delayed_buffers(self) -> list[Buffer]:
        """Where a late step works all the time: every group's way back to the device, and one temporary for all groups."""
        temps = [b.update_temp for b in self.buffers if b.update_temp is not None]
        updates = [b.host_update for b in self.buffers if b.host_update is not None]
        return [*updates, *([max(temps, key=lambda temp: temp.n_bytes)] if temps else [])]

    def _update(self, g: int, numel: int, stream: Stream) -> None:
        """Step this rank's shard of one group."""
        emit, b = self.events.append, self.buffers[g]
        if b.update_temp is not None:
            emit(Alloc(b.update_temp))
        if b.host_update is not None:
            emit(Alloc(b.host_update))
        emit(Update(g, numel, stream))
        if b.update_temp is not None:
            emit(Free(b.update_temp))
        if not self.strategy.offload_optimizer:
            emit(Free(b.grad_shard or b.full_grads))

    def _publish(self, g: int) -> None:
        """Send freshly stepped parameters where the model reads them: host to device, and to all ranks (stages 1, 2)."""
        emit, b, s = self.events.append, self.buffers[g], self.strategy
        group = self.layout.groups[g]
        full, gathers, offloaded = b.full_params, self._gathers(group), is_offloaded(group, s)
        if offloaded and not gathers:
            return
        if offloaded:
            emit(Alloc(full))
        if s.offload_optimizer:
            emit(Wait("h2d", ("update", g)))
            n_bytes = host_numel(group, s) * full.n_bytes // group.padded_numel
            emit(Copy("h2d", "updated_params", g, n_bytes, ("h2d", g)))
            if s.delayed_update:
                self.outgoing.append(g)
            elif b.host_update is not None:
                self.returning.append(g)
        if not gathers:
            return
        if s.offload_optimizer:
            emit(Wait("gather", ("h2d", g)))
        emit(Collective("all_gather", "updated_params", g, full.n_bytes, "gather", ("gather", g), self.shards))
        if offloaded:
            emit(Wait("d2h", ("gather", g)))
            emit(Copy("d2h", "updated_params", g, full.n_bytes, ("d2h", g)))
            emit(Wait("compute", ("d2h", g)))
            emit(Free(full))

    def _finish_return(self, keep: int) -> None:
        """Drop what has been copied back to the device; ``keep`` copies may go on while the host steps the next group."""
        while len(self.returning) > keep:
            g = self.returning.pop(0)
            update = self.buffers[g].host_update
            assert update is not None
            self.events += [Wait("host", ("h2d", g)), Free(update)]


def _persistent(b: GroupBuffers) -> list:
    """Buffers that live from step to step."""
    kept = b.kept_params if b.is_fetched else b.full_params
    on_device = (b.device_part.master, *b.device_part.optimizer_states) if b.device_part is not None else ()
    states = (b.master, *b.optimizer_states, *on_device)
    return [x for x in (kept, b.secondary_params, b.host_grads, *states) if x is not None and x.place != "nvme"]
