"""When layers' parameters come and go under DeepSpeed's stage 3.

As ``deepspeed/runtime/zero/partitioned_param_coordinator.py`` of 0.19.8 does from the third step on (two steps record the order of layers):

- A layer's turn gathers what of it is not there (``fetch_sub_module``), waits for it, and then gathers ahead: parameters in their order of
  use until ``stage3_prefetch_bucket_size`` elements are reached or passed, or ``stage3_max_live_parameters`` are there or on their way.
- What is gathered ahead together is one message, of which every parameter gets a copy when the first of them is waited for; the message
  stays until all have been (``AllGatherCoalescedHandle``). One parameter alone is gathered into its place (``AllGatherHandle``).
- After its turn a layer drops its parameters (``release_sub_module``), but those that the look-ahead has passed by because they were there, and those that
  are read again within ``stage3_max_reuse_distance`` elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from estimator.schedule.events import Alloc, Collective, Event, Free, Restage, Wait

if TYPE_CHECKING:
    from estimator.schedule.fetching import Fetching, Visit


class _Message(NamedTuple):
    """What one collective gathers."""

    groups: tuple[int, ...]
    copies: bool
    """Parameters are copied out of it."""


class Coordinator:
    """Of one run over the turns of ``visits``, which are those of layers."""

    def __init__(self, fetching: Fetching, visits: Sequence[Visit]) -> None:
        self.fetching, self.visits = fetching, visits
        groups = fetching.layout.groups
        self.numel = {g: groups[g].numel for g in fetching.hops}
        self.alone = {g: sum(1 for _ in fetching.layout.slots(groups[g])) == 1 for g in fetching.hops}
        self.passed = [0, *accumulate(sum(self.numel[g] for g in visit.reads) for visit in visits)]
        """Elements that are read before each turn."""
        self.uses: dict[int, list[int]] = {}
        """By group, the turns that read it."""
        for turn, visit in enumerate(visits):
            for g in visit.reads:
                self.uses.setdefault(g, []).append(turn)
        self.queue = [(g, turn) for turn, visit in enumerate(visits) for g in sorted(visit.reads)]
        self.next = 0
        """Place in ``queue`` of what has not been looked at."""
        self.present: set[int] = set()
        self.under_way: dict[int, _Message] = {}
        """Messages that a group has not been waited for in."""
        self.arrived: set[_Message] = set()
        self.live_numel = 0
        self.looked_at: dict[int, int] = {}
        """By group: the last turn that the queue has been asked for it."""

    def before(self, position: int) -> list[Event]:
        reads = self.visits[position].reads
        events: list[Event] = []
        missing = [g for g in sorted(reads) if g not in self.present and g not in self.under_way]
        if missing:
            events += self._gather(missing)
        for g in sorted(reads):
            if g in self.under_way:
                events += self._wait(g)
        return [*events, *self._gather_ahead(position)]

    def after(self, position: int) -> list[Event]:
        gone = [g for g in self.visits[position].reads if g in self.present and not self._stays(g, position)]
        if position == len(self.visits) - 1:
            gone += [g for g in sorted(self.present) if g not in gone]
        for g in gone:
            self.present.remove(g)
            self.live_numel -= self.numel[g]
        return [self.fetching.releases[g] for g in gone]

    def _gather_ahead(self, position: int) -> list[Event]:
        wanted = {g for g in self.visits[position].reads if self.looked_at.get(g, -1) < position}
        while wanted:
            g, turn = self.queue[self.next]
            self.next += 1
            self.looked_at[g] = turn
            wanted.discard(g)
        limit = min(self.fetching.live_numel - self.live_numel, self.fetching.prefetch_numel)
        ahead: list[int] = []
        numel = 0
        while self.next < len(self.queue) and numel < limit:
            g, turn = self.queue[self.next]
            self.next += 1
            self.looked_at[g] = max(self.looked_at.get(g, -1), turn)
            if g not in self.present and g not in self.under_way and g not in ahead:
                ahead.append(g)
                numel += self.numel[g]
        return self._gather(ahead) if ahead else []

    def _gather(self, groups: Sequence[int]) -> list[Event]:
        message = _Message(tuple(groups), copies=len(groups) > 1 or not self.alone[groups[0]])
        self.under_way.update(dict.fromkeys(groups, message))
        self.live_numel += sum(self.numel[g] for g in groups)
        first, buffers = groups[0], self.fetching.buffers
        room = [(buffers[g].gathered if message.copies else None) or buffers[g].full_params for g in groups]
        n_bytes = sum(buffer.n_bytes for buffer in room)
        span = self.fetching.shards[first]
        return [
            *map(Alloc, room),
            Collective("all_gather", "params", first, n_bytes, "gather", ("gather", first), span),
        ]

    def _wait(self, g: int) -> list[Event]:
        message = self.under_way.pop(g)
        self.present.add(g)
        events: list[Event] = []
        if message not in self.arrived:
            events.append(Wait("compute", ("gather", message.groups[0])))
            if message.copies:
                made = [self.fetching.buffers[other].full_params for other in message.groups]
                events += map(Alloc, made)
                events.append(Restage("params", g, 2 * sum(b.n_bytes for b in made), "compute"))
            self.arrived.add(message)
        if message not in self.under_way.values():
            self.arrived.discard(message)
            if message.copies:
                gathered = [self.fetching.buffers[other].gathered for other in message.groups]
                events += [Free(b) for b in gathered if b is not None]
        return events

    def _stays(self, g: int, position: int) -> bool:
        if self.looked_at.get(g, -1) > position:
            return True
        later = next((turn for turn in self.uses[g] if turn > position), None)
        return later is not None and self.passed[later] - self.passed[position + 1] < self.fetching.live_numel
