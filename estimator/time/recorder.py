"""Players that also write down what they play: every stretch of every stream, and when each event of the program came.

They play as their base classes do, one event at a time, and so end at the same clocks; who does not ask for a record pays nothing.
Of a section that repeats, the first turns and the last are written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from estimator.job.job import Job
from estimator.ops.cost import UnitCost
from estimator.schedule.events import Event, Section, StepProgram
from estimator.time.durations import Durations
from estimator.time.pipeline import LEAVE, PLAIN, PipelineRank, last_of, play_ranks
from estimator.time.player import HOST_WORK, INDEX, PASS, STREAMS, WAIT, WORK, Player, StepTime, play_step, step_time
from estimator.time.profile import HardwareProfile
from estimator.time.stack import Stack

KEPT_TURNS = 4
"""First turns of a section that repeats, of which there is a record by default."""
_HOST = INDEX["host"]


class Place(NamedTuple):
    """Where in a step an event stands: number of its section, turn of the section, number in the section."""

    section: int
    turn: int
    number: int


class Spell(NamedTuple):
    """A stretch of time of one stream."""

    stream: str
    part: str
    """As what it counts, or what is waited for."""
    start_s: float
    end_s: float
    place: Place | None
    """Of the event that is played; ``None``: the end of the step."""
    is_wait: bool = False


class Record(NamedTuple):
    """One rank's step as it was played, without what surrounds the program (``Stack.slowed``)."""

    spells: tuple[Spell, ...]
    moments: dict[Place, tuple[float, float]]
    """When the compute stream, or the host where that is further, came to an event and when it had passed it."""
    parts: dict[str, float]
    busy_s: dict[str, float]
    kept_turns: int
    end_s: float
    """When everything is done."""


class StepRecord(NamedTuple):
    """The forecast of a step, and the records of all pipeline ranks."""

    time: StepTime
    ranks: tuple[Record, ...]
    last: int
    """The rank whose parts the forecast tells."""
    durations: Durations


def record_step(
    stages: Sequence[tuple[StepProgram, list[UnitCost]]], job: Job, profile: HardwareProfile, stack: Stack | None = None,
    kept_turns: int = KEPT_TURNS,
) -> StepRecord:  # fmt: skip
    """What ``time_of`` or, for several stages, ``time_of_pipeline`` says of their programs and unit costs, with a record."""
    durations = Durations(stages[0][1], job, profile, stack)
    if len(stages) > 1:
        ranks = play_ranks(stages, durations, partial(RecordingRank, kept_turns=kept_turns))
        ends = [rank.finish() for rank in ranks]
        records = tuple(rank.record(*end) for rank, end in zip(ranks, ends, strict=True))
    else:
        player = RecordingPlayer(durations, serial=durations.is_cpu, kept_turns=kept_turns)
        ends = [play_step(player, stages[0][0], job.strategy.staleness)]
        records = (player.record(*ends[0]),)
    last = last_of(ends)
    return StepRecord(step_time(*ends[last], durations), records, last, durations)


class _Recorder(Player):
    """What both kinds of players write down."""

    joins_passes = False

    def __init__(self, *args: Any, kept_turns: int, **kwargs: Any) -> None:
        self.kept_turns = self.least_turns = kept_turns
        self.spells: list[Spell] = []
        self.moments: dict[Place, tuple[float, float]] = {}
        self.origin_s = 0.0
        super().__init__(*args, **kwargs)

    def record(self, parts: dict[str, float], busy: dict[str, float]) -> Record:
        origin_s = self.origin_s
        spells = (s._replace(start_s=s.start_s - origin_s, end_s=s.end_s - origin_s) for s in self.spells)
        moments = {place: (a - origin_s, b - origin_s) for place, (a, b) in self.moments.items()}
        end_s = (self.clocks[0] if self.serial else max(self.clocks)) - origin_s
        return Record(tuple(spells), moments, dict(parts), dict(busy), self.kept_turns, end_s)

    def save(self) -> tuple[Any, ...]:
        return len(self.spells), super().save()

    def restore(self, saved: tuple[Any, ...]) -> None:
        del self.spells[saved[0] :]
        super().restore(saved[1])

    def finish(self) -> tuple[dict[str, float], dict[str, float]]:
        before, parts = self.clocks[0], dict(self.parts)
        ended = super().finish()
        if not self.serial:
            self._add_wait("compute", parts, before, max(self.clocks), None)
        return ended

    def now(self) -> float:
        return max(self.clocks[0], self.clocks[_HOST])

    def is_kept(self, turn: int, n_turns: int) -> bool:
        return turn < self.kept_turns or turn == n_turns - 1

    def play_event(self, code: list[tuple[Any, ...]], place: Place) -> None:
        """The code of one event, with its record."""
        before = self.now()
        for step in code:
            self._play_step(step, place)
        self.moments[place] = (before, self.now())

    def _play_step(self, step: tuple[Any, ...], place: Place) -> None:
        clocks, kind = self.clocks, step[0]
        now, host, parts = clocks[0], clocks[_HOST], dict(self.parts)
        stream = step[1] if kind in (WORK, WAIT) else 0
        stood = clocks[stream]
        Player.run(self, [step])
        if kind == PASS:
            start = clocks[0] - (self.parts[step[1]] - parts[step[1]])
            self._add_wait("compute", parts, now, start, place)
            self._add("compute", step[1], start, clocks[0], place)
        elif kind == WORK and stream == 0:
            self._add_wait("compute", parts, now, clocks[0] - step[2], place)
            self._add("compute", step[4], clocks[0] - step[2], clocks[0], place)
        elif kind == WORK and self.serial:
            moved = clocks[stream] > stood
            self._add(STREAMS[stream], step[4], max(now, stood), clocks[stream] if moved else clocks[0], place)
        elif kind == WORK:
            self._add(STREAMS[stream], step[4], clocks[stream] - step[2], clocks[stream], place)
        elif kind == HOST_WORK:
            start, end = (now, clocks[0]) if self.serial else (host, clocks[_HOST])
            self._add("host", step[2], start, end, place)
        elif clocks[0] > now:
            self._add_wait("compute", parts, now, clocks[0], place)

    def _add(self, stream: str, part: str, start_s: float, end_s: float, place: Place) -> None:
        if end_s > start_s:
            self.spells.append(Spell(stream, part, start_s, end_s, place))

    def _add_wait(
        self, stream: str, before: dict[str, float], start_s: float, end_s: float, place: Place | None
    ) -> None:
        """``before``: the parts as they were; what has grown most was waited for."""
        if end_s - start_s > 1e-12:
            part = max(self.parts, key=lambda name: self.parts[name] - before[name])
            self.spells.append(Spell(stream, part, start_s, end_s, place, True))


class RecordingPlayer(_Recorder):
    """``Player`` with a record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.section, self.turn, self.n_turns = -1, 0, 1
        self.first: Section | None = None
        super().__init__(*args, **kwargs)

    def play(self, section: Section) -> None:
        if self.first is None:
            self.first = section
        if section is self.first:  # another step, until one is like all that follow
            self.section, self.origin_s = -1, self.now()
            self.spells.clear()
            self.moments.clear()
        self.section, self.turn, self.n_turns = self.section + 1, 0, section.repeat
        super().play(section)

    def compile(self, events: Sequence[Event]) -> list[tuple[Any, ...]]:
        return [tuple(super(RecordingPlayer, self).compile((event,))) for event in events]

    def run(self, code: list[tuple[Any, ...]]) -> None:
        kept = self.is_kept(self.turn, self.n_turns)
        for index, steps in enumerate(code):
            if kept:
                self.play_event(list(steps), Place(self.section, self.turn, index))
            elif steps:
                super().run(list(steps))
        self.turn += 1

    def save(self) -> tuple[Any, ...]:
        return self.turn, super().save()

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.turn = saved[0]
        super().restore(saved[1])

    def shift(self, moves: Any, times: int) -> None:
        self.turn += times
        super().shift(moves, times)


class RecordingRank(_Recorder, PipelineRank):
    """``PipelineRank`` with a record. Its items are one for each event: what the event means there, or ``None``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.event_of: tuple[int, int, int] = (-1, 0, 0)
        """Section and turn that are played, and the number of the next event there."""
        super().__init__(*args, **kwargs)

    def _items_of(self, events: Sequence[Event]) -> list[tuple[Any, ...]]:
        items: list[tuple[Any, ...]] = []
        for event in events:
            own = super()._items_of((event,))
            assert len(own) <= 1, "an event is one item"
            items.append(tuple(own))
        return items

    def _obey(self, items: Sequence[tuple[Any, ...]], start_at: int) -> int:
        index = start_at
        while index < len(items) and self._obey_event(items[index]):
            index += 1
        return index

    def _obey_event(self, item: tuple[Any, ...]) -> bool:
        if self.event_of[:2] != self.at:
            self.event_of = (*self.at, 0)
        place = Place(*self.event_of)
        if item and not self._obeyed(item[0], place):
            return False
        if not item and self.is_kept(place.turn, self.sections[place.section][1]):
            self.moments[place] = (self.now(), self.now())
        self.event_of = (place.section, place.turn, place.number + 1)
        return True

    def _obeyed(self, item: tuple[Any, ...], place: Place) -> bool:
        if not self.is_kept(place.turn, self.sections[place.section][1]):
            return super()._obey([item], 0) == 1
        if item[0] == PLAIN:
            self.play_event(item[1], place)
            return True
        before, now, parts = self.now(), self.clocks[0], dict(self.parts)
        if super()._obey([item], 0) == 0:
            return False
        if item[0] == LEAVE:
            _, link, party, seconds, part, stream, _ = item
            start = link.starts[link.passed[party] - 1]
            self._add(STREAMS[stream], part, start, start + seconds, place)
        self._add_wait("compute", parts, now, self.clocks[0], place)
        self.moments[place] = (before, self.now())
        return True
