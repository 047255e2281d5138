"""Which ranks a group's collectives join: those that share its states, that sum its gradients, and that hold other ones."""

from __future__ import annotations

from estimator.job.mesh import Mesh, Span
from estimator.job.strategy import Strategy
from estimator.schedule.events import Stream
from estimator.sharding.layout import Group, Layout


def sharers(group: Group, mesh: Mesh, ep: int) -> Span:
    """The ranks that share one copy of ``group``'s states: data ranks, of experts every ``ep``-th of them."""
    return mesh.data_groups(group.n_shards, ep if group.kind.expert else 1)


def expert_spans(strategy: Strategy, zero_stage: int, mesh: Mesh) -> list[tuple[Stream, Span]]:
    """Streams and ranks of the collectives of experts' groups, which some stages of a pipeline may not have."""
    n_holders = mesh.n_data // strategy.ep
    if mesh.pp == 1 or strategy.ep == 1 or n_holders == 1:
        return []
    streams: tuple[Stream, ...] = ("reduce", "gather") if zero_stage else ("reduce",)
    return [(stream, mesh.data_groups(n_holders, strategy.ep)) for stream in streams]


class GroupRanks:
    """The ranks of every group of ``layout`` with ``zero_stage`` in effect."""

    def __init__(self, layout: Layout, strategy: Strategy, zero_stage: int, mesh: Mesh) -> None:
        self.layout, self.strategy, self.mesh = layout, strategy, mesh
        self.n_replicas = mesh.n_data // layout.n_shards if zero_stage else 1
        self.n_different = mesh.n_data if strategy.has_servers else layout.n_shards if zero_stage else strategy.ep
        """Neighbouring data ranks over whose gradients the norm is summed."""

    def n_holders(self, group: Group) -> int:
        """Data ranks that hold the same parameters, whose gradients are summed."""
        return self.mesh.n_data // (self.strategy.ep if group.kind.expert else 1)

    def is_alone(self, group: Group) -> bool:
        """Whether no other of several data ranks holds the group's parameters."""
        return self.n_holders(group) == 1 < self.mesh.n_data

    def shards(self, group: Group) -> Span | None:
        """Over whom the group's gradients are reduced first, and its parameters gathered."""
        if group.kind.expert:
            return self.mesh.data_groups(self.n_holders(group), self.strategy.ep)
        return self.mesh.data_groups(self.layout.n_shards) if self.n_replicas > 1 else self.mesh.data_span()

    def again(self, group: Group) -> list[Span]:
        """Over whom its reduced gradients are summed once more: replicas of the shards; and tensor-parallel ranks, which under
        sequence parallelism pass their own parts of the sequence through parameters that each holds whole."""
        spans = [self.mesh.data_groups(self.n_replicas, self.layout.n_shards)] if self.n_replicas > 1 else []
        tensor = self.mesh.span("tp")
        if tensor.size > 1 and self.strategy.sequence_parallel and not group.kind.split and group.kind.trained:
            spans.append(tensor)
        return spans

    def copies(self, group: Group) -> int:
        """How often each of the group's gradients is among those over which the norm is summed. Without sharding experts differ
        among expert-parallel ranks, and all else is there on each of them."""
        whole = self.strategy.ep if group.n_shards == self.layout.n_shards == 1 and not group.kind.expert else 1
        return whole * (1 if group.kind.split else self.mesh.tp) * (2 if group.kind.shared else 1)

    def with_other_gradients(self) -> list[Span | None]:
        """Ranks that hold different parts of the gradients: of the shards, of parameters that tensor-parallel or expert-parallel
        ranks split, and of other pipeline stages; where one span cannot say it, one after another."""
        near = Span(self.mesh.tp * self.n_different)
        stages = self.mesh.span("pp")
        spans = [Span(near.size * stages.size)] if near.size == stages.stride else [near, stages]
        return [None if span.size == self.mesh.size else span for span in spans if span.size > 1]
