"""The end of a step: the gradients' norm, the optimizer's updates, and new parameters on their way to all who read them."""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.mesh import Span
from estimator.job.strategy import Strategy
from estimator.schedule import nvme
from estimator.schedule.buffers import GroupBuffers, host_numel, is_offloaded
from estimator.schedule.events import (
    Alloc,
    Buffer,
    Collective,
    CollectiveOp,
    Copy,
    Event,
    Free,
    GradNorm,
    Stream,
    Update,
    Wait,
)
from estimator.schedule.ranks import GroupRanks
from estimator.schedule.servers import Serving
from estimator.schedule.shared_buckets import own_part, step_copies
from estimator.sharding.layout import Group, Layout


class OptimizerStep:
    """Writes the optimizer step's events into ``events``; a program's builder is one. Methods are in the order in which a step meets them."""

    layout: Layout
    strategy: Strategy
    stages: Sequence[int]
    shards: Sequence[Span | None]
    ranks: GroupRanks
    buffers: Sequence[GroupBuffers]
    trained: Sequence[Group]
    role: Serving | None
    is_split: bool
    grad_parts: Sequence[Sequence[Buffer]]
    """Not empty: gradients stay as autograd makes them, by unit."""
    events: list[Event]
    returning: list[int]
    outgoing: list[int]

    def _drop_copied_grads(self, g: int) -> None:
        self.events.append(Wait("compute", ("d2h", g)))
        self.events.append(Free(self.buffers[g].grad_shard or self.buffers[g].full_grads))

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
        self.events += self._own_grads()
        made, wide = step_copies(self.trained, s)
        self.events += [*map(Alloc, (*made, *wide)), *map(Free, made)]
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
        self.events += map(Free, wide)
        self._finish_return(keep=0)
        for group in self.trained:
            if not is_offloaded(group, s) and (self._gathers(group) or s.offload_optimizer):
                emit(Wait("compute", ("gather" if self._gathers(group) else "h2d", group.number)))
        for g in self.outgoing:  # the next late step writes there
            emit(Wait("host", ("h2d", g)))
        self.outgoing.clear()
        if s.offload_nvme:
            self.events += nvme.finish(self.trained, s)

    def _own_grads(self) -> list[Event]:
        """Where gradients stay as autograd makes them, those of other ranks' shards go before the step (``free_grad_in_param_list``)."""
        if not self.grad_parts:
            return []
        left = [own_part(self.buffers[group.number].full_grads, group) for group in self.trained]
        return [*(Free(part) for parts in self.grad_parts for part in parts), *map(Alloc, left)]

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
        if not self.strategy.offload_optimizer and not b.lasting_grads:
            left = own_part(b.full_grads, self.layout.groups[g]) if self.grad_parts else b.full_grads
            emit(Free(b.server_sum or b.grad_shard or left))

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
