"""Plays a ``StepProgram`` on streams and says where the time goes.

Clocks: ``compute``, ``gather``, ``reduce``, ``h2d``, ``d2h`` on the device, a late optimizer's ``worker``, and the host. One host thread issues every
event in order, so the host clock is both the issue clock (nothing starts before it was issued) and the ``host``
stream (an optimizer step on the host keeps the thread busy). What the ``worker`` does is issued at the start of a step. A collective or copy also starts no earlier than
everything issued before it on ``compute``.

Time is told from the compute stream: while it works, the time belongs to the pass it runs; while it waits, to what it
waits for (and, before that began, to what held that up); while it waits for a kernel to be issued, to the kernel's pass.
So the parts add up to the step.

On a CPU (``gpu.arch == "cpu"``) copies and arithmetic are one clock. Collectives run in threads of their own on the same
cores: arithmetic hides the share of them that calibration measured (``HostPoint.overlap``), by the rest it is slowed while they
go on. Files have clocks of their own there too.

Sections repeat: an iteration maps the clocks to new clocks by additions and maxima only. Once two iterations advance
every clock by the same amounts, the last iteration is played from the clocks that this advance would lead to; if it
advances them by these amounts too then, the map being convex along that line, all iterations between do (exactly).
Otherwise they are all played, as they are while work of the host is still to be told from the compute stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from estimator.job.job import Job
from estimator.ops.cost import UnitCost
from estimator.report import TIME_PARTS
from estimator.schedule.events import (
    Accumulate,
    AddRows,
    Alloc,
    Blend,
    Collective,
    Commit,
    Compute,
    Copy,
    Event,
    Free,
    GradNorm,
    Keep,
    Pack,
    PickRows,
    Restage,
    Section,
    StepProgram,
    SumPieces,
    Unpack,
    Update,
    Wait,
)
from estimator.schedule.servers import grow_older
from estimator.time.code import HOST_WAIT, HOST_WORK, PASS, PASSES, WAIT, WORK, joined
from estimator.time.durations import Durations
from estimator.time.interval import interval
from estimator.time.one_clock import sharing, slowed_by
from estimator.time.profile import HardwareProfile
from estimator.time.stack import Stack

STREAMS = ("compute", "gather", "reduce", "h2d", "d2h", "send", "recv", "nvme_read", "nvme_write", "worker", "host")
INDEX = {name: i for i, name in enumerate(STREAMS)}
_HOST = INDEX["host"]
_FILES = (INDEX["nvme_read"], INDEX["nvme_write"])
_COLLECTIVE_STREAMS = (INDEX["gather"], INDEX["reduce"])
_TOLERANCE = 1e-9

COLLECTIVE_PART = {
    "params": "exposed_gather",
    "updated_params": "exposed_gather",
    "grads": "exposed_reduce",
    "grad_norm": "exposed_other_comm",
}


class StepTime(NamedTuple):
    """Predicted seconds of one step of one rank."""

    step_s: float
    low_s: float
    high_s: float
    """See ``estimator.time.interval``."""
    parts: dict[str, float]
    """Seconds by ``TIME_PARTS``; they add up to ``step_s``."""
    busy_s: dict[str, float]
    """Seconds of work by stream, overlapped or not."""
    bound: str
    """What takes the most time: ``compute``, ``gather``, ``reduce``, ``other communication``, ``optimizer``, ``offload``,
    ``pipeline bubble``, ``the framework's own work``."""


def time_of(
    program: StepProgram, costs: Sequence[UnitCost], job: Job, profile: HardwareProfile, stack: Stack | None = None
) -> StepTime:
    """Seconds of one step of ``program``; ``costs`` is indexed like the layout's units (equal units may share one).
    ``stack``: other constants of the framework than the shipped ones.

    Raises ``InputError`` for what the profile cannot time (a dtype that was not measured).
    """
    player = Player(Durations(costs, job, profile, stack), serial=job.cluster.gpu.arch == "cpu")
    return step_time(*play_step(player, program, job.strategy.staleness), player.durations)


def play_step(player: Player, program: StepProgram, staleness: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """Parts and busy seconds by stream of ``program``, without what surrounds it (``Stack.slowed``)."""
    if staleness:
        return steady_step(player, program, staleness)
    for section in program.step:
        player.play(section)
    return player.finish()


def step_time(parts: dict[str, float], busy: dict[str, float], durations: Durations) -> StepTime:
    """The step whose program was played to ``parts``."""
    job = durations.job
    parts = durations.stack.slowed(parts, busy, job.cluster.n_gpus, job.zero_stage)
    step_s = sum(parts.values())
    return StepTime(step_s, *interval(step_s, parts, job, durations.profile), parts, busy, bound_of(parts))


def steady_step(player: Player, program: StepProgram, staleness: int) -> tuple[dict[str, float], dict[str, float]]:
    """Parts and busy seconds of a step that begins with pushes of ``staleness`` steps under way, and leaves as many behind.

    Steps are played until they wait for pushes of steps that were played too. Pushes that take longer than all else hold steps up
    one after another, until each takes as long as its pushes.
    """
    for _ in range(staleness + 2):
        player.parts, player.busy = dict.fromkeys(TIME_PARTS, 0.0), [0.0] * len(STREAMS)
        for section in program.step:
            player.play(section)
        grow_older(player.tags, staleness)
        player.clocks[_HOST] = player.clocks[0] = max(player.clocks[0], player.clocks[_HOST])
    pushing_s = player.busy[INDEX["reduce"]]
    player.parts["exposed_reduce"] += max(0.0, pushing_s - sum(player.parts.values()))
    return player.parts, dict(zip(STREAMS, player.busy, strict=True))


def bound_of(parts: dict[str, float]) -> str:
    groups = {
        "compute": parts["forward"] + parts["backward"] + parts["recompute"],
        "gather": parts["exposed_gather"],
        "reduce": parts["exposed_reduce"],
        "other communication": parts["exposed_other_comm"],
        "optimizer": parts["optimizer"],
        "offload": parts["offload"],
        "pipeline bubble": parts["pipeline_bubble"],
        "the framework's own work": parts["data"],
    }
    return max(groups, key=lambda name: groups[name])


class Player:
    """Clocks of one step. Events are compiled to tuples once; an iteration of a section only adds and compares."""

    least_turns = 0
    """Iterations that are played before any are skipped."""
    joins_passes = True
    """Units' passes between which nothing happens are played as one (``joined``)."""

    def __init__(self, durations: Durations, *, serial: bool) -> None:
        self.durations, self.serial = durations, serial
        self.clocks = [0.0] * len(STREAMS)
        self.tags: dict[Any, tuple[float, float, str, str]] = {}
        """Newest event of a tag: end, start, part, and the part that held up its start."""
        self.last_part = ["forward", "exposed_gather", "exposed_reduce", *["offload"] * (_HOST - 3)]
        """What keeps each device stream busy."""
        self.host_log: deque[tuple[float, float, str]] = deque()
        """Spells in which the host was not issuing: start, end, part."""
        self.parts = dict.fromkeys(TIME_PARTS, 0.0)
        self.busy = [0.0] * len(STREAMS)
        self._passes: dict[tuple[int, str], list[tuple[Any, ...]]] = {}
        self._steps: dict[tuple[bool, int, bool], float] = {}
        """Seconds of optimizer steps (or norms) of so many elements (or bytes), on the host or not."""

    def finish(self) -> tuple[dict[str, float], dict[str, float]]:
        """Wait for every stream, as the next step does; parts and busy seconds by stream."""
        if not self.serial:
            end = max(self.clocks)
            if end > self.clocks[0]:
                last = max(range(len(STREAMS)), key=lambda i: self.clocks[i])
                part = self.last_part[last] if last != _HOST else "offload"
                records = [r for r in self.tags.values() if r[0] == end]
                self._idle(self.clocks[0], end, records[0] if records else None, part)
        return self.parts, dict(zip(STREAMS, self.busy, strict=True))

    def play(self, section: Section) -> None:
        code, run = self.compile(section.events), self.run
        if section.repeat == 1:
            run(code)
            return
        left = section.repeat
        previous: list[float] | None = None
        while left > 0:
            before = self.state()
            run(code)
            left -= 1
            advance = difference(self.state(), before)
            may_skip = left > 2 and not self.host_log and section.repeat - left >= self.least_turns
            if previous is not None and may_skip and same(advance, previous):
                saved = self.save()
                self.shift(iter(advance), left - 1)
                before = self.state()
                run(code)
                if same(difference(self.state(), before), advance):
                    return
                self.restore(saved)
                for _ in range(left):
                    run(code)
                return
            previous = advance

    # ---- state, for repeats ---------------------------------------------------------------------------------------

    def state(self) -> list[float]:
        """Everything that decides the next iteration or adds up over iterations."""
        return [*self.clocks, *(x for r in self.tags.values() for x in r[:2]), *self.parts.values(), *self.busy]

    def save(self) -> tuple[Any, ...]:
        return (
            list(self.clocks),
            dict(self.tags),
            dict(self.parts),
            list(self.busy),
            deque(self.host_log),
            list(self.last_part),
        )

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.clocks, self.tags, self.parts, self.busy, self.host_log, self.last_part = saved

    def shift(self, moves: Iterator[float], times: int) -> None:
        """Move the state on by ``times`` iterations that each advance it by the next of ``moves`` (ordered as ``state``)."""
        self.clocks = [c + times * next(moves) for c in self.clocks]
        for tag, (end, start, part, before) in list(self.tags.items()):
            self.tags[tag] = (end + times * next(moves), start + times * next(moves), part, before)
        for name in self.parts:
            self.parts[name] += times * next(moves)
        self.busy = [b + times * next(moves) for b in self.busy]

    # ---- compiling ------------------------------------------------------------------------------------------------

    def compile(self, events: Sequence[Event]) -> list[tuple[Any, ...]]:
        """``events`` as tuples; hot, so it tests the commonest kinds first and looks up instead of calling."""
        d, passes = self.durations, self._passes
        issue_s, units = d.issue_s, d.costs
        clears = d.clear(1) > 0.0
        code: list[tuple[Any, ...]] = []
        event: Any
        for event in events:
            kind = type(event)
            if kind is Free or (kind is Alloc and not clears):
                continue
            if kind is Alloc:
                if event.buffer.role == "full_grads" and (seconds := d.clear(event.buffer.n_bytes)):
                    code.append((WORK, 0, seconds, issue_s, "backward", None))
                continue
            if kind is Compute:
                unit, phase = event
                key = (id(units[unit]), phase)
                if key not in passes:
                    passes[key] = [(PASS, *times) for times in d.passes(unit, phase)]
                code += passes[key]
            elif kind is Wait:
                stream, tag = event
                code.append((HOST_WAIT, tag) if stream == "host" else (WAIT, INDEX[stream], tag))
            elif kind is Collective:
                op, purpose, _, n_bytes, stream, tag, span, _ = event
                seconds = d.collective(op, n_bytes, span)
                code.append((WORK, INDEX[stream], seconds, issue_s, COLLECTIVE_PART[purpose], tag))
            elif kind is Copy:
                stream, _, _, n_bytes, tag = event
                code.append((WORK, INDEX[stream], d.copy(stream, n_bytes), issue_s, "offload", tag))
            else:
                code.append(self._kernel(event))
        return joined(code) if self.joins_passes else code

    def _kernel(self, event: Any) -> tuple[Any, ...]:
        d = self.durations
        if isinstance(event, (Update, GradNorm)):  # of which there are most
            return self._step(event)
        if isinstance(event, PickRows | AddRows):
            return (WORK, 0, d.rows(event), d.issue_s, "exposed_reduce", None)
        if isinstance(event, Pack | Unpack | Keep):
            part = "exposed_gather" if isinstance(event, Keep) else COLLECTIVE_PART[event.purpose]
            return (WORK, 0, d.compression(event), d.issue_s, part, None)
        if isinstance(event, Restage):
            return (
                WORK,
                INDEX[event.stream],
                d.restage(event.n_bytes),
                d.issue_s,
                COLLECTIVE_PART[event.purpose],
                None,
            )
        if isinstance(event, Blend):
            return (WORK, 0, d.blend(event.numel), d.issue_s, "exposed_reduce", None)
        if isinstance(event, SumPieces):
            return (WORK, 0, d.sum_pieces(event), d.issue_s * event.pieces, "exposed_reduce", None)
        if isinstance(event, Accumulate):
            return (WORK, 0, d.accumulate(event.n_bytes), d.issue_s, "backward", None)
        assert isinstance(event, Commit)
        return (HOST_WORK, d.commit(), "offload", None)

    def _step(self, event: Update | GradNorm) -> tuple[Any, ...]:
        is_update = isinstance(event, Update)
        tag = ("update" if is_update else "square", event.group)
        size, on_host = event[1], event.stream != "compute"
        key = is_update, size, on_host
        if key not in self._steps:
            self._steps[key] = (self.durations.update if is_update else self.durations.grad_norm)(size, on_host)
        if event.stream == "worker":
            return (WORK, INDEX["worker"], self._steps[key], 0.0, "offload", tag)
        if on_host:
            return (HOST_WORK, self._steps[key], "offload", tag)
        return (WORK, INDEX[event.stream], self._steps[key], self.durations.issue_s, "optimizer", tag)

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, code: list[tuple[Any, ...]]) -> None:
        """Play ``code``, which ``compile`` made."""
        (self._run_serial if self.serial else self._run)(code)

    def _run_serial(self, code: list[tuple[Any, ...]]) -> None:
        """One clock, except that collectives run on their own until they are waited for, and slow what runs beside them (``sharing``)."""
        clocks, tags, parts, busy = self.clocks, self.tags, self.parts, self.busy
        now, slowing, stalling = clocks[0], *sharing(self.durations.overlap)
        under_way = max(clocks[i] for i in _COLLECTIVE_STREAMS) if slowing else 0.0
        for step in code:
            kind = step[0]
            if kind == PASSES:
                longer = 1.0
                if under_way > now:
                    longer = 1.0 + slowed_by(under_way - now, step[2], slowing) / step[2] if step[2] else 1.0
                for part, seconds in step[4]:
                    parts[part] += seconds * longer
                now += step[2] * longer
                busy[0] += step[2]
                continue
            if kind == PASS:
                seconds, part, stream = step[2], step[1], 0
            elif kind == WORK:
                seconds, part, stream = step[2], step[4], step[1]
                if stream in _FILES or stream in _COLLECTIVE_STREAMS:
                    busy[stream] += seconds
                    if stalling and stream not in _FILES:
                        parts[part] += stalling * seconds
                        now += stalling * seconds
                        seconds -= stalling * seconds
                    clocks[stream] = max(clocks[stream], now) + seconds
                    tags[step[5]] = (clocks[stream], clocks[stream] - seconds, part, part)
                    if slowing and stream not in _FILES:
                        under_way = max(under_way, clocks[stream])
                    continue
            elif kind == HOST_WORK:
                seconds, part, stream = step[1], step[2], _HOST
            else:
                record = tags.get(step[-1])
                if record is not None and kind == WAIT and step[1] in _FILES:
                    clocks[step[1]] = max(clocks[step[1]], record[0])
                elif record is not None and record[0] > now:
                    parts[record[2]] += record[0] - now
                    now = record[0]
                continue
            busy[stream] += seconds
            if under_way > now:
                seconds += slowed_by(under_way - now, seconds, slowing)
            now += seconds
            parts[part] += seconds
        clocks[0] = now

    def _run(self, code: list[tuple[Any, ...]]) -> None:
        clocks, tags, parts, busy, last_part = self.clocks, self.tags, self.parts, self.busy, self.last_part
        now, host = clocks[0], clocks[_HOST]
        for step in code:
            kind = step[0]
            if kind == PASSES:
                if host - now <= step[1]:
                    for part, seconds in step[4]:
                        parts[part] += seconds
                    now += step[2]
                    busy[0] += step[2]
                    host += step[3]
                else:
                    clocks[0], clocks[_HOST] = now, host
                    self._run(step[5])
                    now, host = clocks[0], clocks[_HOST]
            elif kind == PASS:
                _, part, device_s, host_bound_s, host_s = step
                end = now + device_s
                if host + host_bound_s > end:
                    # the host cannot issue fast enough: its own spells first, the rest is the pass itself
                    waited = host + host_bound_s - end
                    if self.host_log:
                        self._idle(now, now + waited, None, part)
                        parts[part] += device_s
                    else:
                        parts[part] += device_s + waited
                    now = end + waited
                else:
                    parts[part] += device_s
                    now = end
                host += host_s
                busy[0] += device_s
            elif kind == WORK:
                _, stream, seconds, issue_s, part, tag = step
                host += issue_s
                if stream == 0:
                    if host > now:
                        self._idle(now, host, None, part)
                        now = host
                    start = now
                    now += seconds
                    parts[part] += seconds
                    before = part
                else:
                    start = clocks[stream]
                    before = last_part[stream]
                    if now > start and stream < _FILES[0]:  # files and threads of the host do not know the device
                        start = now
                    if host > start:
                        start = host
                    clocks[stream] = start + seconds
                    last_part[stream] = part
                busy[stream] += seconds
                if tag is not None:
                    tags[tag] = (start + seconds, start, part, before)
            elif kind == WAIT:
                _, stream, tag = step
                record = tags.get(tag)
                if record is not None:
                    if stream == 0:
                        if record[0] > now:
                            self._idle(now, record[0], record, record[2])
                            now = record[0]
                    elif record[0] > clocks[stream]:
                        clocks[stream] = record[0]
                        last_part[stream] = record[2]
            elif kind == HOST_WORK:
                _, seconds, part, tag = step
                self.host_log.append((host, host + seconds, part))
                if tag is not None:
                    tags[tag] = (host + seconds, host, part, part)
                host += seconds
                busy[_HOST] += seconds
            else:
                record = tags.get(step[1])
                if record is not None and record[0] > host:
                    self.host_log.append((host, record[0], record[2]))
                    host = record[0]
            if self.host_log and self.host_log[-1][1] <= now:
                self.host_log.clear()
        clocks[0], clocks[_HOST] = now, host

    def _idle(self, low: float, high: float, record: tuple[float, float, str, str] | None, part: str) -> None:
        """Attribute the compute stream's idle time from ``low`` to ``high``.

        To ``record`` (what is waited for) from its start on; before that to what the host was held up by; the rest
        to ``part``, or to what held up the record.
        """
        if record is not None:
            start = min(max(low, record[1]), high)
            self.parts[record[2]] += high - start
            high, part = start, record[3]
        rest = high - low
        log = self.host_log
        while log and log[0][1] <= low:  # idle spells come in order of time: what ended before this one is done with
            log.popleft()
        for begin, end, name in log:
            if begin >= high:
                break
            overlap = min(end, high) - max(begin, low)
            if overlap > 0.0:
                self.parts[name] += overlap
                rest -= overlap
        self.parts[part] += max(0.0, rest)


def difference(after: list[float], before: list[float]) -> list[float]:
    """Advance per component; tags that appeared in between make the lengths differ (and the advance unlike any other)."""
    return [a - b for a, b in zip(after, before, strict=True)] if len(after) == len(before) else []


def same(a: list[float], b: list[float]) -> bool:
    """Equal advances, up to rounding."""
    if not a or len(a) != len(b):
        return False
    scale = _TOLERANCE * max(1e-9, max(abs(x) for x in a))
    return all(abs(x - y) <= scale for x, y in zip(a, b, strict=True))
