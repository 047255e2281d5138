"""When groups' parameters come and go, where they do (stage 3, parameter offload, units that a framework gathers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from estimator.job.framework import FRAMEWORKS
from estimator.job.mesh import Mesh, Span
from estimator.job.strategy import Strategy
from estimator.schedule.buffers import GroupBuffers
from estimator.schedule.coordinator import Coordinator
from estimator.schedule.events import Alloc, Collective, Copy, Event, Free, Keep, Pass, Restage, Wait
from estimator.schedule.messages import Hop, quantized_gather, secondary_gather
from estimator.sharding.layout import Layout


class Visit(NamedTuple):
    """One unit's turn in a micro-batch: which pass it runs and whose parameters it reads."""

    unit: int
    phase: Pass
    reads: tuple[int, ...]
    """Groups whose ``full_params`` must be present."""


class Turns(Protocol):
    """What happens around the turns of one run over units; both are asked for in the order of turns."""

    def before(self, position: int) -> list[Event]: ...

    def after(self, position: int) -> list[Event]: ...


class Fetching:
    """This project's way: ``prefetch_depth`` turns ahead of use, and dropped after it unless read again within them."""

    def __init__(
        self, layout: Layout, strategy: Strategy, stages: Sequence[int], shards: Sequence[Span | None], mesh: Mesh,
        buffers: Sequence[GroupBuffers],
    ) -> None:  # fmt: skip
        self.layout, self.strategy, self.stages, self.shards, self.mesh = layout, strategy, stages, shards, mesh
        fetched = {b.full_params.group: b for b in buffers if b.is_fetched}
        self.depth = strategy.prefetch_depth
        self.buffers = buffers
        self.hops = {g: Hop(self._fetch(b), self._arrival(b)) for g, b in fetched.items()}
        self.near = self._near(fetched)
        self.releases = {g: Free(b.full_params) for g, b in fetched.items()}
        self.nearby: set[int] = set()
        """Groups of which the ranks nearby hold a copy, in this step."""

        profile = FRAMEWORKS[strategy.framework]
        self.prefetch_numel = strategy.prefetch_numel or profile.prefetch_numel
        self.live_numel = strategy.live_numel or profile.live_numel
        self.gathers_alone = not (strategy.quantized_weights or strategy.offload_param)
        """A fetch is a collective and nothing else."""

    def turns(self, visits: Sequence[Visit], first: bool) -> Turns:
        """Of one run over ``visits``; ``first``: of its kind in the step."""
        if not self.hops:
            return _ALWAYS_THERE
        if self.live_numel and self.gathers_alone and any(unit.whole for unit in self.layout.units):
            return Coordinator(self, visits)
        return _ByElements(self, visits) if self.live_numel else _AheadOfUse(self, visits)

    def _fetch(self, b: GroupBuffers) -> list[Event]:
        """Bring a group's parameters in: copy from the host, gather from the other ranks, or both."""
        full, kept = b.full_params, b.kept_params
        assert kept is not None
        g = full.group
        if self.strategy.quantized_weights:
            return self._quantized_gather(g).issue
        events: list[Event] = [Alloc(b.gathered or full)]
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
        elif b.gathered is not None:
            events += [
                Alloc(b.full_params),
                Restage("params", g, 2 * b.full_params.n_bytes, "compute"),
                Free(b.gathered),
            ]
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


class _AlwaysThere:
    def before(self, position: int) -> list[Event]:
        return []

    after = before


_ALWAYS_THERE = _AlwaysThere()


class _AheadOfUse:
    def __init__(self, fetching: Fetching, visits: Sequence[Visit]) -> None:
        self.fetching, self.visits = fetching, visits
        self.present: set[int] = set()
        self.in_flight: set[int] = set()

    def _hop(self, g: int) -> Hop:
        fetching = self.fetching
        return fetching.near[g] if g in fetching.nearby else fetching.hops[g]

    def _ahead(self, position: int) -> Sequence[Visit]:
        return self.visits[position + 1 : position + 1 + self.fetching.depth]

    def _issue(self, g: int) -> list[Event]:
        return self._hop(g).issue

    def before(self, position: int) -> list[Event]:
        events: list[Event] = []
        visit = self.visits[position]
        for wanted in (visit, *self._ahead(position)):
            for g in wanted.reads:
                if g not in self.present:
                    events += self._issue(g)
                    self.present.add(g)
                    self.in_flight.add(g)
        for g in visit.reads:
            if g in self.in_flight:
                events += self._hop(g).arrive
                self.fetching.nearby.update({g} & self.fetching.near.keys())
                self.in_flight.remove(g)
        return events

    def _wanted(self, position: int) -> set[int]:
        """Groups that stay after this turn."""
        return {g for later in self._ahead(position) for g in later.reads}

    def after(self, position: int) -> list[Event]:
        still_wanted = self._wanted(position)
        gone = [g for g in self.visits[position].reads if g not in still_wanted]
        self.present.difference_update(gone)
        return [self.fetching.releases[g] for g in gone]


class _ByElements(_AheadOfUse):
    """DeepSpeed's way (``deepspeed/runtime/zero/partitioned_param_coordinator.py``): gathered while no more than so many elements are
    ahead of use, and kept where they are read again within so many.

    For whole units, where layers are not units (``estimator.sharding.grain``; else it is ``Coordinator``). What is more than may be ahead has
    no room before its turn, but the gather of its first layers has begun.
    """

    def __init__(self, fetching: Fetching, visits: Sequence[Visit]) -> None:
        super().__init__(fetching, visits)
        self.numel = {g: fetching.layout.groups[g].padded_numel for g in fetching.hops}
        self.begun: set[int] = set()

    def _ahead(self, position: int) -> Sequence[Visit]:
        if sum(self.numel[g] for g in self.present) > self.fetching.live_numel:
            return ()
        left = self.fetching.prefetch_numel
        for end, later in enumerate(self.visits[position + 1 :], position + 1):
            left -= sum(self.numel[g] for g in later.reads if g not in self.present)
            if left < 0:
                return self.visits[position + 1 : end]
        return self.visits[position + 1 :]

    def _issue(self, g: int) -> list[Event]:
        events = super()._issue(g)
        if g in self.begun:
            self.begun.remove(g)
            return [event for event in events if not isinstance(event, Collective)]
        return events

    def before(self, position: int) -> list[Event]:
        events = super().before(position)
        if self.fetching.gathers_alone and position + 1 < len(self.visits):
            for g in self.visits[position + 1].reads:
                if g not in self.present | self.begun:
                    events += [event for event in super()._issue(g) if isinstance(event, Collective)]
                    self.begun.add(g)
        return events

    def _wanted(self, position: int) -> set[int]:
        left, wanted = self.fetching.live_numel, set[int]()
        for later in self.visits[position + 1 :]:
            if left <= 0:
                break
            wanted.update(later.reads)
            left -= sum(self.numel[g] for g in later.reads)
        return wanted
