"""Blocks' inputs that wait for their backward pass in host memory.

A block that recomputes keeps its input. Here that input is copied to pinned host memory while the unit after the block runs forward,
and dropped when that has run; it is brought back while that unit runs backward. So the device holds at most the input in use and
one on its way (Rajbhandari et al. 2021, section 5.1.2). The last block's input stays: it would leave behind the head's forward
pass and come back behind the head's backward pass, which is at once.

Bytes are 0 in the program that ``build_program`` writes, which does not depend on the batch; ``sized`` fills them in for those
who add up and time. The runtime copies what it meets.
"""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.strategy import Strategy
from estimator.ops.cost import UnitCost
from estimator.schedule.events import Alloc, Buffer, Copy, Event, Free, StepProgram, Wait
from estimator.sharding.units import Unit, recomputing

AWAY, HERE = "host_input", "block_input"
"""Roles of the buffers of a unit's input, on the host and on the device; their ``group`` is the unit."""


class InputCopies:
    """Events around the passes of units whose inputs go away and come back."""

    def __init__(self, units: Sequence[Unit], strategy: Strategy) -> None:
        last_block, first_trained = len(units) - 2, next(i for i, unit in enumerate(units) if unit.is_trained)
        travels = range(first_trained + 1, last_block) if strategy.activation_offload else ()
        self.units = recomputing(units, strategy.recompute_every) & frozenset(travels)
        self._leaving: list[int] = []

    def init(self) -> list[Event]:
        """Host memory lives from step to step: pinning it takes long."""
        return [Alloc(Buffer(AWAY, unit, "activations", 0, "host")) for unit in sorted(self.units)]

    def before(self, unit: int, phase: str) -> list[Event]:
        """Before ``unit``'s pass: bring back what the one after it reads, and wait for its own input."""
        if not self.units or phase != "backward":
            return []
        events: list[Event] = []
        if unit - 1 in self.units:
            events.append(Alloc(Buffer(HERE, unit - 1, "activations", 0)))
            events.append(Copy("h2d", "activations", unit - 1, 0, ("act_in", unit - 1)))
        if unit in self.units:
            events.append(Wait("compute", ("act_in", unit)))
        return events

    def after(self, unit: int, phase: str) -> list[Event]:
        """After ``unit``'s pass: drop what left meanwhile, and send its own input away."""
        if not self.units:
            return []
        events: list[Event] = []
        while self._leaving:
            gone = self._leaving.pop(0)
            events += [Wait("compute", ("act_out", gone)), Free(Buffer(HERE, gone, "activations", 0))]
        if phase == "forward" and unit in self.units:
            events.append(Copy("d2h", "activations", unit, 0, ("act_out", unit)))
            self._leaving.append(unit)
        return events


def sized(program: StepProgram, costs: Sequence[UnitCost]) -> StepProgram:
    """``program`` with the bytes of the inputs that travel; ``costs`` by unit."""

    def fill(event: Event) -> Event:
        if isinstance(event, Copy) and event.purpose == "activations":
            return event._replace(n_bytes=costs[event.group].input_bytes)
        if isinstance(event, Alloc | Free) and event.buffer.role in (AWAY, HERE):
            return event._replace(buffer=event.buffer._replace(n_bytes=costs[event.buffer.group].input_bytes))
        return event

    sections = tuple(section._replace(events=tuple(map(fill, section.events))) for section in program.step)
    return StepProgram(tuple(map(fill, program.init)), sections)
