"""Builds the ``StepProgram``: what one rank does in one training step, in issue order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from estimator.job.mesh import Mesh, Span
from estimator.job.strategy import Strategy
from estimator.schedule import nvme
from estimator.schedule.activations import InputCopies
from estimator.schedule.buffers import GroupBuffers, delayed_buffers, group_buffers, host_numel, is_offloaded, stage_of
from estimator.schedule.events import (
    Accumulate,
    Alloc,
    Collective,
    CollectiveOp,
    Compute,
    Copy,
    Event,
    Free,
    GradNorm,
    Keep,
    Pass,
    Section,
    StepProgram,
    Stream,
    Update,
    Wait,
)
from estimator.schedule.messages import Hop, quantized_gather, secondary_gather
from estimator.schedule.nvme import N_SLOTS
from estimator.schedule.ranks import GroupRanks
from estimator.schedule.reduction import compressed, errors, exact, sum_again, touched_rows
from estimator.schedule.servers import Serving, push, serving, under_way
from estimator.schedule.stages import PipelinePlace, pipeline_sections
from estimator.sharding.layout import Group, Layout


class _Visit(NamedTuple):
    """One unit's turn in a micro-batch: which pass it runs and whose parameters it reads."""

    unit: int
    phase: Pass
    reads: tuple[int, ...]
    """Groups whose ``full_params`` must be present."""


def build_program(
    layout: Layout, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, *, fused_step: bool = False,
    pipeline: PipelinePlace | None = None, is_server: bool = True,
) -> StepProgram:  # fmt: skip
    """The program of one rank. ``zero_stage`` is the stage in effect (see ``Job.zero_stage``); ``fused_step`` as for
    ``group_buffers``; ``pipeline``: of which rank of a pipeline ``layout`` has the units; ``is_server``: with parameter servers,
    whether it is one."""
    role = serving(strategy, mesh.n_data, is_server)
    return _Builder(layout, strategy, zero_stage, mesh, fused_step, pipeline, role).build(n_micro_batches)


class _Builder:
    """Writes the events of one strategy. Methods are in the order in which a step meets them."""

    def __init__(
        self, layout: Layout, strategy: Strategy, zero_stage: int, mesh: Mesh, fused_step: bool,
        pipeline: PipelinePlace | None, role: Serving | None,
    ) -> None:  # fmt: skip
        self.layout, self.strategy, self.stage, self.mesh = layout, strategy, zero_stage, mesh
        self.pipeline, self.role = pipeline, role
        self.late = {group.number for group in layout.groups if group.kind.shared}
        """Groups whose gradients another stage adds to, when both have run their last pass."""
        self.ranks = GroupRanks(layout, strategy, zero_stage, mesh)
        self.stages = [stage_of(group, zero_stage) for group in layout.groups]
        self.shards = [self.ranks.shards(group) for group in layout.groups]
        self.again = [self.ranks.again(group) for group in layout.groups]
        """By group: over whom its reduced gradients are summed once more, in a step's last micro-batch."""
        self.buffers = [
            group_buffers(g, strategy, zero_stage, fused_step=fused_step, serving=role) for g in layout.groups
        ]
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
        self.inputs = InputCopies(layout.units, strategy)
        self.nearby: set[int] = set()
        """Groups of which the ranks nearby hold a copy, in this step."""

    def build(self, n_micro_batches: int) -> StepProgram:
        self.n_micro_batches = n_micro_batches
        init: tuple[Event, ...] = tuple(Alloc(b) for group in self.buffers for b in group.persistent)
        if (compression := self.strategy.grad_compression) != "none" and self.mesh.n_data > 1:
            init += tuple(
                Alloc(b) for group in self.trained for b in errors(group, compression, self.stage, self.mesh.n_data)
            )
        init += tuple(self.inputs.init())
        for b in (self.buffers[group.number] for group in self.trained):
            init += tuple(Alloc(held) for held in under_way(b.full_grads, b.received, self.strategy.staleness))
        sections: list[Section] = []
        if self.strategy.delayed_update:
            init += tuple(Alloc(b) for b in delayed_buffers(self.buffers))
            self.events += [Update(g.number, g.shard_numel, "worker") for g in reversed(self.trained)]
            sections.append(self._section("delayed_update", 1))
        if self.strategy.offload_nvme:
            init += tuple(Alloc(b) for b in nvme.slots(self.trained, self.strategy))
        if self.pipeline is not None:
            sections += pipeline_sections(self, self.pipeline, n_micro_batches)
        for first, last, repeat in self._turns(n_micro_batches) if self.pipeline is None else ():
            self._micro_batch(first, last)
            sections.append(self._section("micro_batch", repeat))
        self._optimizer()
        sections.append(self._section("optimizer", 1))
        return StepProgram(init, tuple(sections))

    def _turns(self, n_micro_batches: int) -> list[tuple[bool, bool, int]]:
        """Kinds of micro-batches in a step: whether it is the first, whether the last, and how many there are.

        The last one is special only where it alone reduces (stages 0, 1; sums once more) or sends gradients to the host.
        """
        if n_micro_batches == 1:
            return [(True, True, 1)]
        if self.stage >= 2 and not any(self.again) and not self.strategy.offload_optimizer:
            return [(True, False, 1), (False, False, n_micro_batches - 1)]
        middle = [(False, False, n_micro_batches - 2)] if n_micro_batches > 2 else []
        return [(True, False, 1), *middle, (False, True, 1)]

    def _section(self, name: str, repeat: int) -> Section:
        section = Section(name, tuple(self.events), repeat)  # type: ignore[arg-type]
        self.events = []
        return section

    def _visits(self) -> list[_Visit]:
        """Every unit's turns. Backward ends at the first unit with a trained parameter. The loss is the last unit's, of a
        pipeline's last rank."""
        units, groups_of = self.layout.units, self.layout.groups_of_unit
        reads = [
            tuple(dict.fromkeys(g for u in (*unit.borrows, i) for g in groups_of[u] if g in self.fetches))
            for i, unit in enumerate(units)
        ]
        last, first_trained = len(units) - 1, min(group.units.start for group in self.trained)
        loss = last if self.pipeline is None or self.pipeline.is_last else None
        forward = [_Visit(i, "loss" if i == loss else "forward", reads[i]) for i in range(last + 1)]
        return forward + [
            _Visit(i, "backward", reads[i] if units[i].backward_reads else ())
            for i in range(last, first_trained - 1, -1)
        ]

    # ---- a micro-batch ------------------------------------------------------------------------------------------

    def _micro_batch(self, first: bool, last: bool) -> None:
        """Forward and backward of one micro-batch; ``first`` and ``last`` of its step."""
        if first:
            self.nearby.clear()
        if last and self.strategy.offload_nvme:
            self.events += [nvme.read(group, self.strategy) for group in self.trained[:N_SLOTS]]
        self.run_visits(self.visits, first, last)

    def run_visits(self, visits: Sequence[_Visit], first: bool, last: bool, after: Sequence[Event] = ()) -> None:
        """Units' turns, one after another; ``after`` follows at once on the last one's arithmetic. ``first`` and ``last``: with
        respect to gradients."""
        emit = self.events.append
        depth = self.strategy.prefetch_depth
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
            if visit.phase in ("backward", "input_grad"):
                opening = (g for g in self.opening[visit.unit] if first or self.stages[g] >= 2)
                self.events += [Alloc(self.buffers[g].full_grads) for g in opening]
            self.events += self.inputs.before(visit.unit, visit.phase)
            emit(Compute(visit.unit, visit.phase))
            self.events += self.inputs.after(visit.unit, visit.phase)
            if position == len(visits) - 1:
                self.events += after
            still_wanted = {g for later in ahead for g in later.reads}
            for g in visit.reads:
                if g not in still_wanted:
                    emit(self.releases[g])
                    present.remove(g)
            closes = visit.phase in ("backward", "weight_grad")
            for g in self.closing[visit.unit] if closes else ():
                if not last and self.stages[g] < 2:
                    continue
                self._reduce(g, first)
                if self.ranks.is_alone(self.layout.groups[g]):
                    self._finish_reduce(g, first, last)
                    continue
                reducing.append(g)
                two_hops = self.ranks.n_replicas > 1 or self.compresses
                leaves = self.strategy.offload_optimizer or two_hops or self.role is not None
                leaves_early = self.stage >= 2 or (last and leaves)
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
        if self.stages[g] == 3:
            if kept.place == "host":
                events.append(Wait("gather", ("h2d", g)))
            events.append(Collective("all_gather", "params", g, full.n_bytes, "gather", ("gather", g), self.shards[g]))
        return events

    def _arrival(self, b: GroupBuffers) -> list[Event]:
        """Make the compute stream wait for a group's parameters."""
        g = b.full_params.group
        events: list[Event] = [Wait("compute", ("gather", g) if self.stages[g] == 3 else ("h2d", g))]
        if self.strategy.quantized_weights:
            events = self._quantized_gather(g).arrive
        if b.staging is not None:
            events.append(Free(b.staging))
        if b.secondary_params is not None:
            events.append(Keep(g, b.secondary_params.n_bytes))
        return events

    def _quantized_gather(self, g: int) -> Hop:
        group = self.layout.groups[g]
        return quantized_gather(
            g, group.shard_numel, self.buffers[g].full_params, self.mesh.data_groups(self.layout.n_shards)
        )

    def _near(self, fetched: dict[int, GroupBuffers]) -> dict[int, Hop]:
        """How groups are fetched again where ranks nearby share a copy."""
        span = self.mesh.data_groups(self.strategy.secondary_shard)
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
        hops, crosses = self._hops(g, first), last and bool(self.again[g])
        if crosses and self.stage == 1:
            self.events.append(Wait("reduce", ("reduce", g)))
        elif hops:
            self.events += hops[0].arrive
        if len(hops) < 2:
            self._accumulate(g, first)
        if len(hops) == 2 or crosses:
            second = hops[1] if len(hops) == 2 else self._sum_again(g)
            self.events += second.issue
            self.crossing.append((g, second))
            self._finish_crossing(1, first, last)
        elif last:
            self._offload(g)

    def _sum_again(self, g: int) -> Hop:
        b = self.buffers[g]
        return sum_again(b, b.full_grads.n_bytes // self.layout.groups[g].n_shards, self.again[g])

    def _finish_crossing(self, keep: int, first: bool, last: bool) -> None:
        """Wait for second hops; ``keep`` of them may still be under way."""
        while len(self.crossing) > keep:
            g, hop = self.crossing.pop(0)
            self.events += hop.arrive
            if len(self._hops(g, first)) == 2:
                self._accumulate(g, first)
            if last:
                self._offload(g)

    def sum_late_gradients(self, span: Span) -> list[Event]:
        """Add up, over ``span``, the gradients of what another pipeline stage holds too."""
        groups, self.late = sorted(self.late), set()
        hops = [sum_again(b := self.buffers[g], b.full_grads.n_bytes // self.layout.n_shards, [span]) for g in groups]
        self.events += [event for hop in hops for event in (*hop.issue, *hop.arrive)]
        for g in groups:
            self._offload(g)
        self._finish_offload(keep=0)
        events, self.events = self.events, []
        return events

    def _hops(self, g: int, first: bool) -> tuple[Hop, ...]:
        """How a group's gradients are summed over the ranks that share a copy; nothing where one rank does."""
        b, group = self.buffers[g], self.layout.groups[g]
        if self.role is not None:
            return (push(b.full_grads, b.received, b.server_sum, self.strategy.staleness, self.mesh.n_data),)
        if self.ranks.n_holders(group) == 1:
            return ()
        if group.kind.table:
            table = next(self.layout.slots(group)).param
            return (touched_rows(group, b, table, self.n_micro_batches, self.mesh.n_data),)
        if not self.compresses:
            return (exact(b, self.stages[g], self.shards[g]),)
        return compressed(self.layout.groups[g], b, self.strategy, self.stage, self.mesh.n_data, first)

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
        if b.host_grads is not None and g not in self.late:
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
        return self.stages[group.number] in (1, 2) or (self.role is not None and self.role.n_ranks > 1)

    def _grad_norm(self, stream: Stream) -> None:
        """Squares of this rank's gradients, summed over the ranks that hold different ones."""
        if self.strategy.grad_clip == 0 and self.strategy.dtype != "fp16":
            return
        for group in self.trained if self.role is None or self.role.is_server else ():
            b = self.buffers[group.number]
            n_bytes = (
                b.server_sum.n_bytes if b.server_sum else b.full_grads.n_bytes * group.shard_numel // group.padded_numel
            )
            self.events.append(GradNorm(group.number, n_bytes, stream, self.ranks.copies(group)))
        spans = self.ranks.with_other_gradients()
        for span in spans:
            beside: Stream = "reduce" if self.role is None else "gather"  # not behind pushes that may be late
            self.events.append(Collective("all_reduce", "grad_norm", -1, 4, beside, ("grad_norm", -1), span))
            self.events.append(Wait(stream, ("grad_norm", -1)))
        if self.is_split:  # the host's part is stepped with the same norm
            last = ("grad_norm", -1) if spans else ("square", self.trained[-1].number)
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

    def _update(self, g: int, numel: int, stream: Stream) -> None:
        """Step this rank's shard of one group."""
        emit, b = self.events.append, self.buffers[g]
        if not b.is_stepped:
            return
        if b.update_temp is not None:
            emit(Alloc(b.update_temp))
        if b.host_update is not None:
            emit(Alloc(b.host_update))
        emit(Update(g, numel, stream))
        if b.update_temp is not None:
            emit(Free(b.update_temp))
        if not self.strategy.offload_optimizer:
            emit(Free(b.server_sum or b.grad_shard or b.full_grads))

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
        op: CollectiveOp = "all_gather" if self.role is None else "pull"
        emit(Collective(op, "updated_params", g, full.n_bytes, "gather", ("gather", g), self.shards[g]))
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
