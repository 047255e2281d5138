"""Replays a ``StepProgram`` through the allocator: reserved bytes and fragmentation of one rank.

Requests come in the order in which the program and the units' passes make them. The first step is played from an empty device, and
one more after it. Where a section repeats and leaves the allocator as one of its turns before did, further turns would do the same
again and are not played.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from estimator.memory.allocator import CachingAllocator, DeviceOutOfMemory
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.memory.blocks import Block
from estimator.memory.requests import Requests
from estimator.ops.cost import UnitCost
from estimator.ops.liveness import PENDING, WRITTEN
from estimator.ops.passes import (
    ALLOC,
    INPUT,
    INPUT_GRAD,
    LOCAL_ALLOC,
    LOCAL_FREE,
    OUTPUT,
    OUTPUT_GRAD,
    Far,
    Step,
    UnitPasses,
    passes_of,
)
from estimator.schedule.activations import HERE
from estimator.schedule.events import (
    Alloc,
    Buffer,
    Compute,
    Event,
    Free,
    Recv,
    Section,
    Send,
    Sent,
    StepProgram,
    Update,
)
from estimator.sharding.layout import Layout

WRITTEN_ROLE = "written_grads"
"""A buffer that units' passes fill bit by bit, and the program drops (``estimator.schedule.unit_buffers``)."""
_ROUNDS = 2
"""A repeated section is also left where every place that it uses in turn (a pipeline's micro-batches in flight) has been used so
often without a larger maximum."""


class Replay(NamedTuple):
    """What the allocator makes of two steps, the second in steady state."""

    is_out_of_memory: bool
    """A request could not be met within the limit; the figures are those until then."""
    reserved_bytes: int
    """Largest number of bytes taken from the device (``torch.cuda.max_memory_reserved``)."""
    allocated_bytes: int
    """Largest number of bytes handed out, with rounding (``torch.cuda.max_memory_allocated``)."""
    requested_bytes: int
    """The same as asked for."""
    fragmentation_bytes: int
    """Reserved beyond what was asked for, when most was asked for in the second step."""
    n_retries: int
    """Requests of the second step that gave all cached segments back first."""


class Subject(NamedTuple):
    """What is replayed."""

    layout: Layout
    program: StepProgram
    costs: Sequence[UnitCost]
    tables: tuple[Buffer, ...] = ()
    """Further buffers that live all the time."""
    requests: Requests = Requests()
    workspace_bytes: int = 0
    """What the first matrix product takes for good."""
    beyond_bytes: int = 0
    """What the step's peak is above that of what is replayed, where this is not the step itself but like it."""


def can_replay(costs: Sequence[UnitCost]) -> bool:
    """Whether the order of all units' requests is known."""
    return all(cost.source is not None for cost in costs)


def replay(
    subject: Subject, settings: AllocatorSettings | None = None, limit_bytes: int | None = None
) -> Replay:  # fmt: skip
    """Two steps of ``subject`` with ``limit_bytes`` of device memory for the allocator (``None``: any number)."""
    return _Player(subject, CachingAllocator(settings, limit_bytes)).run()


class _Player:
    def __init__(self, subject: Subject, allocator: CachingAllocator) -> None:
        self.subject, self.allocator = subject, allocator
        self.live: dict[Hashable, list[Block]] = {}
        """What lives longer than a pass, by name; of several the oldest goes first."""
        self._passes: dict[int, UnitPasses] = {}
        self._steps: dict[tuple[int, str], list[Step]] = {}
        self._has_workspace = not subject.workspace_bytes
        self._newest: tuple[Hashable, Hashable] = (None, None)
        """Names of the newest pass's output and of its input's gradient."""
        self._lossy: set[int] = set()
        """Units that end in the loss."""
        self._late: list[Buffer] = []
        """What is made in the first step, when the optimizer runs."""
        self._turns = 0
        self._part_gone: dict[int, int] = {}
        self._per_buffer: dict[Buffer, list[int]] = {}

    def run(self) -> Replay:
        allocator, program = self.allocator, self.subject.program
        is_out, retries = False, 0
        try:
            for buffer in self.subject.tables:
                self._alloc(("buffer", buffer.role, buffer.group), buffer.n_bytes)
            self._init(program.init)
            for _ in range(2):
                reserved, retries = allocator.peak_reserved_bytes, allocator.n_retries
                allocator.restart_peaks()
                for section in program.step:
                    self._section(section)
                retries = allocator.n_retries - retries
        except DeviceOutOfMemory:
            is_out, reserved = True, allocator.peak_reserved_bytes
        return Replay(
            is_out_of_memory=is_out,
            reserved_bytes=max(reserved, allocator.peak_reserved_bytes),
            allocated_bytes=allocator.peak_allocated_bytes,
            requested_bytes=allocator.peak_requested_bytes,
            fragmentation_bytes=allocator.reserved_at_peak_bytes - allocator.peak_requested_bytes,
            n_retries=retries,
        )

    def _init(self, events: Iterable[Event]) -> None:
        """What lives from step to step."""
        requests, first = self.subject.requests, []
        if requests.moves_params:
            buffers = [e.buffer for e in events if type(e) is Alloc and e.buffer.role == "full_params"]
            first = [self.allocator.malloc(n) for buffer in buffers for n in self._per_param(buffer)]
        for event in events:
            if type(event) is Alloc and requests.late_states and event.buffer.category == "optimizer_state":
                self._late.append(event.buffer)
                continue
            if first and type(event) is Alloc and event.buffer.category not in ("params", "grads"):
                for block in filter(None, first):
                    self.allocator.free(block)
                first = []
            self._events([event])

    # ---- sections -------------------------------------------------------------------------------------------------

    def _section(self, section: Section) -> None:
        allocator = self.allocator
        seen: dict[Hashable, int] = {}
        last_growth, retries, most = 0, allocator.n_retries, allocator.peak_reserved_bytes
        for turn in range(1, section.repeat + 1):
            before = allocator.requested_bytes
            for events in section.passes or (section.events,):
                self._events(events, is_pass=bool(section.passes))
            if turn == section.repeat:
                return
            if allocator.peak_reserved_bytes > most:
                last_growth, retries, most = turn, allocator.n_retries, allocator.peak_reserved_bytes
            if allocator.requested_bytes != before:
                continue  # passes that pile up activations or take them down
            quiet = turn - last_growth
            state = self._state()
            if state in seen or quiet > _ROUNDS * max(map(len, self.live.values()), default=0):
                turns = turn - seen[state] if state in seen else quiet
                allocator.n_retries += (allocator.n_retries - retries) * (section.repeat - turn) // turns
                return
            seen[state] = turn

    def _state(self) -> Hashable:
        """All that decides what further events do."""
        live = frozenset((name, tuple(b.address for b in blocks)) for name, blocks in self.live.items() if blocks)
        return hash((self.allocator.state(), live))

    # ---- events ---------------------------------------------------------------------------------------------------

    def _events(self, events: Iterable[Event], is_pass: bool = False) -> None:
        is_first = is_pass
        for event in events:
            kind = type(event)
            if kind is Compute:
                self._compute(event.unit, event.phase, is_first)  # type: ignore[union-attr]
                is_first = False
            elif kind is Alloc:
                self._alloc_buffer(event.buffer)  # type: ignore[union-attr]
            elif kind is Free:
                self._free_buffer(event.buffer)  # type: ignore[union-attr]
            elif kind is Recv:
                self._alloc(("received", event.what), event.n_bytes)  # type: ignore[union-attr]
            elif kind is Send:
                self._rename(self._newest[event.what == "gradients"], ("sent", event.what))  # type: ignore[union-attr]
            elif kind is Sent:
                self._free(("sent", event.what))  # type: ignore[union-attr]
            elif kind is Update and self._late:
                late, self._late = self._late, []
                for buffer in late:
                    self._alloc_buffer(buffer)

    def _alloc_buffer(self, buffer: Buffer) -> None:
        if buffer.place != "device":
            return
        requests = self.subject.requests
        if buffer.role in requests.paced_by:
            self._turns += 1
            self.allocator.complete(f"turn {self._turns - 2}")
        for n_bytes in self._pieces(buffer):
            self._alloc(_name(buffer), n_bytes, requests.pools.get(buffer.role, "compute"))

    def _free_buffer(self, buffer: Buffer) -> None:
        if buffer.place != "device" or not buffer.n_bytes:
            return
        if buffer.role == WRITTEN_ROLE:
            self._free_written(buffer)
            return
        name = _name(buffer)
        for _ in self._pieces(buffer):
            if buffer.role in self.subject.requests.waiting:
                self.allocator.record_stream(self.live[name][0], f"turn {self._turns}")
            self._free(name)

    def _pieces(self, buffer: Buffer) -> Sequence[int]:
        """Bytes of the tensors that it is."""
        if buffer.role not in self.subject.requests.by_param or buffer.group < 0:
            return (buffer.n_bytes,) if buffer.n_bytes else ()
        if buffer not in self._per_buffer:
            self._per_buffer[buffer] = self._per_param(buffer)
        return self._per_buffer[buffer]

    def _per_param(self, buffer: Buffer) -> list[int]:
        """``buffer`` taken apart by its parameters' shares, padding with the last."""
        layout, pieces, left = self.subject.layout, [], buffer.n_bytes
        sizes = [slot.param.numel for slot in layout.slots(layout.groups[buffer.group])]
        whole = sum(sizes)
        for numel in sizes[:-1]:
            pieces.append(buffer.n_bytes * numel // whole)
            left -= pieces[-1]
        return [n_bytes for n_bytes in (*pieces, left) if n_bytes]

    def _free_written(self, buffer: Buffer) -> None:
        """The gradients that the passes of a group's units have left; where a unit has several groups, a tensor of which a part is
        another group's stays until that goes too."""
        left = buffer.n_bytes
        for unit in reversed(self.subject.layout.groups[buffer.group].units):
            held = self.live.get((WRITTEN, unit), [])
            left += self._part_gone.pop(unit, 0)
            while held and left >= held[0].requested:
                left -= held[0].requested
                self.allocator.free(held.pop(0))
            if held and left:
                self._part_gone[unit], left = left, 0

    def _alloc(self, name: Hashable, n_bytes: int, stream: str = "compute") -> None:
        block = self.allocator.malloc(n_bytes, stream)
        if block is not None:
            self.live.setdefault(name, []).append(block)

    def _free(self, name: Hashable) -> None:
        self.allocator.free(self.live[name].pop(0))

    def _rename(self, name: Hashable, new: Hashable) -> None:
        if self.live.get(name):
            self.live.setdefault(new, []).append(self.live[name].pop(-1))

    # ---- passes ---------------------------------------------------------------------------------------------------

    def _compute(self, unit: int, phase: str, is_first: bool) -> None:
        allocator, live = self.allocator, self.live
        if not self._has_workspace:
            self._has_workspace = True
            self._alloc("workspace", self.subject.workspace_bytes)
        if is_first:  # of a pipeline rank's pass: what it begins with has been received
            if phase in ("forward", "loss") and self._has_input(unit):
                self._rename_oldest(("received", "activations"), (INPUT, unit))
            elif phase in ("backward", "input_grad") and unit not in self._lossy:
                self._rename_oldest(("received", "gradients"), (OUTPUT_GRAD, unit))
        if phase == "loss":
            self._lossy.add(unit)
        local: dict[Hashable, Block] = {}
        malloc, free = allocator.malloc, allocator.free
        for kind, name, n_bytes in self._steps_of(unit, phase):
            if kind == LOCAL_ALLOC:
                local[name] = malloc(n_bytes)  # type: ignore[assignment]
            elif kind == LOCAL_FREE:
                free(local.pop(name))
            elif kind == ALLOC:
                live.setdefault(name, []).append(malloc(n_bytes))  # type: ignore[arg-type]
            elif held := live.get(name):
                free(held.pop(0))
            else:
                assert name == (OUTPUT_GRAD, unit), (name, unit, phase)
                free(live[INPUT, unit + 1].pop(0))  # the loss, which its gradient's bytes are counted as
        self._newest = (INPUT, unit + 1), (OUTPUT_GRAD, unit - 1)

    def _has_input(self, unit: int) -> bool:
        source = self.subject.costs[unit].source
        return source is not None and source.tape.input >= 0

    def _rename_oldest(self, name: Hashable, new: Hashable) -> None:
        if self.live.get(name):
            self.live.setdefault(new, []).append(self.live[name].pop(0))

    def _steps_of(self, unit: int, phase: str) -> list[Step]:
        """The steps of a pass by names that no other unit has."""
        if (unit, phase) not in self._steps:
            source = self.subject.costs[unit].source
            assert source is not None
            if id(source) not in self._passes:
                splits = self.subject.costs[unit].split is not None
                self._passes[id(source)] = passes_of(source, splits=splits)
            self._steps[unit, phase] = [
                (kind, name if kind in (LOCAL_ALLOC, LOCAL_FREE) else _name_in(unit, name), n_bytes)
                for kind, name, n_bytes in self._passes[id(source)].of(phase)
            ]
        return self._steps[unit, phase]


def _name_in(unit: int, name: Hashable) -> Hashable:
    if name == OUTPUT:
        return INPUT, unit + 1
    if name == INPUT_GRAD:
        return OUTPUT_GRAD, unit - 1
    if name in (INPUT, OUTPUT_GRAD):
        return name, unit
    return name if name == PENDING or isinstance(name, Far) else (name, unit)


def _name(buffer: Buffer) -> Hashable:
    return (INPUT, buffer.group) if buffer.role == HERE else ("buffer", buffer.role, buffer.group)
