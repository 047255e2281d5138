"""The passes of one pipeline rank as sections of its ``StepProgram``.

What a pass needs from another rank is received one pass ahead: room is made, and the transfer may begin, before the pass
that goes before it computes. What a pass has sent lives until the same rank has more to send of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from estimator.job.mesh import Span
from estimator.job.strategy import Strategy
from estimator.schedule.events import Boundary, Event, Recv, Section, Send, Sent, Wait
from estimator.schedule.pipeline import Action, orders, periods

if TYPE_CHECKING:
    from estimator.schedule.program import _Builder

_BACK = ("backward", "input_grad")


class PipelinePlace(NamedTuple):
    """Where a rank stands in a pipeline, and what its chunks exchange with others."""

    rank: int
    pp: int
    chunks: tuple[range, ...]
    """Indices, in the rank's layout, of each chunk's units."""
    boundary_bytes: int
    """Of what one micro-batch's pass hands on: the residual stream."""

    @property
    def is_last(self) -> bool:
        return self.rank == self.pp - 1

    def order(self, strategy: Strategy, n_micro_batches: int) -> tuple[Action, ...]:
        """What the rank does in one step."""
        return orders(strategy.pp_schedule, self.pp, len(self.chunks), n_micro_batches)[self.rank]

    def receives(self, action: Action) -> Boundary | None:
        """What ``action`` needs from another rank."""
        if action.direction == "forward":
            return "activations" if (action.chunk, self.rank) != (0, 0) else None
        return "gradients" if action.direction in _BACK and not self._ends(action.chunk) else None

    def sends(self, action: Action) -> Boundary | None:
        """What another rank needs from ``action``."""
        if action.direction == "forward":
            return None if self._ends(action.chunk) else "activations"
        return "gradients" if action.direction in _BACK and (action.chunk, self.rank) != (0, 0) else None

    def _ends(self, chunk: int) -> bool:
        return self.is_last and chunk == len(self.chunks) - 1

    def offset(self, what: Boundary, stride: int, *, to: bool) -> int:
        """Ranks from this one to where ``what`` goes ``to``, or comes from; neighbours are ``stride`` ranks away."""
        step = 1 if (what == "activations") == to else -1
        return ((self.rank + step) % self.pp - self.rank) * stride


def pipeline_sections(builder: _Builder, place: PipelinePlace, n_micro_batches: int) -> list[Section]:
    """Sections of all passes of one step: those that repeat once with their count, what lies between them once."""
    strategy = builder.strategy
    order = place.order(strategy, n_micro_batches)
    writer = _Writer(builder, place, order)
    sections: list[Section] = []
    at = 0
    chunks = len(place.chunks)
    for start, length, repeat in periods(strategy.pp_schedule, place.pp, chunks, n_micro_batches)[place.rank]:
        sections += [writer.section(range(at, start)), writer.section(range(start, start + length), repeat)]
        at = start + length * repeat
    return [*sections, writer.section(range(at, len(order)), is_end=True)]


class _Writer:
    """Writes passes with the builder's own hand; equal ones once."""

    def __init__(self, builder: _Builder, place: PipelinePlace, order: Sequence[Action]) -> None:
        self.builder, self.place, self.order = builder, place, order
        self.stride = builder.mesh.span("pp").stride
        self.known: dict[tuple[object, ...], tuple[Event, ...]] = {}
        ends: dict[tuple[str, int], list[int]] = {}
        for i, action in enumerate(order):
            ends.setdefault((action.direction, action.chunk), [i, i])[1] = i
        self.firsts, self.lasts = ({span[end] for span in ends.values()} for end in (0, 1))
        sending = [place.sends(action) for action in order]
        self.first_sends = {sending.index(what) for what in dict.fromkeys(sending) if what is not None}
        self.visits = {}
        for number, chunk in enumerate(place.chunks):
            turns = [visit for visit in builder.visits if visit.unit in chunk]
            backward = [visit for visit in turns if visit.phase == "backward"]
            self.visits["forward", number] = [visit for visit in turns if visit.phase != "backward"]
            for way in ("backward", "input_grad", "weight_grad"):
                self.visits[way, number] = [visit._replace(phase=way) for visit in backward]  # type: ignore[arg-type]

    def section(self, which: range, repeat: int = 1, *, is_end: bool = False) -> Section:
        passes = [self._pass(i) for i in which]
        if is_end:
            passes.append(tuple(self._end()))
        return Section("micro_batch", tuple(event for events in passes for event in events), repeat, tuple(passes))

    def _pass(self, i: int) -> tuple[Event, ...]:
        action, place = self.order[i], self.place
        following = place.receives(self.order[i + 1]) if i + 1 < len(self.order) else None
        key = (
            action.direction,
            action.chunk,
            i in self.firsts,
            i in self.lasts,
            i in self.first_sends,
            following,
            i == 0,
        )
        if key not in self.known:
            self.known[key] = tuple(self._write(i, action, following))
        return self.known[key]

    def _write(self, i: int, action: Action, following: Boundary | None) -> list[Event]:
        place, builder = self.place, self.builder
        needed = place.receives(action)
        if needed is not None:
            if i == 0:
                builder.events.append(self._recv(needed))
            builder.events.append(Wait("compute", (f"recv_{needed}", 0)))
        if following is not None:
            builder.events.append(self._recv(following))
        builder.run_visits(
            self.visits[action.direction, action.chunk], i in self.firsts, i in self.lasts, self._send(action, i)
        )
        events, builder.events = builder.events, []
        return events

    def _recv(self, what: Boundary) -> Recv:
        offset = self.place.offset(what, self.stride, to=False)
        return Recv(what, self.place.boundary_bytes, offset, (f"recv_{what}", 0))

    def _send(self, action: Action, i: int) -> list[Event]:
        what = self.place.sends(action)
        if what is None:
            return []
        before = [] if i in self.first_sends else self._drop(what)
        offset = self.place.offset(what, self.stride, to=True)
        return [*before, Send(what, self.place.boundary_bytes, offset, (f"send_{what}", 0))]

    def _drop(self, what: Boundary) -> list[Event]:
        return [Wait("compute", (f"send_{what}", 0)), Sent(what, self.place.boundary_bytes)]

    def _end(self) -> list[Event]:
        """The last messages have arrived; tied embeddings have the gradients of both their stages."""
        events = [event for i in sorted(self.first_sends) for event in self._drop(self.place.sends(self.order[i]))]  # type: ignore[arg-type]
        return events + self.builder.sum_late_gradients(Span(2, (self.place.pp - 1) * self.stride))
