"""The forecast step as a Chrome trace, which ui.perfetto.dev opens: a process for each pipeline rank, a track for each of its streams,
and counters of memory by category.

Format: "Trace Event Format" (Google, 2016): ``X`` complete events with ``ts`` and ``dur`` in microseconds, ``C`` counters, ``M`` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from estimator.errors import InputError
from estimator.job.files import job_to_dict
from estimator.schedule.events import Accumulate, Collective, Compute, Copy, Event, Recv, Send, StepProgram
from estimator.time.player import STREAMS
from estimator.time.recorder import Place, Spell
from estimator.units import format_seconds
from estimator.views.memory import category_order, gaps_of, memory_over_step
from estimator.views.names import event_name
from estimator.views.step import StepView
from estimator.views.waterfall import added_s, surroundings

Json = dict[str, Any]
MOST_LANES = 8
"""Tracks of one stream: messages of several kinds may overlap on it."""
_OUTSIDE = MOST_LANES * len(STREAMS)
"""The track of what the forecast adds to the program."""


def chrome_trace(view: StepView, ranks: Sequence[int] = ()) -> Json:
    """A JSON document with ``traceEvents``, of the pipeline ranks ``ranks`` or of all.

    Of micro-batches that repeat, those of the record are there; ``otherData`` says how many are missing. What the forecast adds to the
    program (stragglers, contention, the framework) stands behind it on a track of its own, of the rank that ends last, and ends when
    the forecast does. Raises ``InputError`` for a rank that there is not.
    """
    n_ranks = len(view.blueprints)
    for rank in ranks:
        if not 0 <= rank < n_ranks:
            raise InputError(f"stage is {rank}; allowed: a whole number from 0 to {n_ranks - 1}")
    chosen = sorted(set(ranks)) or list(range(n_ranks))
    events = [event for rank in chosen for event in _rank_events(view, rank)]
    left_out = max(sum(gap.repeats for gap in gaps_of(view, rank)) for rank in chosen)
    other = {
        "forecast_step_s": view.report.step_s,
        "job_key": view.job.key,
        "job": job_to_dict(view.job),
        "repeats_left_out": left_out,
        "notes": [*_gap_note(left_out), *_overlap_note(view), *view.report.notes],
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _gap_note(left_out: int) -> Iterator[str]:
    if left_out:
        yield f"{left_out} micro-batches (in a pipeline: repeats) that are like those before them are left out: the gaps are their time"


def _overlap_note(view: StepView) -> Iterator[str]:
    hidden_s = -sum(seconds for seconds in added_s(view).values() if seconds < 0)
    if hidden_s > 0:
        yield f"the last {format_seconds(hidden_s)} of waiting are not part of the step: the next one begins meanwhile"


def _rank_events(view: StepView, rank: int) -> Iterator[Json]:
    blueprint, record = view.blueprints[rank], view.record.ranks[rank]
    numbers = micro_batches(blueprint.program)
    name = "forecast of one GPU" if len(view.blueprints) == 1 else f"stage {rank} of {len(view.blueprints)}"
    yield _meta("process_name", rank, 0, name=name)
    yield _meta("process_sort_index", rank, 0, sort_index=rank)
    lanes = _lanes(record.spells)
    for thread, lane in sorted({(_thread(s.stream, lane), lane) for s, lane in lanes}):
        stream = STREAMS[thread // MOST_LANES]
        yield _meta("thread_name", rank, thread, name=stream if not lane else f"{stream} ({lane + 1})")
        yield _meta("thread_sort_index", rank, thread, sort_index=thread)
    for spell, lane in lanes:
        thread = _thread(spell.stream, lane)
        if spell.place is None:
            yield _complete(
                "wait for the end of the step", "wait", rank, thread, spell.start_s, spell.end_s, part=spell.part
            )
            continue
        event = blueprint.program.step[spell.place.section].events[spell.place.number]
        words = event_name(event, blueprint.layout)
        section = blueprint.program.step[spell.place.section].name
        args: Json = {"part": spell.part, "section": section, **_args(event)}
        if (number := numbers(spell.place)) is not None:
            args["micro_batch"] = number
        if spell.is_wait:
            words = words if words.startswith("wait for ") else f"wait before {words}"
        else:
            words = _own_name(words, event, spell.part)
        category = "wait" if spell.is_wait else spell.part
        yield _complete(words, category, rank, thread, spell.start_s, spell.end_s, **args)
    if rank == view.record.last and (blocks := surroundings(view)):
        yield _meta("thread_name", rank, _OUTSIDE, name="outside the program")
        yield _meta("thread_sort_index", rank, _OUTSIDE, sort_index=_OUTSIDE)
        at = (view.report.step_s or 0.0) - sum(seconds for _, seconds in blocks)
        for name, seconds in blocks:
            yield _complete(name, "outside", rank, _OUTSIDE, at, at + seconds)
            at += seconds
    yield from _counters(view, rank)


def _own_name(words: str, event: Event, part: str) -> str:
    """Of what a pass runs beside its own operators, and of a message, which is played where it is waited for."""
    if isinstance(event, Compute) and part == "recompute":
        return words.replace("backward", "recompute", 1).replace("input gradients", "recompute", 1)
    if isinstance(event, Compute) and part == "exposed_other_comm":
        return f"{words}: exchange"
    return words.removeprefix("wait for ")


def _args(event: Event) -> Json:
    if isinstance(event, Compute):
        return {"unit": event.unit, "phase": event.phase}
    if isinstance(event, Collective | Copy | Send | Recv | Accumulate):
        return {"bytes": event.n_bytes}
    return {}


def micro_batches(program: StepProgram) -> Any:
    """A function that numbers a pass: the how-manieth of its unit and kind in the step, from 0; ``None`` for what is no pass."""
    before: list[Counter[Compute]] = []
    total: Counter[Compute] = Counter()
    within: list[dict[int, int]] = []
    per_turn: list[Counter[Compute]] = []
    for section in program.step:
        before.append(Counter(total))
        seen: Counter[Compute] = Counter()
        order: dict[int, int] = {}
        for index, event in enumerate(section.events):
            if isinstance(event, Compute):
                order[index] = seen[event]
                seen[event] += 1
        within.append(order)
        per_turn.append(seen)
        for event, n in seen.items():
            total[event] += n * section.repeat

    def number(place: Place) -> int | None:
        event = program.step[place.section].events[place.number]
        if not isinstance(event, Compute):
            return None
        turns = place.turn * per_turn[place.section][event]
        return before[place.section][event] + turns + within[place.section][place.number]

    return number


def _lanes(spells: Iterable[Spell]) -> list[tuple[Spell, int]]:
    """Spells in order of time, each with the first lane of its stream that is free."""
    free: dict[str, list[int]] = {}
    placed = []
    for spell in sorted(spells, key=lambda s: (s.start_s, s.end_s)):
        lanes = free.setdefault(spell.stream, [])
        start, end = _ns(spell.start_s), _ns(spell.end_s)
        lane = next((i for i, until in enumerate(lanes) if until <= start), len(lanes))
        lane = min(lane, MOST_LANES - 1)
        lanes[lane : lane + 1] = [end]
        placed.append((spell, lane))
    return placed


def _counters(view: StepView, rank: int) -> Iterator[Json]:
    curve = memory_over_step(view, rank)
    categories = category_order(curve.samples)
    uses_host = any(sample.host_bytes for sample in curve.samples)
    for sample in curve.samples:
        at = _ns(sample.time_s) / 1e3
        by_category = {name: sample.live.get(name, 0) for name in categories}
        yield {
            "ph": "C",
            "name": "device memory by category (bytes)",
            "pid": rank,
            "tid": 0,
            "ts": at,
            "args": by_category,
        }
        yield _counter("device memory (bytes)", rank, at, sample.total_bytes)
        if uses_host:
            yield _counter("host memory (bytes)", rank, at, sample.host_bytes)


def _counter(name: str, rank: int, at: float, value: int) -> Json:
    return {"ph": "C", "name": name, "pid": rank, "tid": 0, "ts": at, "args": {"bytes": value}}


def _thread(stream: str, lane: int) -> int:
    return STREAMS.index(stream) * MOST_LANES + lane


def _meta(kind: str, rank: int, thread: int, **args: Any) -> Json:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": args}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _complete(name: str, category: str, rank: int, thread: int, start_s: float, end_s: float, **args: Any) -> Json:
    """Both ends are rounded to nanoseconds, so that what follows something never overlaps it."""
    start, end = _ns(start_s), _ns(end_s)
    return {
        "ph": "X", "name": name, "cat": category, "pid": rank, "tid": thread, "ts": start / 1e3, "dur": (end - start) / 1e3,
        "args": args,
    }  # fmt: skip
