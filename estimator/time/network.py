"""Seconds of collectives over N ranks, placed on nodes of ``gpus_per_node`` with one network link per GPU.

From constants (``LinkModel``): ``T = a + s + 2 p sqrt(a s)`` with latency ``a``, transfer time ``s`` and the weight
``p`` of the cross term. With p = 1 that is ``(sqrt(a) + sqrt(s))^2``, the optimum of a chunked pipeline whose chunks
each pay a share of the latency (van de Geijn & Watts 1997); published curves lie between p = 0.25 and p = 0.65.

Ring: every rank moves ``bytes * (N - 1) / N`` (all-reduce: twice that). All rings of a node leave through all its
links, so a node's boundary carries one ring's traffic over ``gpus_per_node`` links. All-reduce may instead reduce
inside nodes first (in the switch where there is one) and send ``2 (n - 1) / n`` of each rank's part between nodes,
with latency that grows with log2 of the nodes (NCCL's tree and NVLS algorithms). The faster way is taken, and of the
two protocols (NCCL ``src/graph/tuning.cc``: low latency at half the bandwidth, or simple) too.
"""

from __future__ import annotations

from math import log, log2, sqrt

from estimator.errors import InputError
from estimator.job.cluster import Cluster
from estimator.job.job import Job
from estimator.job.mesh import Span
from estimator.schedule.events import CollectiveOp
from estimator.time.operators import curve_seconds, seconds_curve
from estimator.time.profile import CollectivePoint, HardwareProfile, LinkModel

LOW_LATENCY_BANDWIDTH = 0.5
"""The low-latency protocol sends a flag with every word of data (NCCL ``tuning.cc``)."""


def timer_over(span: Span | None, job: Job, profile: HardwareProfile, dtype: str) -> CollectiveTimer:
    """For collectives of ``job`` over ``span`` (``None``: all its ranks); nodes are consecutive ranks."""
    span = span or Span(job.cluster.n_gpus)
    return CollectiveTimer(job.cluster, profile, span.size, job.cluster.gpus_per_node // span.stride, dtype)


class CollectiveTimer:
    """Seconds of collectives over ``group_size`` ranks, ``per_node`` of them in a node. Equal ones are timed once."""

    def __init__(
        self, cluster: Cluster, profile: HardwareProfile, group_size: int, per_node: int, dtype: str = ""
    ) -> None:
        self.cluster, self.profile, self.dtype = cluster, profile, dtype
        self.group_size, self.per_node = group_size, max(1, min(per_node, group_size))
        self.n_nodes = -(-group_size // self.per_node)
        self._known: dict[tuple[str, int], float] = {}

    def seconds(self, op: CollectiveOp, n_bytes: int) -> float:
        """``n_bytes`` is the full (unsharded) tensor. Zero bytes or a group of one cost nothing."""
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

    def _modelled(self, op: CollectiveOp, n_bytes: int) -> float:
        link = self.profile.link
        if link is None:
            raise InputError(
                f"profile {self.profile.name!r} has no collectives for {self.group_size} ranks; calibrate with more processes"
            )
        if op == "all_to_all":
            return self._pairwise(link, n_bytes)
        best = self._ring(link, op, n_bytes)
        return min(best, self._hierarchical(link, n_bytes)) if op == "all_reduce" else best

    def _bandwidths(self, link: LinkModel) -> tuple[float, float]:
        """Bytes/s inside a node (per rank) and out of a whole node."""
        intra = link.ring_efficiency * self.cluster.gpu.link_bytes_per_s
        return intra, link.inter_efficiency * self.cluster.internode_bytes_per_s * self.per_node

    def _ring(self, link: LinkModel, op: CollectiveOp, n_bytes: int) -> float:
        intra, inter = self._bandwidths(link)
        bandwidth = intra if self.n_nodes == 1 else inter if self.per_node == 1 else min(intra, inter)
        rounds = 2 if op == "all_reduce" else 1
        wire_s = rounds * n_bytes * (self.group_size - 1) / self.group_size / bandwidth
        outer = self.n_nodes if self.n_nodes > 1 else 0
        inner = self.group_size - 1 - outer if outer else self.group_size - 1
        hops = (rounds * max(0, inner), rounds * outer)
        return self._best_protocol(link, hops, wire_s)

    def _pairwise(self, link: LinkModel, n_bytes: int) -> float:
        """Every rank sends each other one its part directly, to all at once (NCCL's grouped sends and receives)."""
        intra, inter = self._bandwidths(link)
        within, beyond = self.per_node - 1, self.group_size - self.per_node
        within_s = n_bytes * within / self.group_size / intra
        beyond_s = n_bytes * beyond / self.group_size / (inter / self.per_node) if beyond else 0.0
        return self._best_protocol(link, (float(within > 0), float(beyond > 0)), max(within_s, beyond_s))

    def _hierarchical(self, link: LinkModel, n_bytes: int) -> float:
        intra, inter = self._bandwidths(link)
        if self.per_node >= link.in_switch_min_ranks:
            intra *= link.in_switch_factor
        inner_s = 2.0 * n_bytes * (self.per_node - 1) / self.per_node / intra if self.per_node > 1 else 0.0
        outer_s = 2.0 * n_bytes * (self.n_nodes - 1) / self.n_nodes / inter if self.n_nodes > 1 else 0.0
        hops = (2 * (self.per_node - 1), 2 * log2(self.n_nodes) if self.n_nodes > 1 else 0)
        return self._best_protocol(link, hops, max(inner_s, outer_s))

    def _best_protocol(self, link: LinkModel, hops: tuple[float, float], wire_s: float) -> float:
        floor = link.launch_s + (link.inter_floor_s if self.n_nodes > 1 else 0.0)
        best = float("inf")
        for protocol, share in (("simple", 1.0), ("low_latency", LOW_LATENCY_BANDWIDTH)):
            latency = floor + hops[0] * link.intra_hop_s[protocol] + hops[1] * link.inter_hop_s[protocol]
            transfer = wire_s / share
            best = min(best, latency + transfer + 2.0 * link.pipelining * sqrt(latency * transfer))
        return best

    # ---- from measured points -------------------------------------------------------------------------------------

    def _interpolated(self, op: CollectiveOp, n_bytes: int, points: tuple[CollectivePoint, ...]) -> float:
        """Log-log over bytes, then over group size. A size that was not measured takes the nearest one's seconds times
        what the constants say that the step between the two costs; without constants the nearest two sizes carry on.

        An operation that was not measured is made of those that were: an all-reduce of a reduce-scatter and an
        all-gather, and either of these takes half of an all-reduce (ring algorithms); an all-to-all takes an all-gather's
        time, in which as many bytes leave each rank.
        """
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

    def _substitute(self, op: CollectiveOp, points: tuple[CollectivePoint, ...]) -> tuple[CollectivePoint, ...]:
        if op == "all_to_all":
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
