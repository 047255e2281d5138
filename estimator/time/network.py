"""Seconds of collectives over N ranks placed on nodes, from measured points or from constants (``estimator.time.collectives``)."""

from __future__ import annotations

from math import log

from estimator.errors import InputError
from estimator.job.cluster import Cluster
from estimator.job.job import Job
from estimator.job.mesh import Span
from estimator.time.collectives import NetworkOp, Way, placement, ways
from estimator.time.operators import curve_seconds, seconds_curve
from estimator.time.profile import CollectivePoint, HardwareProfile


def timer_over(span: Span | None, job: Job, profile: HardwareProfile, dtype: str) -> CollectiveTimer:
    """For collectives of ``job`` over ``span`` (``None``: all its ranks); nodes are consecutive ranks."""
    span, domain = span or Span(job.cluster.n_gpus), job.cluster.gpus_per_domain
    return CollectiveTimer(job.cluster, profile, span.size, domain // span.stride, dtype, stride=span.stride)


class CollectiveTimer:
    """Seconds of collectives over ``group_size`` ranks, ``stride`` apart and ``per_node`` of them in a node (an NVLink domain).

    Equal ones are timed once.
    """

    def __init__(
        self,
        cluster: Cluster,
        profile: HardwareProfile,
        group_size: int,
        per_node: int,
        dtype: str = "",
        *,
        stride: int = 1,
    ) -> None:
        self.cluster, self.profile, self.dtype = cluster, profile, dtype
        node_stride = max(1, stride // cluster.gpus_per_domain)
        within = max(1, min(per_node, group_size))
        self.place = placement(group_size, per_node, (within - 1) * stride + 1, node_stride)
        self.group_size, self.per_node, self.n_nodes = self.place.group_size, self.place.per_node, self.place.n_nodes
        self._known: dict[tuple[str, int], float] = {}

    def seconds(self, op: NetworkOp, n_bytes: int) -> float:
        """``n_bytes`` is the full (unsharded) tensor, the message of a ``send_recv``. Zero bytes or a group of one cost nothing."""
        if n_bytes <= 0 or self.group_size <= 1:
            return 0.0
        known = self._known.get((op, n_bytes))
        if known is None:
            measured = self._measured_here()
            known = self._interpolated(op, n_bytes, measured) if measured else self._modelled(op, n_bytes)
            self._known[op, n_bytes] = known
        return known

    def through_servers(self, n_bytes: int, n_servers: int) -> float:
        """Of ``n_bytes`` every server takes its part from each rank, or gives it to each, rank by rank: its link carries what it
        would in an all-to-all of ``group_size / n_servers`` times as much."""
        return self.seconds("all_to_all", n_bytes * self.group_size // n_servers)

    def _measured_here(self) -> tuple[CollectivePoint, ...]:
        """Measured points of groups placed like this one: inside a node or across nodes, whose networks say nothing of each other."""
        if not self.profile.is_measured:
            return ()
        return tuple(p for p in self.profile.collectives if (p.n_nodes > 1) == (self.n_nodes > 1))

    # ---- from constants -------------------------------------------------------------------------------------------

    def ways(self, op: NetworkOp, n_bytes: float) -> list[Way]:
        """Every way that the constants know, the fastest first. Raises ``InputError`` for a profile without constants."""
        link = self.profile.link
        if link is None:
            raise InputError(
                f"profile {self.profile.name!r} has no collectives for {self.group_size} ranks; calibrate with more processes"
            )
        return sorted(ways(op, n_bytes, self.place, self.cluster, link), key=lambda way: way.seconds)

    def _modelled(self, op: NetworkOp, n_bytes: float) -> float:
        return self.ways(op, n_bytes)[0].seconds

    # ---- from measured points -------------------------------------------------------------------------------------

    def _interpolated(self, op: NetworkOp, n_bytes: int, points: tuple[CollectivePoint, ...]) -> float:
        """Log-log over bytes, then over group size. A size that was not measured takes the nearest one's seconds times
        what the constants say that the step between the two costs; without constants the nearest two sizes carry on.

        An operation that was not measured is made of those that were: an all-reduce of a reduce-scatter and an
        all-gather, and either of these takes half of an all-reduce (ring algorithms); an all-to-all takes an all-gather's
        time, in which as many bytes leave each rank, a broadcast too, and a message that of one over two ranks.
        """
        if op == "send_recv" and not any(p.op == op for p in points):
            return self._interpolated("all_gather", 2 * n_bytes, points)
        points = tuple(p for p in points if p.op == op) or self._substitute(op, points)
        if self.dtype and any(p.dtype == self.dtype for p in points):
            points = tuple(p for p in points if p.dtype == self.dtype)
        at: dict[int, float] = {}
        nodes_of: dict[int, int] = {}
        for size in sorted({p.group_size for p in points}):
            nodes_of[size] = min(
                {p.n_nodes for p in points if p.group_size == size}, key=lambda n: abs(n - self.n_nodes)
            )
            placed = (p for p in points if (p.group_size, p.n_nodes) == (size, nodes_of[size]))
            at[size] = curve_seconds(seconds_curve((p.bytes, p.seconds) for p in placed), n_bytes)
        if self.group_size in at or self.profile.link is None:
            return _over_group_size(list(at.items()), self.group_size)
        nearest = min(at, key=lambda size: (abs(log(size / self.group_size)), size))
        there = CollectiveTimer(self.cluster, self.profile, nearest, -(-nearest // nodes_of[nearest]))
        return at[nearest] * self._modelled(op, n_bytes) / there._modelled(op, n_bytes)

    def _substitute(self, op: NetworkOp, points: tuple[CollectivePoint, ...]) -> tuple[CollectivePoint, ...]:
        if op in ("all_to_all", "broadcast"):
            alike = tuple(p for p in points if p.op == "all_gather") or tuple(
                p for p in points if p.op == "reduce_scatter"
            )
            return alike or self._substitute("all_gather", points)
        whole = tuple(p._replace(seconds=p.seconds / 2) for p in points if p.op == "all_reduce")
        if op == "all_reduce" or not whole:
            have = ", ".join(sorted({p.op for p in points}))
            raise InputError(f"profile {self.profile.name!r} has no {op}; measured: {have}; calibrate again")
        return whole


def _over_group_size(at: list[tuple[int, float]], group_size: int) -> float:
    """Seconds at ``group_size`` from (size, seconds): log-log, the nearest two points carry on outside; one point holds."""
    if len(at) == 1:
        return at[0][1]
    i = next((i for i, (size, _) in enumerate(at) if size >= group_size), len(at) - 1)
    i = min(max(i, 1), len(at) - 1)
    (n0, t0), (n1, t1) = at[i - 1], at[i]
    t1 = max(t0, t1)
    return float(t0 * (t1 / t0) ** (log(group_size / n0) / log(n1 / n0)))
