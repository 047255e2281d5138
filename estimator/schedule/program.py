"""Builds the ``StepProgram``: what one rank does in one training step, in issue order."""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.framework import FRAMEWORKS
from estimator.job.mesh import Mesh, Span
from estimator.job.strategy import Strategy
from estimator.schedule import nvme
from estimator.schedule.activations import InputCopies
from estimator.schedule.buffers import delayed_buffers, group_buffers, stage_of
from estimator.schedule.events import (
    Accumulate,
    Alloc,
    Buffer,
    Compute,
    Copy,
    Event,
    Free,
    Section,
    StepProgram,
    Update,
    Wait,
)
from estimator.schedule.fetching import Fetching, Visit
from estimator.schedule.messages import Hop
from estimator.schedule.nvme import N_SLOTS
from estimator.schedule.ranks import GroupRanks
from estimator.schedule.reduction import compressed, errors, exact, sum_again, touched_rows
from estimator.schedule.servers import Serving, push, serving, under_way
from estimator.schedule.shared_buckets import Filling, buckets, grad_parts, keeps_own_grads, leaves_buckets_reduced
from estimator.schedule.stages import PipelinePlace, StageWriter
from estimator.schedule.unit_buffers import Units, add_up, put_together, reduce_unit, unit_buffers, with_lists
from estimator.schedule.update import OptimizerStep
from estimator.sharding.layout import Layout, apart


def build_program(
    layout: Layout, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, *, fused_step: bool = False,
    pipeline: PipelinePlace | None = None, is_server: bool = True,
) -> StepProgram:  # fmt: skip
    """The program of one rank. ``zero_stage`` is the stage in effect (see ``Job.zero_stage``); ``fused_step`` as for
    ``group_buffers``; ``pipeline``: of which rank of a pipeline ``layout`` has the units; ``is_server``: with parameter servers,
    whether it is one."""
    if pipeline is not None:
        alike = StagePrograms(
            layout, strategy, zero_stage, mesh, n_micro_batches, pipeline.alike(), fused_step=fused_step
        )
        return alike.of(pipeline.rank)
    zero_stage = _stage_in_effect(strategy, zero_stage, n_micro_batches)
    role = serving(strategy, mesh.n_data, is_server)
    return _Builder(layout, strategy, zero_stage, mesh, fused_step, None, role).build(n_micro_batches)


def _stage_in_effect(strategy: Strategy, zero_stage: int, n_micro_batches: int) -> int:
    return 2 if zero_stage == 1 and leaves_buckets_reduced(strategy, n_micro_batches) else zero_stage


class StagePrograms:
    """Programs of pipeline ranks that hold alike units and stand at ``place`` or alike: they differ in the order of their passes
    alone, and equal passes are one object."""

    def __init__(
        self, layout: Layout, strategy: Strategy, zero_stage: int, mesh: Mesh, n_micro_batches: int, place: PipelinePlace,
        *, fused_step: bool,
    ) -> None:  # fmt: skip
        self.n_micro_batches = n_micro_batches
        zero_stage = _stage_in_effect(strategy, zero_stage, n_micro_batches)
        builder = _Builder(layout, strategy, zero_stage, mesh, fused_step, place, None)
        self._writer = StageWriter(builder, place)
        self._around = builder.build(n_micro_batches)

    def of(self, rank: int) -> StepProgram:
        """The program of pipeline rank ``rank``."""
        passes = self._writer.sections(rank, self.n_micro_batches)
        *before, optimizer = self._around.step
        return StepProgram(self._around.init, (*before, *passes, optimizer))


class _Builder(OptimizerStep):
    """Writes the events of one strategy. Methods are in the order in which a step meets them."""

    def __init__(
        self, layout: Layout, strategy: Strategy, zero_stage: int, mesh: Mesh, fused_step: bool,
        pipeline: PipelinePlace | None, role: Serving | None,
    ) -> None:  # fmt: skip
        self.by_unit = FRAMEWORKS[strategy.framework].units != "groups"
        """Units are gathered and reduced one by one, as in stage 3; the stage says how long they stay."""
        self.overlaps_units = FRAMEWORKS[strategy.framework].units == "flat"
        """One unit's reduction goes on while the next is written to what is reduced."""
        zero_stage = 3 if self.by_unit else zero_stage
        self.layout, self.strategy, self.stage, self.mesh = layout, strategy, zero_stage, mesh
        self.pipeline, self.role = pipeline, role
        self.late = {group.number for group in layout.groups if group.kind.shared}
        """Groups whose gradients another stage adds to, when both have run their last pass."""
        self.ranks = GroupRanks(layout, strategy, zero_stage, mesh)
        self.stages = [3 if self.by_unit else stage_of(group, zero_stage) for group in layout.groups]
        self.shards = [self.ranks.shards(group) for group in layout.groups]
        self.again = [self.ranks.again(group) for group in layout.groups]
        """By group: over whom its reduced gradients are summed once more, in a step's last micro-batch."""
        self.buffers = [
            unit_buffers(g, strategy)
            if self.by_unit
            else group_buffers(g, strategy, zero_stage, fused_step=fused_step, serving=role)
            for g in layout.groups
        ]
        self.buffers = with_lists(self.buffers, layout.groups, strategy)
        self.trained = [group for group in layout.groups if group.kind.trained]
        self.opening: list[list[int]] = [[] for _ in layout.units]
        """By unit: the groups whose gradients its backward pass begins."""
        self.closing: list[list[int]] = [[] for _ in layout.units]
        """By unit: the groups whose gradients its backward pass completes."""
        for group in self.trained:
            self.opening[group.units[-1]].append(group.number)
            self.closing[group.units[0]].append(group.number)
        self.fetching: Fetching | Units = (
            Units(strategy, layout.groups, self.shards, self.buffers)
            if self.by_unit
            else Fetching(layout, strategy, self.stages, self.shards, mesh, self.buffers)
        )
        self.visits = self._visits()
        self._known_hops: dict[tuple[int, bool], tuple[Hop, ...]] = {}
        self.events: list[Event] = []
        self.leaving: list[int] = []
        self.returning: list[int] = []
        self.outgoing: list[int] = []
        self.is_split = any(b.device_part is not None for b in self.buffers)
        """Host and device each step a part: gradients stay on the device until it has stepped its own."""
        self.crossing: list[tuple[int, Hop]] = []
        self.buckets = buckets(strategy, zero_stage)
        self.filling = Filling(layout, strategy)
        self.grad_parts = grad_parts(layout, self.buffers) if keeps_own_grads(layout, strategy, zero_stage) else []
        """By unit, where gradients stay as autograd makes them: its part of its groups' ``full_grads``."""
        self.compresses = strategy.grad_compression != "none" or strategy.quantized_grads > 0
        self.inputs = InputCopies(layout.units, strategy)

    def build(self, n_micro_batches: int) -> StepProgram:
        self.n_micro_batches = n_micro_batches
        init: tuple[Event, ...] = tuple(Alloc(b) for group in self.buffers for b in group.persistent)
        init += tuple(Alloc(b) for b in self.buckets if self.stage == 3)
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

    def _is_fetched(self, g: int) -> bool:
        return self.buffers[g].is_fetched and not self.layout.groups[g].kind.idle

    def _visits(self) -> list[Visit]:
        """Every unit's turns. Backward ends at the first unit with a trained parameter. The loss is the last unit's, of a
        pipeline's last rank."""
        units, groups_of = self.layout.units, self.layout.groups_of_unit
        reads = [
            tuple(dict.fromkeys(g for u in (*unit.borrows, i) for g in groups_of[u] if self._is_fetched(g)))
            for i, unit in enumerate(units)
        ]
        last, first_trained = len(units) - 1, min(group.units.start for group in self.trained)
        gathers_all = self.by_unit and apart(units, self.strategy)  # a hook of each unit's output does
        loss = last if self.pipeline is None or self.pipeline.is_last else None
        of_loss = {
            i for i in range(last + 1) if loss is not None and (i == loss or units[i].whole == units[loss].whole != "")
        }
        visits = [Visit(i, "loss" if i in of_loss else "forward", reads[i]) for i in range(last + 1)]
        for i in range(last, first_trained - 1, -1):
            if units[i].replays and (i == last or units[i + 1].whole != units[i].whole):
                again = [j for j in range(i + 1) if units[j].whole == units[i].whole]
                visits += [Visit(j, "recompute", reads[j]) for j in again]
            visits.append(Visit(i, "backward", reads[i] if units[i].backward_reads or gathers_all else ()))
        return visits

    # ---- a micro-batch ------------------------------------------------------------------------------------------

    def _micro_batch(self, first: bool, last: bool) -> None:
        """Forward and backward of one micro-batch; ``first`` and ``last`` of its step."""
        if first:
            self.fetching.nearby.clear()
        if last and self.strategy.offload_nvme:
            self.events += [nvme.read(group, self.strategy) for group in self.trained[:N_SLOTS]]
        self.run_visits(self.visits, first, last)

    def run_visits(self, visits: Sequence[Visit], first: bool, last: bool, after: Sequence[Event] = ()) -> None:
        """Units' turns, one after another; ``after`` follows at once on the last one's arithmetic. ``first`` and ``last``: with
        respect to gradients."""
        emit = self.events.append
        turns = self.fetching.turns(visits, first)
        reducing: list[int] = []
        closed_units: list[int] = []
        closed = self.buckets if self.stage == 2 or (self.stage == 1 and last) else []
        opened: list[Buffer] = []
        leaves = (
            self.strategy.offload_optimizer or self.ranks.n_replicas > 1 or self.compresses or self.role is not None
        )
        leaves_early = (self.stage >= 2 and not self.by_unit) or (last and leaves)
        for position, visit in enumerate(visits):
            self.events += turns.before(position)
            if visit.phase in ("backward", "input_grad"):
                if closed and not self.filling.by_layer:
                    self.events += map(Alloc, closed)
                    opened, closed = closed, []
                opening = [self.buffers[g] for g in self.opening[visit.unit] if first or self.stages[g] >= 2]
                self.events += [
                    Alloc(b.full_grads)
                    for b in opening
                    if b.unit is None and not (b.lasting_grads or b.bucketed or self.grad_parts)
                ]
            self.events += self.inputs.before(visit.unit, visit.phase)
            emit(Compute(visit.unit, visit.phase))
            self.events += self.inputs.after(visit.unit, visit.phase)
            if position == len(visits) - 1:
                self.events += after
            closing = self.closing[visit.unit] if visit.phase in ("backward", "weight_grad") else []
            if self.by_unit and self.pipeline is not None:
                self.events += [event for g in closing for event in add_up(self.buffers[g], first)]
                closed_units += closing if last else []
                closing = []
            for g in closing:
                self.events += put_together(self.buffers[g])
                if self.filling.takes(self.buffers[g]):
                    self._reduce_bucket(self.filling.before(g), first, last, g)
                    self.filling.held.append(g)
            if (
                closed
                and visit.phase == "backward"
                and self.filling.by_layer
                and self.layout.units[visit.unit].is_trained
            ):
                self.events += self.filling.made(visit.unit, closed)
                opened, closed = closed, []
            if opened and visit.phase == "backward":
                self.events += self.filling.copies(visit.unit, self.stage)
            if self.grad_parts and first and visit.phase == "backward":
                self.events += map(Alloc, self.grad_parts[visit.unit])
            self.events += turns.after(position)
            for g in closing:
                if not last and self.stages[g] < 2:
                    continue
                if self.filling.takes(self.buffers[g]):
                    continue
                while reducing and self.by_unit and not self.overlaps_units:
                    self._finish_reduce(reducing.pop(0), first, last)
                self._reduce(g, first)
                if self.ranks.is_alone(self.layout.groups[g]):
                    self._finish_reduce(g, first, last)
                    continue
                reducing.append(g)
                if leaves_early and len(reducing) > 1:
                    self._finish_reduce(reducing.pop(0), first, last)
        self._reduce_bucket(self.filling.held, first, last)
        self._finish_bucket(first, last)
        for g in closed_units:
            while reducing:
                self._finish_reduce(reducing.pop(0), True, last)
            self.events += [
                Free(self.buffers[g].full_params),
                *reduce_unit(self.buffers[g], self._hops(g, True), True, adds_up=True),
            ]
            reducing.append(g)
        for g in reducing:
            self._finish_reduce(g, first, last)
        if opened:
            self.events += self.filling.rest(self.stage)
        self.events += map(Free, opened)
        self._finish_crossing(0, first, last)
        self._finish_offload(keep=0)

    def _reduce_bucket(self, held: list[int], first: bool, last: bool, entering: int | None = None) -> None:
        """Reduce what a bucket that all groups share holds, ``held``, and empty it; the gradients of group ``entering`` wait for
        it to be empty."""
        if not held:
            return
        self._finish_bucket(first, last)
        sent = self.filling.sent(held, entering)
        hops = [self._hops(g, first) for g in held]
        self.events += [Alloc(sent), *(event for hop in hops for event in (hop[0].issue if hop else ()))]
        self.events.append(Free(sent))
        self.filling.under_way += held
        held.clear()
        if self.strategy.overlap_comm is False:
            self._finish_bucket(first, last)

    def _finish_bucket(self, first: bool, last: bool) -> None:
        """What the bucket held before has been reduced."""
        for g in self.filling.under_way:
            self._finish_reduce(g, first, last)
        self.filling.under_way.clear()

    def _reduce(self, g: int, first: bool) -> None:
        """Start summing a group's gradients over the ranks, now that backward has written all of them."""
        b, hops = self.buffers[g], self._hops(g, first)
        if b.unit is not None:
            self.events += reduce_unit(b, hops, first)
            return
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
        known = self._known_hops.get((g, first))
        if known is None:
            known = self._known_hops[g, first] = self._hops_of(g, first)
        return known

    def _hops_of(self, g: int, first: bool) -> tuple[Hop, ...]:
        b, group = self.buffers[g], self.layout.groups[g]
        if self.role is not None:
            return (push(b.full_grads, b.received, b.server_sum, self.strategy.staleness, self.mesh.n_data),)
        if self.ranks.n_holders(group) == 1 or (self.by_unit and group.n_shards == 1):
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
        if b.unit is not None:
            self.events += [] if self.overlaps_units else [Free(b.full_grads)]
            return
        if not first:
            emit(Accumulate(g, b.grad_shard.n_bytes))
        if b.bucketed and b.lasting_grads:
            return
        if not first:
            emit(Free(b.reduced))
        if not self.compresses and not b.bucketed:
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
