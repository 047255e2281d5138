"""Memory over the step: live bytes by category after every event that changes them, at the times of the forecast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from estimator.memory.reader import Follower
from estimator.report import CATEGORIES
from estimator.schedule.events import Compute, Section
from estimator.time.recorder import Place
from estimator.views.names import event_name
from estimator.views.step import StepView


class MemorySample(NamedTuple):
    """Live bytes of one rank at one moment."""

    time_s: float
    event: str
    """What has just happened; of a pass that is at its own peak, what is happening."""
    live: dict[str, int]
    """Device bytes by category, none of them 0."""
    host_bytes: int
    within: bool = False
    """Inside of a pass, when it needs most. Its time is the pass's middle: when it is exactly, is not known."""

    @property
    def total_bytes(self) -> int:
        return sum(self.live.values())


class Gap(NamedTuple):
    """A time of which there are no samples."""

    start_s: float
    end_s: float
    repeats: int
    """Micro-batches (in a pipeline: turns of its passes) like those before it."""


class MemoryCurve(NamedTuple):
    """Memory of one pipeline rank over its step."""

    samples: tuple[MemorySample, ...]
    peak: MemorySample
    """The first with the largest total."""
    rank: int
    gaps: tuple[Gap, ...]


def memory_over_step(view: StepView, rank: int | None = None) -> MemoryCurve:
    """Of pipeline rank ``rank``, by default of the one that the report is of.

    The largest total is ``peak_allocated_bytes`` of the report. What is allocated while the host is ahead of the device is shown when the
    device comes to it.
    """
    rank = view.fullest if rank is None else rank
    samples = tuple(_samples(view, rank))
    peak = max(samples, key=lambda sample: sample.total_bytes)
    return MemoryCurve(samples, peak, rank, tuple(gaps_of(view, rank)))


def gaps_of(view: StepView, rank: int) -> Iterator[Gap]:
    """Where the record of a rank has gaps."""
    record = view.record.ranks[rank]
    for number, section in enumerate(view.blueprints[rank].program.step):
        missing = section.repeat - 1 - record.kept_turns
        if missing > 0:
            before = record.moments[Place(number, record.kept_turns - 1, len(section.events) - 1)]
            after = record.moments[Place(number, section.repeat - 1, 0)]
            yield Gap(before[1], after[0], missing)


def category_order(samples: tuple[MemorySample, ...]) -> list[str]:
    """The categories that occur, in the order of ``CATEGORIES``."""
    return [name for name in CATEGORIES if any(sample.live.get(name) for sample in samples)]


def _samples(view: StepView, rank: int) -> Iterator[MemorySample]:
    blueprint, moments = view.blueprints[rank], view.record.ranks[rank].moments
    follower = Follower(blueprint.layout.units, blueprint.costs, blueprint.tables)
    for event in blueprint.program.init:
        follower.follow(event)

    def sample(time_s: float, name: str, live: dict[str, int], within: bool = False) -> MemorySample:
        held = {category: n_bytes for category, n_bytes in live.items() if n_bytes}
        return MemorySample(time_s, name, held, sum(follower.host.values()), within)

    yield sample(0.0, "start of the step", follower.device)
    end_s = 0.0
    for number, section in enumerate(blueprint.program.step):
        for turn in range(section.repeat):
            if Place(number, turn, 0) not in moments and _is_alike(section):
                continue
            for index, event in enumerate(section.events):
                before = dict(follower.device), dict(follower.host)
                during = follower.follow(event)
                moment = moments.get(Place(number, turn, index))
                if moment is None:
                    continue
                start_s, end_s = moment
                name = event_name(event, blueprint.layout)
                if isinstance(event, Compute):
                    yield sample((start_s + end_s) / 2, name, during, within=True)
                if before != (follower.device, follower.host):
                    yield sample(end_s, name, follower.device)
    yield sample(max(end_s, view.record.ranks[rank].end_s), "end of the step", follower.device)


def _is_alike(section: Section) -> bool:
    """Whether a turn leaves behind what it found from the second on: where passes of a pipeline pile up, it does not."""
    return not section.passes


def memory_csv_rows(curve: MemoryCurve) -> Iterator[list[str]]:
    """Heading and lines of a table of ``curve``: seconds and bytes."""
    categories = category_order(curve.samples)
    yield ["time_s", "event", "within_pass", "total_bytes", *(f"{name}_bytes" for name in categories), "host_bytes"]
    for s in curve.samples:
        by_category = (str(s.live.get(name, 0)) for name in categories)
        yield [f"{s.time_s:.9f}", s.event, str(int(s.within)), str(s.total_bytes), *by_category, str(s.host_bytes)]
