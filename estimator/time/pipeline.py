"""Plays the programs of all ranks of a pipeline together, each on streams of its own.

A message leaves when its sender has made it and its receiver has room for it, and takes the network's time; who waits for it
waits in a bubble until then. Collectives over several stages begin when the last of them has come.

Ranks are played in turns, each as far as what it waits for is known. Sections repeat equally often on all ranks (see
``estimator.schedule.pipeline.periods``); between two repeats they are brought to the same place, and once all clocks of all
ranks advance alike, the rest is skipped as ``estimator.time.player`` does for one rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple, TypeVar

from estimator.job.job import Job
from estimator.ops.cost import UnitCost
from estimator.schedule.events import Alloc, Collective, Event, Free, Recv, Section, Send, Sent, StepProgram, Tag, Wait
from estimator.time.code import PASSES
from estimator.time.durations import Durations
from estimator.time.player import COLLECTIVE_PART, INDEX, Player, StepTime, difference, same, step_time
from estimator.time.profile import HardwareProfile
from estimator.time.stack import Stack

PLAIN, ALONE, COME, LEAVE = range(4)
"""What a rank's items are: plain code; code that is nothing but joined passes; being ready for a message or collective; waiting for one."""
_HOST = INDEX["host"]
R = TypeVar("R", bound="PipelineRank")


def time_of_pipeline(
    stages: Sequence[tuple[StepProgram, list[UnitCost]]], job: Job, profile: HardwareProfile, stack: Stack | None = None
) -> StepTime:
    """Seconds of one step of a pipeline, whose ranks have the programs and unit costs ``stages``; parts are of the rank that ends
    last. Raises ``InputError`` for what the profile cannot time."""
    durations = Durations(stages[0][1], job, profile, stack)
    ends = [rank.finish() for rank in play_ranks(stages, durations, PipelineRank)]
    return step_time(*ends[last_of(ends)], durations)


def play_ranks(
    stages: Sequence[tuple[StepProgram, list[UnitCost]]], durations: Durations, kind: Callable[..., R]
) -> list[R]:
    """A rank of each stage, of that kind, which has played its program to the end."""
    links: dict[Any, _Link] = {}
    drafts: dict[tuple[int, ...], Drafts] = {}
    ranks = []
    for number, (program, costs) in enumerate(stages):
        own = copy(durations)  # equal operators are timed once for all
        own.costs = costs
        ranks.append(kind(own, number, program, links, drafts.setdefault(tuple(map(id, costs)), {})))
    _play(ranks, links)
    return ranks


def last_of(ends: Sequence[tuple[dict[str, float], dict[str, float]]]) -> int:
    """Whose parts and busy seconds are told: the rank's that ends last, of several that which waits least."""
    return max(range(len(ends)), key=lambda i: (sum(ends[i][0].values()), -ends[i][0]["pipeline_bubble"]))


Drafts = dict[int, tuple[Sequence[Event], list[Any]]]
"""Events of a pass and what ``PipelineRank.draft`` makes of them, by identity of the events; of ranks whose units cost the same."""


class _Link:
    """Messages of one kind from one rank to another, or collectives of the same ranks, in order."""

    __slots__ = ("passed", "ready", "starts", "waiting")

    def __init__(self, n_parties: int) -> None:
        self.ready: list[list[float]] = [[] for _ in range(n_parties)]
        """When each party was ready for each; by party (of a message: sender, receiver)."""
        self.starts: list[float] = []
        """When each began for which all parties are ready."""
        self.passed = [0] * n_parties
        """How many of its own each party has waited for."""
        self.waiting: list[PipelineRank] = []
        """Who cannot go on before another party has come."""

    def begin(self) -> None:
        """Note the starts of those for which all parties are ready by now."""
        known = len(self.starts)
        self.starts += map(max, *(times[known : min(map(len, self.ready))] for times in self.ready))

    def state(self) -> list[float]:
        """Of what somebody still waits for."""
        done = min(self.passed)
        return [at for times in self.ready for at in times[done:]]

    def shift(self, moves: Iterator[float], times: int) -> None:
        """Move on by ``times`` repeats, each of which advances ``state`` by the next of ``moves``."""
        done = min(self.passed)
        for own in self.ready:
            own[done:] = [at + times * next(moves) for at in own[done:]]
        del self.starts[done:]
        self.begin()

    def save(self) -> tuple[Any, ...]:
        return [list(times) for times in self.ready], list(self.starts), list(self.passed)

    def restore(self, saved: tuple[Any, ...]) -> None:
        ready, self.starts, self.passed = saved
        for own, kept in zip(self.ready, ready, strict=True):  # which items refer to
            own[:] = kept


class _Place(NamedTuple):
    """How far a rank has come: section, repeat."""

    section: int
    repeat: int


class PipelineRank(Player):
    """One rank's clocks. ``items`` of a section: plain code, or what concerns other ranks."""

    def __init__(
        self, durations: Durations, rank: int, program: StepProgram, links: dict[Any, _Link], drafts: Drafts
    ) -> None:
        super().__init__(durations, serial=durations.is_cpu)
        self.rank, self.links, self._drafts = rank, links, drafts
        self.pp = durations.job.strategy.pp
        self.stage_size = durations.job.cluster.n_gpus // self.pp
        self._known: dict[int, list[tuple[Any, ...]]] = {}
        self._links: dict[Tag, tuple[_Link, int, float, str, int]] = {}
        """By tag: the messages or collectives that carry it, this rank's place among their parties, seconds, part, stream."""
        self.sections = [(self._items(section), section.repeat) for section in program.step]
        self.at, self.index = _Place(0, 0), 0
        self.woken: list[PipelineRank] = []
        """Ranks that can go on since this one has."""

    # ---- compiling ------------------------------------------------------------------------------------------------

    def _items(self, section: Section) -> list[tuple[Any, ...]]:
        items: list[tuple[Any, ...]] = []
        for events in section.passes or (section.events,):
            own = self._known.get(id(events))
            if own is None:
                own = self._known[id(events)] = self._items_of(events)
            items += own
        return items

    def _items_of(self, events: Sequence[Event]) -> list[tuple[Any, ...]]:
        if id(events) not in self._drafts:
            self._drafts[id(events)] = events, self._draft(events)
        return [self._item(part) for part in self._drafts[id(events)][1]]

    def _draft(self, events: Sequence[Event]) -> list[Any]:
        """``events`` of a pass as plain code and, between it, events that concern other ranks."""
        draft: list[Any] = []
        plain: list[Event] = []
        tags = set(self._links)
        for event in events:
            kind = type(event)
            if kind is Alloc or kind is Free or kind is Sent:
                continue
            carries = kind is Send or kind is Recv or (kind is Collective and self._crosses_stages(event))  # type: ignore[arg-type]
            if carries:
                tags.add(event.tag)  # type: ignore[union-attr]
            if not carries and not (kind is Wait and event.tag in tags):  # type: ignore[union-attr]
                plain.append(event)
                continue
            draft += self._plain(plain)
            draft.append(event)
            plain = []
        return draft + self._plain(plain)

    def _plain(self, events: list[Event]) -> list[tuple[Any, ...]]:
        code = self.compile(events) if events else []
        if len(code) == 1 and code[0][0] == PASSES and not self.serial:
            return [(ALONE, *code[0][1:5], code)]
        return [(PLAIN, code)] if code else []

    def _item(self, part: Any) -> tuple[Any, ...]:
        """A part of a draft, for this rank."""
        kind = type(part)
        if kind is tuple:
            return part  # type: ignore[no-any-return]  # plain code
        if kind is Wait:
            return (LEAVE, *self._links[part.tag], part.stream)
        if kind is Collective:
            stages = self._stages_of(part)
            key = (part.tag[0], part.span)  # each stage numbers its groups itself
            link = self.links.setdefault(key, _Link(len(stages)))
            seconds, party = self.durations.collective(part.op, part.n_bytes, part.span), stages.index(self.rank)
            self._links[part.tag] = link, party, seconds, COLLECTIVE_PART[part.purpose], INDEX[part.stream]
        elif part.tag not in self._links:  # all that carry it go the same way
            link, seconds = self._link_of(part), self.durations.message(part.n_bytes, self._crosses(part.offset))
            party = int(kind is Recv)
            self._links[part.tag] = link, party, seconds, "exposed_other_comm", INDEX[("send", "recv")[party]]
        link, party = self._links[part.tag][:2]
        return (COME, link, link.ready[party], link.ready[1 - party] if len(link.ready) == 2 else None)

    def _link_of(self, event: Send | Recv) -> _Link:
        other = self.rank + event.offset // self.stage_size
        ends = (self.rank, other) if isinstance(event, Send) else (other, self.rank)
        return self.links.setdefault((event.what, *ends), _Link(2))

    def _crosses(self, offset: int) -> bool:
        """Whether some rank of this stage has its peer on another node."""
        first, per_node = self.rank * self.stage_size, self.durations.job.cluster.gpus_per_domain
        return any(rank // per_node != (rank + offset) // per_node for rank in (first, first + self.stage_size - 1))

    def _crosses_stages(self, event: Collective) -> bool:
        span = event.span
        if span is not None and self.stage_size % (span.size * span.stride) == 0:
            return False  # groups of ranks one after another, all in one stage
        return len(self._stages_of(event)) > 1

    def _stages_of(self, event: Collective) -> list[int]:
        """Pipeline ranks that take part."""
        if event.span is None:
            return list(range(self.pp))
        return sorted({rank // self.stage_size for rank in event.span.ranks(self.rank * self.stage_size)})

    # ---- playing --------------------------------------------------------------------------------------------------

    def advance(self, target: _Place) -> None:
        """Play until ``target`` or until something is not known yet."""
        while self.at < target:
            items, repeat = self.sections[self.at.section]
            self.index = self._obey(items, self.index)
            if self.index < len(items):
                return
            self.index = 0
            section, done = self.at.section, self.at.repeat + 1
            self.at = _Place(section, done) if done < repeat else _Place(section + 1, 0)

    def _obey(self, items: Sequence[tuple[Any, ...]], start_at: int) -> int:
        """Play ``items`` from ``start_at`` on until something is not known yet, which is at the index that is returned."""
        clocks, parts, busy, host_log = self.clocks, self.parts, self.busy, self.host_log
        serial, issue_s = self.serial, self.durations.issue_s
        now, host = clocks[0], clocks[_HOST]
        for index in range(start_at, len(items)):
            item = items[index]
            if item[0] == COME:
                _, link, own, other = item
                host += issue_s
                at = now if serial or now > host else host
                own.append(at)
                if other is None:
                    link.begin()
                elif len(other) >= (number := len(own)):
                    before = other[number - 1]
                    link.starts.append(at if at > before else before)
                if link.waiting:
                    self.woken += link.waiting
                    link.waiting.clear()
            elif item[0] == LEAVE:
                _, link, party, seconds, part, stream, waiting = item
                number = link.passed[party]
                if number == len(link.starts):
                    link.waiting.append(self)
                    clocks[0], clocks[_HOST] = now, host
                    return index
                link.passed[party] = number + 1
                start = link.starts[number]
                busy[stream] += seconds
                end = start + seconds
                if waiting == "host" and not serial:
                    if end > host:
                        host_log.append((host, end, part))
                        host = end
                elif end > now:
                    self._idle(now, end, (end, start, part, "pipeline_bubble"), part)
                    now = end
            elif item[0] == ALONE and host - now <= item[1]:
                _, _, device_s, host_s, shares, _ = item
                for part, seconds in shares:
                    parts[part] += seconds
                busy[0] += device_s
                now += device_s
                host += host_s
                if host_log and host_log[-1][1] <= now:
                    host_log.clear()
            else:
                clocks[0], clocks[_HOST] = now, host
                self.run(item[-1])
                now, host = clocks[0], clocks[_HOST]
        clocks[0], clocks[_HOST] = now, host
        return len(items)


def _play(ranks: Sequence[PipelineRank], links: dict[Any, _Link]) -> None:
    """All sections of all ranks."""
    n_sections = len(ranks[0].sections)
    for section in range(n_sections):
        repeat = ranks[0].sections[section][1]
        if repeat > 1 and not _play_repeats(ranks, links, section, repeat):
            break
        if repeat == 1 and not _reach(ranks, _Place(section + 1, 0)):
            break
    done = _reach(ranks, _Place(n_sections, 0))  # where ranks depend on what others do later: without keeping step
    assert done, "every rank of the pipeline waits for another"


def _reach(ranks: Sequence[PipelineRank], target: _Place) -> bool:
    """Play all ranks until ``target``; False when each waits for another before that."""
    ready = deque(ranks)
    while ready:
        rank = ready.popleft()
        rank.advance(target)
        ready += rank.woken
        rank.woken.clear()
    return all(rank.at >= target for rank in ranks)


def _play_repeats(ranks: Sequence[PipelineRank], links: dict[Any, _Link], section: int, repeat: int) -> bool:
    """All repeats of ``section``; see ``Player.play``."""
    previous: list[float] | None = None
    for done in range(1, repeat + 1):
        before = _state(ranks, links)
        if not _reach(ranks, _after(section, done, repeat)):
            return False
        advance = difference(_state(ranks, links), before)
        left = repeat - done
        alike = (
            previous is not None
            and left > 2
            and done >= ranks[0].least_turns
            and not any(rank.host_log for rank in ranks)
            and same(advance, previous)
        )
        if alike and _skip(ranks, links, advance, _Place(section, repeat - 1)):
            return _reach(ranks, _Place(section + 1, 0))
        previous = advance
    return True


def _after(section: int, done: int, repeat: int) -> _Place:
    return _Place(section, done) if done < repeat else _Place(section + 1, 0)


def _state(ranks: Sequence[PipelineRank], links: dict[Any, _Link]) -> list[float]:
    return [x for rank in ranks for x in rank.state()] + [x for link in links.values() for x in link.state()]


def _skip(ranks: Sequence[PipelineRank], links: dict[Any, _Link], advance: list[float], target: _Place) -> bool:
    """Move everything on to ``target``, where every repeat until then advances all clocks by ``advance``, and see whether they still
    do: the map is convex along that line. Else everything is as it was."""
    times = target.repeat - ranks[0].at.repeat
    saved = [(rank.save(), rank.at) for rank in ranks], [link.save() for link in links.values()]
    moves = iter(advance)
    for rank in ranks:
        rank.shift(moves, times)
        rank.at = target
    for link in links.values():
        link.shift(moves, times)
    before = _state(ranks, links)
    reached = _reach(ranks, _Place(target.section + 1, 0))
    if reached and same(difference(_state(ranks, links), before), advance):
        return True
    for rank, (state, at) in zip(ranks, saved[0], strict=True):
        rank.restore(state)
        rank.at, rank.index = at, 0
    for link, kept in zip(links.values(), saved[1], strict=True):
        link.restore(kept)
    return False
