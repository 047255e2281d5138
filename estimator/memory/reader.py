"""Reads a ``StepProgram`` and adds up live bytes: categories x phases, the peak and where it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from estimator.ops.cost import UnitCost
from estimator.schedule.events import (
    BOUNDARY_CATEGORY,
    PHASE_OF_PASS,
    Alloc,
    Buffer,
    Compute,
    Event,
    Free,
    Recv,
    Section,
    Sent,
    StepProgram,
)
from estimator.sharding.units import Unit


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one rank over one step in steady state (states exist already)."""

    peak_bytes: int
    """Largest number of live device bytes."""
    peak_phase: str
    peak_where: str
    category_bytes_at_peak: dict[str, int]
    category_peak_bytes: dict[str, int]
    phase_peak_bytes: dict[str, int]
    phase_category_bytes: dict[str, dict[str, int]]
    """Live bytes by category at each phase's own peak; ``init`` is what lives from step to step."""
    host_peak_bytes: int
    host_category_peak_bytes: dict[str, int]


class _Meter:
    """Live bytes of one place, with their maxima."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.total = 0
        self.peak_total = 0
        self.peak: dict[str, int] = {}
        self.category_peak: dict[str, int] = {}

    def add(self, category: str, n_bytes: int) -> None:
        value = self.live[category] = self.live.get(category, 0) + n_bytes
        self.total += n_bytes
        if n_bytes > 0 and value > self.category_peak.get(category, 0):
            self.category_peak[category] = value


def read_memory(
    program: StepProgram, units: Sequence[Unit], costs: Sequence[UnitCost], buffers: Iterable[Buffer] = ()
) -> StepMemory:  # fmt: skip
    """Live bytes of ``program`` where the compute of ``units[i]`` costs ``costs[i]``.

    ``buffers`` are further device bytes that live all the time (a model's tables). A section that repeats and leaves
    behind what it found needs one reading; another one needs two, as turns are alike from the second on, or all where passes
    of a pipeline pile up activations or take them down.
    """
    return _Reader(units, costs).read(program, buffers)


class PeakReader:
    """``read_memory``'s ``peak_bytes`` alone, for the ranks of a pipeline, whose equal passes are one object: of each it is read once how
    far live bytes rise in it and what it leaves behind. Programs and costs must be kept as long as the reader."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}
        """Rise and remainder of a pass by identity of the units' costs and of its events."""

    def read(self, program: StepProgram, costs: Sequence[UnitCost], buffers: Iterable[Buffer] = ()) -> int:
        known = self._known.setdefault(tuple(map(id, costs)), {})
        live = peak = sum(buffer.n_bytes for buffer in buffers)
        for section in (Section("init", program.init), *program.step):
            rise = left = 0  # of one turn
            for events in section.passes or (section.events,):
                swing = known.get(id(events))
                if swing is None:
                    swing = known[id(events)] = _swing(events, costs)
                rise = max(rise, left + swing[0])
                left += swing[1]
            turns = section.repeat if section.passes else min(2, section.repeat)
            peak = max(peak, live + rise + max(0, (turns - 1) * left))
            live += turns * left
        return peak


def _swing(events: Sequence[Event], costs: Sequence[UnitCost]) -> tuple[int, int]:
    """How far live device bytes rise during ``events``, and by how much more they are at the end."""
    totals: dict[int, tuple[int, int]] = {}
    rise = live = 0
    for event in events:
        kind = type(event)
        if kind is Alloc or kind is Free:
            buffer = event.buffer  # type: ignore[union-attr]
            if buffer.place == "device":
                live += buffer.n_bytes if kind is Alloc else -buffer.n_bytes
        elif kind is Recv or kind is Sent:
            live += event.n_bytes if kind is Recv else -event.n_bytes  # type: ignore[union-attr]
        elif kind is Compute:
            memory = costs[event.unit].memory_of(event.phase)  # type: ignore[union-attr]
            if id(memory) not in totals:
                totals[id(memory)] = sum(memory.peak.values()), sum(memory.after.values())
            inside, after = totals[id(memory)]
            rise = max(rise, live + inside)
            live += after
            continue
        else:
            continue
        rise = max(rise, live)
    return rise, live


Where = str | tuple[str, int]
"""In words; or a pass of a unit, which is put into words when all is read."""


class Follower:
    """Live bytes event by event, counted as ``read_memory`` does."""

    def __init__(self, units: Sequence[Unit], costs: Sequence[UnitCost], buffers: Iterable[Buffer] = ()) -> None:
        self._reader = _Reader(units, costs)
        self.device: dict[str, int] = self._reader.device.live
        """By category, after the last event."""
        self.host: dict[str, int] = self._reader.host.live
        for buffer in buffers:
            self._reader.device.add(buffer.category, buffer.n_bytes)

    def follow(self, event: Event) -> dict[str, int]:
        """Device bytes by category when their total is largest while ``event`` runs; ``device`` and ``host`` are then as after it."""
        held = dict(self.device)
        self._reader._events((event,))
        if not isinstance(event, Compute):
            return dict(self.device) if sum(self.device.values()) > sum(held.values()) else held
        for category, n_bytes in self._reader.costs[event.unit].memory_of(event.phase).peak.items():
            held[category] = held.get(category, 0) + n_bytes
        return held


class _Passing(NamedTuple):
    """What a pass over a chunk does to the device's live bytes, whatever they are before it."""

    peaks: list[tuple[str, Where, int, dict[str, int]]]
    """By phase, its largest total: phase (empty: that before the pass), where, and the change until then in all and by category."""
    category_peak: list[tuple[str, int]]
    after: list[tuple[str, int]]
    phase: str
    where: Where
    """At its end."""


class _Moment(NamedTuple):
    """Between two passes."""

    held: dict[str, int]
    """The device's live bytes by category."""
    phase: str
    where: Where
    then: dict[int, _Moment]
    """What follows on passes, by identity of their events."""


class _Reader:
    def __init__(self, units: Sequence[Unit], costs: Sequence[UnitCost]) -> None:
        self.units, self.costs = units, costs
        self.device, self.host = _Meter(), _Meter()
        self.phase = "init"
        self.where: Where = "start"
        self.floor = -1
        self.phase_where: dict[str, Where] = {}
        self._passings: dict[int, _Passing | None] = {}
        """By identity of a pass's events; ``None`` for one that changes host memory."""
        self.phase_peak: dict[str, int] = {}
        self.phase_categories: dict[str, dict[str, int]] = {}
        self.at: tuple[str, Where] = ("init", "start")
        self._terms = {
            id(memory): (
                list(memory.peak.items()),
                sum(memory.peak.values()),
                list(memory.after.items()),
                list(memory.category_peak.items()),
            )
            for cost in {id(cost): cost for cost in costs}.values()
            for memory in (
                cost.forward_memory,
                cost.backward_memory,
                *(cost.split[2:] if cost.split is not None else ()),
                *(cost.replayed[1:] if cost.replayed is not None else ()),
            )
        }

    def read(self, program: StepProgram, buffers: Iterable[Buffer]) -> StepMemory:
        for buffer in buffers:
            self.device.add(buffer.category, buffer.n_bytes)
        self._section(Section("init", program.init))
        self._look(self.device.total, ())
        self._mark("forward", "start of the step")
        for section in program.step:
            if section.name == "optimizer":
                self._mark("optimizer", "optimizer step")
            before = dict(self.device.live), dict(self.host.live)
            self._section(section)
            alike = before == (self.device.live, self.host.live)
            for _ in range(0 if alike else section.repeat - 1 if section.passes else min(1, section.repeat - 1)):
                self._section(section)
        device, host = self.device, self.host
        return StepMemory(
            peak_bytes=device.peak_total,
            peak_phase=self.at[0],
            peak_where=self._words(self.at[1]),
            category_bytes_at_peak={k: v for k, v in device.peak.items() if v},
            category_peak_bytes={k: v for k, v in device.category_peak.items() if v},
            phase_peak_bytes=self.phase_peak,
            phase_category_bytes={
                phase: {k: v for k, v in held.items() if v} for phase, held in self.phase_categories.items()
            },
            host_peak_bytes=host.peak_total,
            host_category_peak_bytes={k: v for k, v in host.category_peak.items() if v},
        )

    def _words(self, where: Where) -> str:
        return where if isinstance(where, str) else f"{where[0]} of {self.units[where[1]].name}"

    def _mark(self, phase: str, where: str) -> None:
        self.phase, self.where = phase, where
        self._look(self.device.total, ())

    def _look(self, total: int, extra: Sequence[tuple[str, int]]) -> None:
        """Compare the device's ``total`` (``extra`` included) with the largest so far."""
        if total <= self.phase_peak.get(self.phase, self.floor):
            return
        device = self.device
        held = dict(device.live)
        for category, n_bytes in extra:
            held[category] = held.get(category, 0) + n_bytes
        self.phase_peak[self.phase] = total
        self.phase_categories[self.phase] = held
        self.phase_where[self.phase] = self.where
        if total > device.peak_total:
            device.peak_total = total
            device.peak = held
            self.at = (self.phase, self.where)

    def _section(self, section: Section) -> None:
        """A pipeline's passes, of which many are equal, are each read once and then only added; one that finds what an equal one has
        found before raises no maximum, and leaves what that one left."""
        if not section.passes:
            self._events(section.events)
            return
        moments: dict[Any, list[_Moment]] = {}
        now = read = self._moment(moments)
        for events in section.passes:
            then = now.then.get(id(events))
            if then is None:
                if now is not read:
                    self._return_to(now)
                if id(events) not in self._passings:
                    self._passings[id(events)] = self._passing(events)
                known = self._passings[id(events)]
                if known is None:
                    self._events(events)
                else:
                    self._add(known)
                then = read = self._moment(moments)
                if known is not None:
                    now.then[id(events)] = then
            now = then
        if now is not read:
            self._return_to(now)

    def _moment(self, moments: dict[Any, list[_Moment]]) -> _Moment:
        """The present one, which may be among ``moments``."""
        device = self.device
        alike = moments.setdefault((device.total, self.phase, self.where), [])
        for moment in alike:
            if moment.held == device.live:
                return moment
        alike.append(_Moment(dict(device.live), self.phase, self.where, {}))
        return alike[-1]

    def _return_to(self, moment: _Moment) -> None:
        self.device.live = dict(moment.held)
        self.device.total = sum(self.device.live.values())
        self.phase, self.where = moment.phase, moment.where

    def _passing(self, events: Sequence[Event]) -> _Passing | None:
        """``None`` for a pass that changes host memory."""
        if any(isinstance(e, Alloc | Free) and e.buffer.place != "device" for e in events):
            return None
        alone = copy(self)
        alone.device, alone.phase_peak, alone.phase_categories, alone.phase_where = _Meter(), {}, {}, {}
        alone.phase = alone.where = ""
        alone.floor = -(1 << 62)
        alone._events(events)
        device = alone.device
        return _Passing(
            [(p, alone.phase_where[p], total, alone.phase_categories[p]) for p, total in alone.phase_peak.items()],
            list(device.category_peak.items()), list(device.live.items()), alone.phase, alone.where,
        )  # fmt: skip

    def _add(self, known: _Passing) -> None:
        device = self.device
        base = device.total
        before = self.phase, self.where
        for phase, where, change, held in known.peaks:
            self.phase, self.where = (phase, where) if phase else before
            if base + change > self.phase_peak.get(self.phase, self.floor):
                self._look(base + change, list(held.items()))
        for category, n_bytes in known.category_peak:
            value = device.live.get(category, 0) + n_bytes
            if value > device.category_peak.get(category, 0):
                device.category_peak[category] = value
        for category, n_bytes in known.after:
            device.live[category] = device.live.get(category, 0) + n_bytes
            device.total += n_bytes
        self.phase, self.where = (known.phase, known.where) if known.phase else before

    def _events(self, events: Sequence[Event]) -> None:
        device, host, look = self.device, self.host, self._look
        grown = False  # only allocations since the last look: the total is largest after the last of them
        for event in events:
            kind = type(event)
            if grown and kind is not Alloc:
                look(device.total, ())
                grown = False
            if kind is Alloc:
                buffer = event.buffer  # type: ignore[union-attr]
                if buffer.place == "device":
                    device.add(buffer.category, buffer.n_bytes)
                    grown = True
                else:
                    host.add(buffer.category, buffer.n_bytes)
                    host.peak_total = max(host.peak_total, host.total)
            elif kind is Free:
                buffer = event.buffer  # type: ignore[union-attr]
                (device if buffer.place == "device" else host).add(buffer.category, -buffer.n_bytes)
            elif kind is Recv or kind is Sent:
                sign = 1 if kind is Recv else -1
                device.add(BOUNDARY_CATEGORY[event.what], sign * event.n_bytes)  # type: ignore[union-attr]
                look(device.total, ())
            elif kind is Compute:
                self._compute(event.unit, event.phase)  # type: ignore[union-attr]
        if grown:
            look(device.total, ())

    def _compute(self, unit: int, phase: str) -> None:
        cost, device = self.costs[unit], self.device
        memory = cost.memory_of(phase)
        peak, peak_total, after, category_peak = self._terms[id(memory)]
        self.phase, self.where = PHASE_OF_PASS[phase], (phase, unit)
        self._look(device.total + peak_total, peak)
        for category, n_bytes in category_peak:
            value = device.live.get(category, 0) + n_bytes
            if value > device.category_peak.get(category, 0):
                device.category_peak[category] = value
        for category, n_bytes in after:
            device.add(category, n_bytes)
