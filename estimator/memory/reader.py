"""Reads a ``StepProgram`` and adds up live bytes: categories x phases, the peak and where it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from estimator.ops.cost import UnitCost
from estimator.schedule.events import Alloc, Buffer, Compute, Event, Free, StepProgram
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
        value = self.live.get(category, 0) + n_bytes
        self.live[category] = value
        self.total += n_bytes
        if n_bytes > 0 and value > self.category_peak.get(category, 0):
            self.category_peak[category] = value


def read_memory(
    program: StepProgram, units: Sequence[Unit], costs: Sequence[UnitCost], buffers: Iterable[Buffer] = ()
) -> StepMemory:
    """Live bytes of ``program`` where the compute of ``units[i]`` costs ``costs[i]``.

    ``buffers`` are further device bytes that live all the time (a model's tables). A section that repeats and leaves
    behind what it found needs one reading; another one needs two, as turns are alike from the second on.
    """
    return _Reader(units, costs).read(program, buffers)


class _Reader:
    def __init__(self, units: Sequence[Unit], costs: Sequence[UnitCost]) -> None:
        self.units, self.costs = units, costs
        self.device, self.host = _Meter(), _Meter()
        self.phase, self.where = "init", "start"
        self.phase_peak: dict[str, int] = {}
        self.phase_categories: dict[str, dict[str, int]] = {}
        self.at: tuple[str, str] = ("init", "start")
        self._terms = {
            id(memory): (
                list(memory.peak.items()),
                sum(memory.peak.values()),
                list(memory.after.items()),
                list(memory.category_peak.items()),
            )
            for cost in costs
            for memory in (cost.forward_memory, cost.backward_memory)
        }

    def read(self, program: StepProgram, buffers: Iterable[Buffer]) -> StepMemory:
        for buffer in buffers:
            self.device.add(buffer.category, buffer.n_bytes)
        self._events(program.init)
        self._look(self.device.total, ())
        self._mark("forward", "start of the step")
        for section in program.step:
            if section.name == "optimizer":
                self._mark("optimizer", "optimizer step")
            before = dict(self.device.live), dict(self.host.live)
            self._events(section.events)
            if section.repeat > 1 and before != (self.device.live, self.host.live):
                self._events(section.events)
        device, host = self.device, self.host
        return StepMemory(
            peak_bytes=device.peak_total,
            peak_phase=self.at[0],
            peak_where=self.at[1],
            category_bytes_at_peak={k: v for k, v in device.peak.items() if v},
            category_peak_bytes={k: v for k, v in device.category_peak.items() if v},
            phase_peak_bytes=self.phase_peak,
            phase_category_bytes={
                phase: {k: v for k, v in held.items() if v} for phase, held in self.phase_categories.items()
            },
            host_peak_bytes=host.peak_total,
            host_category_peak_bytes={k: v for k, v in host.category_peak.items() if v},
        )

    def _mark(self, phase: str, where: str) -> None:
        self.phase, self.where = phase, where
        self._look(self.device.total, ())

    def _look(self, total: int, extra: Sequence[tuple[str, int]]) -> None:
        """Compare the device's ``total`` (``extra`` included) with the largest so far."""
        if total <= self.phase_peak.get(self.phase, -1):
            return
        device = self.device
        held = dict(device.live)
        for category, n_bytes in extra:
            held[category] = held.get(category, 0) + n_bytes
        self.phase_peak[self.phase] = total
        self.phase_categories[self.phase] = held
        if total > device.peak_total:
            device.peak_total = total
            device.peak = held
            self.at = (self.phase, self.where)

    def _events(self, events: Sequence[Event]) -> None:
        device, host, look = self.device, self.host, self._look
        for event in events:
            kind = type(event)
            if kind is Alloc:
                buffer = event.buffer  # type: ignore[union-attr]
                if buffer.place == "device":
                    device.add(buffer.category, buffer.n_bytes)
                    look(device.total, ())
                else:
                    host.add(buffer.category, buffer.n_bytes)
                    host.peak_total = max(host.peak_total, host.total)
            elif kind is Free:
                buffer = event.buffer  # type: ignore[union-attr]
                (device if buffer.place == "device" else host).add(buffer.category, -buffer.n_bytes)
            elif kind is Compute:
                self._compute(event.unit, event.phase)  # type: ignore[union-attr]

    def _compute(self, unit: int, phase: str) -> None:
        cost, device = self.costs[unit], self.device
        memory = cost.backward_memory if phase == "backward" else cost.forward_memory
        peak, peak_total, after, category_peak = self._terms[id(memory)]
        self.phase, self.where = phase, f"{phase} of {self.units[unit].name}"
        self._look(device.total + peak_total, peak)
        for category, n_bytes in category_peak:
            value = device.live.get(category, 0) + n_bytes
            if value > device.category_peak.get(category, 0):
                device.category_peak[category] = value
        for category, n_bytes in after:
            device.add(category, n_bytes)
