"""Expert parallelism: data ranks that share the experts of every layer (Lepikhin et al. 2021, section 3.3).

Each holds equally many experts, of consecutive numbers. The rows of a rank's slots go to the ranks of their experts, and what
these make of them comes back. With a capacity every rank sends every other as many rows. Dropless the router decides: ranks
tell each other how many rows come, in one small message, and the host waits for it.
Shapes: n ranks, E experts, N slots of this rank, R rows of this rank's experts from all ranks, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from estimator.errors import InputError
from estimator.job.experts import Experts
from estimator.job.mesh import Span
from estimator.job.strategy import Strategy
from estimator.sharding.units import Split
from runtime.comm import Communicator
from runtime.context import has_data, managed_memory
from runtime.kernels import loader
from runtime.parallel.started import started
from runtime.parallel.waiting import Waiting

if TYPE_CHECKING:
    from runtime.models.routing import Plan


class Trip(NamedTuple):
    """How the rows of one micro-batch go to experts and back."""

    bounds: list[int] | None
    """Places among the rows at the experts where each one's begin, and the end; ``None``: all have equally many (a capacity), and
    one row more is nobody's, here and there."""
    n_slots: int
    """N."""
    arriving: tuple[tuple[int, ...], ...] = ()
    """Rows from each rank for each of this rank's experts."""
    leaving: tuple[int, ...] = ()
    """Rows to each rank."""

    @property
    def n_arriving(self) -> int:
        """Rows at the experts, nobody's included."""
        return sum(map(sum, self.arriving)) + (self.bounds is None)

    @property
    def turns(self) -> bool:
        """Rows come rank by rank, and are put together expert by expert."""
        return len(self.arriving[0]) > 1

    @property
    def sizes(self) -> tuple[list[int], list[int]] | None:
        """Rows from each rank, and to each; ``None``: all equally many."""
        return None if self.bounds is None else (list(map(sum, self.arriving)), list(self.leaving))

    def of_experts(self, buffer: Tensor) -> Tensor:
        """Rows of ``buffer`` that are somebody's."""
        return buffer if self.bounds is not None else buffer[:-1]


class WholeExperts(Waiting):
    """All experts of every layer."""

    size = 1

    def split(self, n_experts: int) -> Split | None:
        """How ranks share a parameter ``[E, ...]``."""
        return None

    def trip(self, plan: Plan, experts: Experts) -> Trip:
        """Of the rows that lie as ``plan`` says. On a GPU the host waits for the router here, unless there is a capacity."""
        return Trip(None if plan.ends is None else bounds_of(plan.ends, plan.n_slots), plan.n_slots)

    def to_experts(self, rows: Tensor, trip: Trip) -> Tensor:
        """Slots of this rank ``[N, D]`` to rows of this rank's experts ``[R, D]``, expert by expert and for each rank by rank."""
        return rows

    def to_tokens(self, rows: Tensor, trip: Trip) -> Tensor:
        """What the experts have made of them, ``[R, D]``, back to the slots ``[N, D]``."""
        return rows


def bounds_of(ends: Tensor, n_rows: int) -> list[int]:
    """Where the rows of each expert begin, and the end.

    Without data (``meta``, ``FakeTensor``) nobody knows: rows are split evenly, which no size of a buffer depends on.
    """
    return [0, *(ends.tolist() if has_data(ends) else accumulate(_even(n_rows, len(ends))))]


def _even(n: int, parts: int) -> list[int]:
    return [n * (i + 1) // parts - n * i // parts for i in range(parts)]


class ExpertParallel(WholeExperts):
    """The experts of one of ``ep`` ranks."""

    def __init__(self, comm: Communicator, ep: int, imbalance: float = 1.0) -> None:
        """``imbalance``: what dropless ranks without data, which have no router to ask, take for ``Strategy.expert_imbalance``."""
        if comm.mesh.n_data % ep:
            raise InputError(f"ep is {ep}; allowed: a divisor of the {comm.mesh.n_data} data-parallel GPUs")
        self.comm, self.imbalance = comm, imbalance
        self.span: Span = comm.mesh.data_groups(ep)
        self.size, self.place = ep, self.span.place(comm.rank)
        comm.join_span("experts", self.span)

    def split(self, n_experts: int) -> Split:
        if n_experts % self.size:
            raise InputError(f"ep is {self.size}; allowed: a divisor of the model's {n_experts} experts")
        return Split(0, n_experts, "ep")

    def trip(self, plan: Plan, experts: Experts) -> Trip:
        n_here = experts.n_experts // self.size
        if plan.ends is None:
            each = (plan.n_slots - 1) // experts.n_experts
            return Trip(None, plan.n_slots, ((each,) * n_here,) * self.size, (each * n_here,) * self.size)
        counts = F.pad(plan.ends[:-1], (1, 0)).sub_(plan.ends).neg_()
        came = torch.empty_like(counts)
        self._exchange(came, counts)
        if has_data(counts):
            leaving, arriving = torch.stack((counts, came)).tolist()
        else:
            leaving = _even(plan.n_slots, experts.n_experts)
            arriving = _even(experts.arriving(plan.n_slots, self.imbalance), experts.n_experts)
        of_ranks = tuple(tuple(arriving[i : i + n_here]) for i in range(0, len(arriving), n_here))
        of_experts = (sum(rows) for rows in zip(*of_ranks, strict=True))
        sent = tuple(sum(leaving[i : i + n_here]) for i in range(0, len(leaving), n_here))
        return Trip([0, *accumulate(of_experts)], plan.n_slots, of_ranks, sent)

    def to_experts(self, rows: Tensor, trip: Trip) -> Tensor:
        return _exchange(rows, trip, self.bring, self.take_back)  # type: ignore[no-any-return]

    def to_tokens(self, rows: Tensor, trip: Trip) -> Tensor:
        return _exchange(rows, trip, self.take_back, self.bring)  # type: ignore[no-any-return]

    # ---- between ranks --------------------------------------------------------------------------------------------

    def bring(self, rows: Tensor, trip: Trip) -> Tensor:
        """``[R, D]`` of ``rows`` ``[N, D]``."""
        out, body = _room(rows, trip.n_arriving, trip)
        came = torch.empty_like(body) if trip.turns else body
        self._exchange(came, trip.of_experts(rows), trip.sizes)
        if trip.turns:
            _turn(came, trip.arriving, body)
        return out

    def take_back(self, rows: Tensor, trip: Trip) -> Tensor:
        """``[N, D]`` of ``rows`` ``[R, D]``."""
        out, body = _room(rows, trip.n_slots, trip)
        leaving = trip.of_experts(rows)
        if trip.turns:
            leaving = torch.empty_like(leaving)
            _turn(trip.of_experts(rows), tuple(zip(*trip.arriving, strict=True)), leaving)
        self._exchange(body, leaving, None if trip.sizes is None else trip.sizes[::-1])
        return out

    def _exchange(self, received: Tensor, sent: Tensor, sizes: tuple[list[int], list[int]] | None = None) -> None:
        """``sizes``: rows from and to each rank, where they need not be equally many."""
        with managed_memory():
            work = started(
                lambda came, own: self.comm.all_to_all(came, own, self.span, "experts", sizes), received, sent
            )
        self.wait(work)


def _room(like: Tensor, n_rows: int, trip: Trip) -> tuple[Tensor, Tensor]:
    """A buffer of ``n_rows``, and that of it which is to be filled; what is nobody's is zero."""
    out = like.new_empty(n_rows, like.shape[1])
    body = trip.of_experts(out)
    if trip.bounds is None:
        out[-1].zero_()
    return out, body


def _turn(rows: Tensor, sizes: Sequence[Sequence[int]], out: Tensor) -> None:
    """``rows`` lie in runs, one for each of ``sizes`` in their order; in ``out`` the second number of a run counts before the first."""
    outer, inner = len(sizes), len(sizes[0])
    runs = rows.split([n for of_one in sizes for n in of_one])
    torch.cat([runs[i * inner + j] for j in range(inner) for i in range(outer)], out=out)


Way = Callable[[Tensor, Trip], Tensor]


class _Exchange(torch.autograd.Function):
    """``rows`` go ``there``; their gradients come ``back``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip, there: Way, back: Way) -> Tensor:
        ctx.trip, ctx.back = trip, back
        return there(rows, trip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0], ctx.trip), None, None, None


_exchange = loader.outside_compile(_Exchange.apply)


def experts_for(strategy: Strategy, comm: Communicator) -> WholeExperts:
    """How ``comm``'s ranks share experts as ``strategy`` says."""
    return ExpertParallel(comm, strategy.ep, strategy.expert_imbalance) if strategy.ep > 1 else WholeExperts()


def check_shared_by(ranks: WholeExperts, strategy: Strategy) -> None:
    """Raises ``InputError`` unless a model whose experts ``ranks`` share is what ``strategy`` wants."""
    if strategy.ep != ranks.size:
        raise InputError(
            f"ep is {strategy.ep}; the model was made for {ranks.size}, allowed: that, or a model made with layers that have experts = "
            "runtime.parallel.experts.experts_for(...)"
        )
