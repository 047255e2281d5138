"""The passes of one pipeline rank as sections of its ``StepProgram``.

What a pass needs from another rank is received one pass ahead: room is made, and the transfer may begin, before the pass
that goes before it computes. What a pass has sent lives until the same rank has more to send of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from estimator.job.mesh import Span
from estimator.job.strategy import Strategy
from estimator.schedule.events import Boundary, Event, Recv, Section, Send, Sent, Wait
from estimator.schedule.pipeline import Action, fewest, orders, periods

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

    def alike(self) -> PipelinePlace:
        """The first place whose rank exchanges the same things: ranks between the first and the last only differ in their order."""
        return self if self.rank == 0 or self.is_last else self._replace(rank=1)

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


class StageWriter:
    """Writes the passes of pipeline ranks that hold alike units, of which ``builder`` is and whose ``place`` is alike; equal passes
    are one object, whichever of them they are of."""

    def __init__(self, builder: _Builder, place: PipelinePlace) -> None:
        self.builder, self.place = builder, place
        self.stride = builder.mesh.span("pp").stride
        self.known: dict[tuple[object, ...], tuple[Event, ...]] = {}
        self.visits = {}
        for number, chunk in enumerate(place.chunks):
            turns = [visit for visit in builder.visits if visit.unit in chunk]
            backward = [visit for visit in turns if visit.phase == "backward"]
            self.visits["forward", number] = [visit for visit in turns if visit.phase != "backward"]
            for way in ("backward", "input_grad", "weight_grad"):
                self.visits[way, number] = [visit._replace(phase=way) for visit in backward]  # type: ignore[arg-type]

    def sections(self, rank: int, n_micro_batches: int) -> list[Section]:
        """Sections of all passes of one step of ``rank``: those that repeat once with their count, what lies between them once."""
        schedule, pp, chunks = self.builder.strategy.pp_schedule, self.place.pp, len(self.place.chunks)
        n, left_out = fewest(schedule, pp, chunks, n_micro_batches)
        self._begin(orders(schedule, pp, chunks, n)[rank])
        sections: list[Section] = []
        at = 0
        for start, length, repeat in periods(schedule, pp, chunks, n)[rank]:
            sections.append(self._section(range(at, start)))
            sections.append(self._section(range(start, start + length), repeat + left_out))
            at = start + length * repeat
        return [*sections, self._section(range(at, len(self.order)), is_end=True)]

    def _begin(self, order: Sequence[Action]) -> None:
        self.order = order
        kinds = [(action.direction, action.chunk) for action in order]
        lasts = {kind: i for i, kind in enumerate(kinds)}
        firsts = {kind: kinds.index(kind) for kind in lasts}
        self.firsts, self.lasts = set(firsts.values()), set(lasts.values())
        self.sending = {kind: self.place.sends(order[first]) for kind, first in firsts.items()}
        self.receiving = {kind: self.place.receives(order[first]) for kind, first in firsts.items()}
        sent: dict[Boundary, int] = {}
        for kind, first in firsts.items():
            if (what := self.sending[kind]) is not None:
                sent[what] = min(first, sent.get(what, first))
        self.first_sends = set(sent.values())
        self.following = [*(self.receiving[kind] for kind in kinds[1:]), None]
        """What the pass after each receives."""
        self.keys: list[tuple[object, ...]] = list(zip(kinds, self.following, strict=True))
        """By pass: what tells it from other ones."""
        for i in {0, *self.firsts, *self.lasts, *self.first_sends}:
            self.keys[i] += (i == 0, i in self.firsts, i in self.lasts, i in self.first_sends)

    def _section(self, which: range, repeat: int = 1, *, is_end: bool = False) -> Section:
        passes = [self._pass(i) for i in which]
        if is_end:
            passes.append(self._end())
        return Section("micro_batch", tuple(chain.from_iterable(passes)), repeat, tuple(passes))

    def _pass(self, i: int) -> tuple[Event, ...]:
        key = self.keys[i]
        if key not in self.known:
            self.known[key] = tuple(self._write(i))
        return self.known[key]

    def _write(self, i: int) -> list[Event]:
        builder, action, following = self.builder, self.order[i], self.following[i]
        needed = self.receiving[action.direction, action.chunk]
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
        what = self.sending[action.direction, action.chunk]
        if what is None:
            return []
        before = [] if i in self.first_sends else self._drop(what)
        offset = self.place.offset(what, self.stride, to=True)
        return [*before, Send(what, self.place.boundary_bytes, offset, (f"send_{what}", 0))]

    def _drop(self, what: Boundary) -> list[Event]:
        return [Wait("compute", (f"send_{what}", 0)), Sent(what, self.place.boundary_bytes)]

    def _end(self) -> tuple[Event, ...]:
        """The last messages have arrived; tied embeddings have the gradients of both their stages."""
        sent = tuple(self.place.sends(self.order[i]) for i in sorted(self.first_sends))
        if sent not in self.known:
            span = Span(2, (self.place.pp - 1) * self.stride)
            drops = [event for what in sent for event in self._drop(what)]  # type: ignore[arg-type]
            self.known[sent] = (*drops, *self.builder.sum_late_gradients(span))
        return self.known[sent]
