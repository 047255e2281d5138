"""Builds the ``StepProgram``: what one rank does in one training step, in issue order."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.strategy import Strategy
from estimator.schedule.buffers import GroupBuffers, group_buffers
from estimator.schedule.events import (
    Accumulate,
    Alloc,
    Collective,
    Compute,
    Copy,
    Event,
    Free,
    GradNorm,
    Pass,
    Section,
    StepProgram,
    Update,
    Wait,
)
from estimator.sharding.layout import Layout


class _Visit(NamedTuple):
    """One unit's turn in a micro-batch: which pass it runs and whose parameters it reads."""

    unit: int
    phase: Pass
    reads: tuple[int, ...]
    """Groups whose ``full_params`` must be present."""


def build_program(layout: Layout, strategy: Strategy, zero_stage: int, dp: int, n_micro_batches: int) -> StepProgram:
    """The program of one rank. ``zero_stage`` is the stage in effect (see ``Job.zero_stage``)."""
    return _Builder(layout, strategy, zero_stage, dp).build(n_micro_batches)


class _Builder:
    """Writes the events of one strategy. Methods are in the order in which a step meets them."""

    def __init__(self, layout: Layout, strategy: Strategy, zero_stage: int, dp: int) -> None:
        self.layout, self.strategy, self.stage, self.dp = layout, strategy, zero_stage, dp
        self.buffers = [group_buffers(group, strategy, zero_stage) for group in layout.groups]
        fetched = [b for b in self.buffers if b.is_fetched]
        self.fetches = [self._fetch(b) for b in fetched]
        self.arrivals = [self._arrival(b) for b in fetched]
        self.releases = [Free(b.full_params) for b in fetched]
        self.visits = self._visits()
        self.events: list[Event] = []
        self.leaving: list[int] = []

    def build(self, n_micro_batches: int) -> StepProgram:
        init = tuple(Alloc(b) for group in self.buffers for b in _persistent(group))
        sections: list[Section] = []
        for first, last, repeat in self._turns(n_micro_batches):
            self._micro_batch(first, last)
            sections.append(self._section("micro_batch", repeat))
        self._optimizer()
        sections.append(self._section("optimizer", 1))
        return StepProgram(init, tuple(sections))

    def _turns(self, n_micro_batches: int) -> list[tuple[bool, bool, int]]:
        """Kinds of micro-batches in a step: whether it is the first, whether the last, and how many there are.

        The last one is special only where it alone reduces (stages 0, 1) or sends gradients to the host.
        """
        if n_micro_batches == 1:
            return [(True, True, 1)]
        if self.stage >= 2 and not self.strategy.offload_optimizer:
            return [(True, False, 1), (False, False, n_micro_batches - 1)]
        middle = [(False, False, n_micro_batches - 2)] if n_micro_batches > 2 else []
        return [(True, False, 1), *middle, (False, True, 1)]

    def _section(self, name: str, repeat: int) -> Section:
        section = Section(name, tuple(self.events), repeat)  # type: ignore[arg-type]
        self.events = []
        return section

    def _visits(self) -> list[_Visit]:
        units, group_of = self.layout.units, self.layout.group_of_unit
        if not self.buffers[0].is_fetched:
            reads: list[tuple[int, ...]] = [() for _ in units]
            backward_reads = reads
        else:
            reads = [
                tuple(dict.fromkeys((*(group_of[b] for b in u.borrows), group_of[i]))) for i, u in enumerate(units)
            ]
            backward_reads = [r if u.backward_reads else () for r, u in zip(reads, units, strict=True)]
        last = len(units) - 1
        forward = [_Visit(i, "loss" if i == last else "forward", reads[i]) for i in range(last + 1)]
        return forward + [_Visit(i, "backward", backward_reads[i]) for i in range(last, -1, -1)]

    # ---- a micro-batch ------------------------------------------------------------------------------------------

    def _micro_batch(self, first: bool, last: bool) -> None:
        """Forward and backward of one micro-batch; ``first`` and ``last`` of its step."""
        emit = self.events.append
        depth, visits = self.strategy.prefetch_depth, self.visits
        present: set[int] = set()
        in_flight: set[int] = set()
        reducing: list[int] = []
        group_of, groups = self.layout.group_of_unit, self.layout.groups
        for position, visit in enumerate(visits):
            ahead = visits[position + 1 : position + 1 + depth]
            for wanted in (visit, *ahead):
                for g in wanted.reads:
                    if g not in present:
                        self.events += self.fetches[g]
                        present.add(g)
                        in_flight.add(g)
            for g in visit.reads:
                if g in in_flight:
                    self.events += self.arrivals[g]
                    in_flight.remove(g)
            group = groups[group_of[visit.unit]]
            backward = visit.phase == "backward"
            if backward and visit.unit == group.units[-1] and (first or self.stage >= 2):
                emit(Alloc(self.buffers[group.number].full_grads))
            emit(Compute(visit.unit, visit.phase))
            still_wanted = {g for later in ahead for g in later.reads}
            for g in visit.reads:
                if g not in still_wanted:
                    emit(self.releases[g])
                    present.remove(g)
            if backward and visit.unit == group.units[0] and (last or self.stage >= 2):
                self._reduce(group.number, first)
                reducing.append(group.number)
                leaves_early = self.stage >= 2 or (last and self.strategy.offload_optimizer)
                if leaves_early and len(reducing) > 1:
                    self._finish_reduce(reducing.pop(0), first, last)
        for g in reducing:
            self._finish_reduce(g, first, last)
        self._finish_offload(keep=0)

    def _fetch(self, b: GroupBuffers) -> list[Event]:
        """Bring a group's parameters in: copy from the host, gather from the other ranks, or both."""
        full, kept = b.full_params, b.kept_params
        assert kept is not None
        g = full.group
        events: list[Event] = [Alloc(full)]
        if b.staging is not None:
            events.append(Alloc(b.staging))
        if kept.place == "host":
            events.append(Copy("h2d", "params", g, kept.n_bytes, ("h2d", g)))
        if self.stage == 3:
            if kept.place == "host":
                events.append(Wait("gather", ("h2d", g)))
            events.append(Collective("all_gather", "params", g, full.n_bytes, "gather", ("gather", g)))
        return events

    def _arrival(self, b: GroupBuffers) -> list[Event]:
        """Make the compute stream wait for a group's parameters."""
        g = b.full_params.group
        events: list[Event] = [Wait("compute", ("gather", g) if self.stage == 3 else ("h2d", g))]
        if b.staging is not None:
            events.append(Free(b.staging))
        return events

    def _reduce(self, g: int, first: bool) -> None:
        """Start summing a group's gradients over the ranks, now that backward has written all of them."""
        emit, b = self.events.append, self.buffers[g]
        if b.grad_shard is not None and b.reduced is not None:
            emit(Alloc(b.grad_shard if first else b.reduced))
        if self.dp > 1:
            op = "reduce_scatter" if self.stage >= 1 else "all_reduce"
            emit(Collective(op, "grads", g, b.full_grads.n_bytes, "reduce", ("reduce", g)))  # type: ignore[arg-type]

    def _finish_reduce(self, g: int, first: bool, last: bool) -> None:
        emit, b = self.events.append, self.buffers[g]
        if self.dp > 1:
            emit(Wait("compute", ("reduce", g)))
        if b.grad_shard is not None and b.reduced is not None:
            if not first:
                emit(Accumulate(g, b.grad_shard.n_bytes))
                emit(Free(b.reduced))
            emit(Free(b.full_grads))
        if last and b.host_grads is not None:
            emit(Copy("d2h", "grads", g, b.host_grads.n_bytes, ("d2h", g)))
            self.leaving.append(g)
            self._finish_offload(keep=1)

    def _finish_offload(self, keep: int) -> None:
        """Drop gradients that have arrived in host memory; ``keep`` copies may still be under way."""
        while len(self.leaving) > keep:
            g = self.leaving.pop(0)
            self.events.append(Wait("compute", ("d2h", g)))
            self.events.append(Free(self.buffers[g].grad_shard or self.buffers[g].full_grads))

    # ---- the optimizer step -------------------------------------------------------------------------------------

    def _optimizer(self) -> None:
        emit, s = self.events.append, self.strategy
        stream = "host" if s.offload_optimizer else "compute"
        if s.offload_optimizer:
            for group in self.layout.groups:
                emit(Wait("host", ("d2h", group.number)))
        if s.grad_clip > 0 or s.dtype == "fp16":
            for group in self.layout.groups:
                n_bytes = group.shard_numel * (self.buffers[group.number].full_grads.n_bytes // group.padded_numel)
                emit(GradNorm(group.number, n_bytes, stream))  # type: ignore[arg-type]
            if self.stage >= 1:
                emit(Collective("all_reduce", "grad_norm", -1, 4, "reduce", ("grad_norm", -1)))
                emit(Wait(stream, ("grad_norm", -1)))  # type: ignore[arg-type]
        for group in self.layout.groups:
            self._update(group.number, group.shard_numel, stream)
            self._publish(group.number)
        if self.stage in (1, 2) or (s.offload_optimizer and not s.offload_param):
            last_verb = "gather" if self.stage in (1, 2) else "h2d"
            for group in self.layout.groups:
                if not (self.stage in (1, 2) and s.offload_param):
                    emit(Wait("compute", (last_verb, group.number)))

    def _update(self, g: int, numel: int, stream: str) -> None:
        """Step this rank's shard of one group."""
        emit, b = self.events.append, self.buffers[g]
        if b.update_temp is not None:
            emit(Alloc(b.update_temp))
        if b.host_update is not None:
            emit(Alloc(b.host_update))
        emit(Update(g, numel, stream))  # type: ignore[arg-type]
        if b.update_temp is not None:
            emit(Free(b.update_temp))
        if not self.strategy.offload_optimizer:
            emit(Free(b.grad_shard or b.full_grads))

    def _publish(self, g: int) -> None:
        """Send freshly stepped parameters where the model reads them: host to device, and to all ranks (stages 1, 2)."""
        emit, b, s = self.events.append, self.buffers[g], self.strategy
        full, gathers = b.full_params, self.stage in (1, 2)
        shard_bytes = full.n_bytes // self.layout.n_shards
        if s.offload_param and not gathers:
            return
        if s.offload_param:
            emit(Alloc(full))
        if s.offload_optimizer:
            emit(Wait("h2d", ("update", g)))
            emit(Copy("h2d", "updated_params", g, shard_bytes, ("h2d", g)))
            if b.host_update is not None:
                emit(Wait("host", ("h2d", g)))
                emit(Free(b.host_update))
        if not gathers:
            return
        if s.offload_optimizer:
            emit(Wait("gather", ("h2d", g)))
        emit(Collective("all_gather", "updated_params", g, full.n_bytes, "gather", ("gather", g)))
        if s.offload_param:
            emit(Wait("d2h", ("gather", g)))
            emit(Copy("d2h", "updated_params", g, full.n_bytes, ("d2h", g)))
            emit(Wait("compute", ("d2h", g)))
            emit(Free(full))


def _persistent(b: GroupBuffers) -> list:
    """Buffers that live from step to step."""
    kept = b.kept_params if b.is_fetched else b.full_params
    return [x for x in (kept, b.host_grads, b.master, *b.optimizer_states) if x is not None]
