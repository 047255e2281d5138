"""Plays the programs of all ranks of a pipeline together, each on streams of its own.

A message leaves when its sender has made it and its receiver has room for it, and takes the network's time; who waits for it
waits in a bubble until then. Collectives over several stages begin when the last of them has come.

Ranks are played in turns, each as far as what it waits for is known. Sections repeat equally often on all ranks (see
``estimator.schedule.pipeline.periods``); between two repeats they are brought to the same place, and once all clocks of all
ranks advance alike, the rest is skipped as ``estimator.time.player`` does for one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from estimator.job.job import Job
from estimator.ops.cost import UnitCost
from estimator.schedule.events import Collective, Event, Recv, Section, Send, Sent, StepProgram, Tag, Wait
from estimator.time.durations import Durations
from estimator.time.interval import interval
from estimator.time.player import COLLECTIVE_PART, INDEX, Player, StepTime, bound_of, difference, same
from estimator.time.profile import HardwareProfile

_PLAIN, _COME, _LEAVE = range(3)
_HOST = INDEX["host"]


def time_of_pipeline(
    stages: Sequence[tuple[StepProgram, list[UnitCost]]], job: Job, profile: HardwareProfile
) -> StepTime:
    """Seconds of one step of a pipeline, whose ranks have the programs and unit costs ``stages``; parts are of the rank that ends
    last. Raises ``InputError`` for what the profile cannot time."""
    durations = Durations(stages[0][1], job, profile)
    links: dict[Any, _Link] = {}
    ranks = []
    for rank, (program, costs) in enumerate(stages):
        own = copy(durations)  # equal operators are timed once for all
        own.costs = costs
        ranks.append(_Rank(own, rank, program, links))
    _play(ranks, links)
    ends = [rank.finish() for rank in ranks]
    parts, busy = max(ends, key=lambda end: (sum(end[0].values()), -end[0]["pipeline_bubble"]))
    step_s = sum(parts.values())
    return StepTime(step_s, *interval(step_s, parts, job, profile), parts, busy, bound_of(parts))


class _Link:
    """Messages of one kind from one rank to another, or collectives of the same ranks, in order."""

    __slots__ = ("passed", "times", "waiting")

    def __init__(self, n_parties: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(n_parties)]
        """When each party was ready for each; by party (of a message: sender, receiver)."""
        self.passed = [0] * n_parties
        """How many of its own each party has waited for."""
        self.waiting: list[_Rank] = []
        """Who cannot go on before another party has come."""

    def start(self, party: int) -> float | None:
        """When that begins, or began, which ``party`` waits for next; ``None``: not known yet."""
        index = self.passed[party]
        start = 0.0
        for times in self.times:
            if len(times) <= index:
                return None
            if times[index] > start:
                start = times[index]
        self.passed[party] = index + 1
        return start

    def state(self) -> list[float]:
        """Of what somebody still waits for."""
        done = min(self.passed)
        return [at for times in self.times for at in times[done:]]

    def shift(self, moves: Iterator[float], times: int) -> None:
        """Move on by ``times`` repeats, each of which advances ``state`` by the next of ``moves``."""
        done = min(self.passed)
        self.times = [[*own[:done], *(at + times * next(moves) for at in own[done:])] for own in self.times]

    def save(self) -> tuple[Any, ...]:
        return [list(times) for times in self.times], list(self.passed)

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.times, self.passed = saved


class _Place(NamedTuple):
    """How far a rank has come: section, repeat."""

    section: int
    repeat: int


class _Rank(Player):
    """One rank's clocks. ``items`` of a section: plain code, or what concerns other ranks."""

    def __init__(self, durations: Durations, rank: int, program: StepProgram, links: dict[Any, _Link]) -> None:
        super().__init__(durations, serial=durations.is_cpu)
        self.rank, self.links = rank, links
        self.pp = durations.job.strategy.pp
        self.stage_size = durations.job.cluster.n_gpus // self.pp
        self._known: dict[int, list[tuple[Any, ...]]] = {}
        self._links: dict[Tag, tuple[_Link, int, float, str, str]] = {}
        """By tag: the messages or collectives that carry it, this rank's place among their parties, seconds, part, stream."""
        self.sections = [(self._items(section), section.repeat) for section in program.step]
        self.at, self.index = _Place(0, 0), 0
        self.woken: list[_Rank] = []
        """Ranks that can go on since this one has."""

    # ---- compiling ------------------------------------------------------------------------------------------------

    def _items(self, section: Section) -> list[tuple[Any, ...]]:
        items: list[tuple[Any, ...]] = []
        for events in section.passes or (section.events,):
            if id(events) not in self._known:
                self._known[id(events)] = self._items_of(events)
            items += self._known[id(events)]
        return items

    def _items_of(self, events: Sequence[Event]) -> list[tuple[Any, ...]]:
        items: list[tuple[Any, ...]] = []
        plain: list[Event] = []

        def put(item: tuple[Any, ...]) -> None:
            nonlocal plain
            code = self.compile(plain)
            items.extend([(_PLAIN, code)] if code else [])
            items.append(item)
            plain = []

        for event in events:
            if isinstance(event, Send | Recv):
                link, seconds = self._link_of(event), self.durations.message(event.n_bytes, self._crosses(event.offset))
                party = int(isinstance(event, Recv))
                self._links[event.tag] = link, party, seconds, "exposed_other_comm", ("send", "recv")[party]
                put((_COME, link, party))
            elif isinstance(event, Wait) and event.tag in self._links:
                put((_LEAVE, *self._links[event.tag], event.stream))
            elif isinstance(event, Collective) and len(stages := self._stages_of(event)) > 1:
                key = (event.tag[0], event.span)  # each stage numbers its groups itself
                link = self.links.setdefault(key, _Link(len(stages)))
                seconds = self.durations.collective(event.op, event.n_bytes, event.span)
                self._links[event.tag] = (
                    link,
                    stages.index(self.rank),
                    seconds,
                    COLLECTIVE_PART[event.purpose],
                    event.stream,
                )
                put((_COME, link, stages.index(self.rank)))
            elif not isinstance(event, Sent):
                plain.append(event)
        code = self.compile(plain)
        return [*items, (_PLAIN, code)] if code else items

    def _link_of(self, event: Send | Recv) -> _Link:
        other = self.rank + event.offset // self.stage_size
        ends = (self.rank, other) if isinstance(event, Send) else (other, self.rank)
        return self.links.setdefault((event.what, *ends), _Link(2))

    def _crosses(self, offset: int) -> bool:
        """Whether some rank of this stage has its peer on another node."""
        first, per_node = self.rank * self.stage_size, self.durations.job.cluster.gpus_per_node
        return any(rank // per_node != (rank + offset) // per_node for rank in (first, first + self.stage_size - 1))

    def _stages_of(self, event: Collective) -> list[int]:
        """Pipeline ranks that take part."""
        if event.span is None:
            return list(range(self.pp))
        return sorted({rank // self.stage_size for rank in event.span.ranks(self.rank * self.stage_size)})

    # ---- playing --------------------------------------------------------------------------------------------------

    def advance(self, target: _Place) -> None:
        """Play until ``target`` or until something is not known yet."""
        obey = self._obey
        while self.at < target:
            items, repeat = self.sections[self.at.section]
            for index in range(self.index, len(items)):
                if not obey(items[index]):
                    self.index = index
                    return
            self.index = 0
            section, done = self.at.section, self.at.repeat + 1
            self.at = _Place(section, done) if done < repeat else _Place(section + 1, 0)

    def _obey(self, item: tuple[Any, ...]) -> bool:
        if item[0] == _PLAIN:
            self.run(item[1])
            return True
        now, host = self.clocks[0], self.clocks[_HOST]
        if item[0] == _COME:
            _, link, party = item
            self.clocks[_HOST] = host = host + self.durations.issue_s
            link.times[party].append(now if self.serial or now > host else host)
            if link.waiting:
                self.woken += link.waiting
                link.waiting.clear()
            return True
        _, link, party, seconds, part, stream, waiting = item
        start = link.start(party)
        if start is None:
            link.waiting.append(self)
            return False
        self.busy[INDEX[stream]] += seconds
        end = start + seconds
        if waiting == "host" and not self.serial:
            if end > host:
                self.host_log.append((host, end, part))
                self.clocks[_HOST] = end
        elif end > now:
            self._idle(now, end, (end, start, part, "pipeline_bubble"), part)
            self.clocks[0] = end
        return True


def _play(ranks: list[_Rank], links: dict[Any, _Link]) -> None:
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


def _reach(ranks: list[_Rank], target: _Place) -> bool:
    """Play all ranks until ``target``; False when each waits for another before that."""
    ready = list(ranks)
    while ready:
        rank = ready.pop()
        rank.advance(target)
        ready += rank.woken
        rank.woken.clear()
    return all(rank.at >= target for rank in ranks)


def _play_repeats(ranks: list[_Rank], links: dict[Any, _Link], section: int, repeat: int) -> bool:
    """All repeats of ``section``; see ``Player.play``."""
    previous: list[float] | None = None
    for done in range(1, repeat + 1):
        before = _state(ranks, links)
        if not _reach(ranks, _after(section, done, repeat)):
            return False
        advance = difference(_state(ranks, links), before)
        left = repeat - done
        alike = (
            previous is not None and left > 2 and not any(rank.host_log for rank in ranks) and same(advance, previous)
        )
        if alike and _skip(ranks, links, advance, _Place(section, repeat - 1)):
            return _reach(ranks, _Place(section + 1, 0))
        previous = advance
    return True


def _after(section: int, done: int, repeat: int) -> _Place:
    return _Place(section, done) if done < repeat else _Place(section + 1, 0)


def _state(ranks: list[_Rank], links: dict[Any, _Link]) -> list[float]:
    return [x for rank in ranks for x in rank.state()] + [x for link in links.values() for x in link.state()]


def _skip(ranks: list[_Rank], links: dict[Any, _Link], advance: list[float], target: _Place) -> bool:
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
