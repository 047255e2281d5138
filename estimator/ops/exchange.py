"""Rows of experts on their way between ranks, as ``runtime.parallel.experts`` sends them: to the ranks that hold their experts, and
back (Lepikhin et al. 2021, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.experts import Experts
from estimator.job.mesh import Span
from estimator.ops.graph import Graph
from estimator.ops.operator import Op
from estimator.ops.tape import Node, Ref

COUNT_BYTES = 8
"""Of the number of rows that go to an expert."""
_CAT_RUNS = 128
"""Runs of rows that one launch puts together (torch's ``cat``)."""


class ExpertRanks(NamedTuple):
    """Which ranks share the experts of a layer: each holds equally many, of consecutive numbers."""

    span: Span = Span(1)
    imbalance: float = 1.0
    """Rows that come to this rank, over the mean of all; dropless only."""

    @property
    def size(self) -> int:
        return self.span.size

    def rows(self, experts: Experts, n_tokens: int) -> int:
        """Rows of the buffers in which the rows of this rank's experts lie, from all ranks with ``n_tokens`` each."""
        n = experts.slots(n_tokens)
        return n if experts.capacity(n_tokens) else experts.arriving(n, self.imbalance)


def to_experts(g: Graph, rows: Ref, width: int, experts: Experts, ranks: ExpertRanks) -> Ref:
    """From this rank's slots of all experts to all ranks' slots of this rank's experts."""
    return _exchange(g, rows, width, experts, ranks, to_experts=True)


def to_tokens(g: Graph, rows: Ref, width: int, experts: Experts, ranks: ExpertRanks) -> Ref:
    """The way back."""
    return _exchange(g, rows, width, experts, ranks, to_experts=False)


def _exchange(g: Graph, rows: Ref, width: int, experts: Experts, ranks: ExpertRanks, *, to_experts: bool) -> Ref:
    """``g.rows`` is tokens. What comes lies rank by rank and is put together expert by expert, or the other way round, unless a rank
    holds one expert. Messages count as many bytes as the larger of what a rank sends and receives."""
    row_bytes, n_tokens = width * g.width, g.rows
    here, there = experts.slots(n_tokens), ranks.rows(experts, n_tokens)
    nobodys = 1 if experts.capacity(n_tokens) else 0
    sent_bytes = (max(here, there) - nobodys) * row_bytes
    turned_bytes = (there - nobodys) * row_bytes if ranks.size < experts.n_experts else 0

    def ops(*, backward: bool) -> tuple[Op, ...]:
        sending = _all_to_all(g, ranks, sent_bytes, backward=backward)
        if not turned_bytes:
            return (sending,)
        launches = 1 if nobodys else -(-experts.n_experts // _CAT_RUNS)
        turning = Op("turn_rows", "elementwise", backward, g.dtype, 0.0, 2 * turned_bytes, launches=launches)
        return (sending, turning) if to_experts != backward else (turning, sending)

    forward = ops(backward=False)
    if to_experts and not nobodys:
        counts = _all_to_all(g, ranks, COUNT_BYTES * experts.n_experts, backward=False)
        forward = (counts, *forward)
    return g.record(
        Node(
            (rows,),
            (g.tensor((there if to_experts else here) * row_bytes),),
            forward=forward,
            backward=ops(backward=True),
            forward_temp_bytes=turned_bytes,
            backward_temp_bytes=turned_bytes,
        )
    )


def _all_to_all(g: Graph, ranks: ExpertRanks, n_bytes: int, *, backward: bool) -> Op:
    return Op("all_to_all", "collective", backward, g.dtype, 0, n_bytes, (0,), span=ranks.span)
