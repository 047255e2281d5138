"""Seconds of one collective from the constants of a profile (``LinkModel``), algorithm by algorithm.

Every way is ``T = a + s + 2 p sqrt(a s)`` with latency ``a`` (a floor, and hops of the algorithm), transfer time ``s`` and the weight
``p`` of the cross term. With p = 1 that is ``(sqrt(a) + sqrt(s))^2``, the optimum of a chunked pipeline whose chunks each pay a
share of the latency (van de Geijn & Watts 1997); published curves lie between 0.1 and 0.45. The fastest way is taken, as NCCL's
tuner does (``src/graph/tuning.cc``, from which hops and the protocols' limits are).

- ``ring``: every rank moves ``bytes (N - 1) / N`` (all-reduce: twice that) in as many hops. All rings of a node leave through all its
  links, so a node's boundary carries one ring's traffic over all its links.
- ``tree``: sums inside nodes, then over a tree of nodes, and back: ``2 (n - 1) / n`` of the bytes leave a node, with latency that
  grows with log2 of the nodes. Broadcast goes down half of it.
- ``in_switch``: the node's switch adds up (NVLS): more bandwidth, and a latency per rank that is less than a ring's.
- ``pat``: all-gather and reduce-scatter where every node has one rank: logarithmic steps beside a small one per rank.
- ``two_level`` (``Network.hierarchical``): across nodes and inside them at once.
- ``pairs``: all-to-all and point-to-point, every rank to each other directly, with a set-up per peer.

Three protocols carry a ring or tree: ``low_latency`` (a flag with every word: half the bandwidth, and a limit per architecture),
``ll128`` (a flag per 128 bytes, only where no PCIe is on the way) and ``simple``.
"""

from __future__ import annotations

from math import ceil, log2, sqrt
from typing import Literal, NamedTuple

from estimator.job.cluster import Cluster
from estimator.time.profile import LinkModel

NetworkOp = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send_recv"]

SHARE = {"low_latency": 0.5, "ll128": 120 / 128, "simple": 1.0}
"""Of the bandwidth that carries data and not flags."""
LOW_LATENCY_BYTES_PER_S = {
    "volta": (39e9, 39e9, 20.4e9), "ampere": (87.7e9, 22.5e9, 19e9), "hopper": (141e9, 45e9, 35e9),
    "blackwell": (282e9, 90e9, 70e9),
}  # fmt: skip
"""Bus bandwidth that the low-latency protocol never exceeds, on one, two and more nodes (NCCL ``llMaxBws``); others: as Ampere."""
PAT_STEP_S, PAT_RANK_S, PAT_BASE_S = 4e-6, 2.8e-6, 8e-6
"""NCCL ``tuning.cc``: base + log2(nodes) x network hop / 3.5 + ranks x 2.8 us."""
NVLS_TREE_HOP_S = 20.9e-6
"""Network hop of in-switch sums across nodes (NCCL ``tuning.cc``, NVLS tree)."""
SOCKET_RANKS = 4
"""GPUs behind one socket of a PCIe server."""


class Placement(NamedTuple):
    """Where a group's ranks are."""

    group_size: int
    per_node: int
    """Ranks that the fast links join (a node's, or an NVLink domain's)."""
    n_nodes: int
    extent: int = 0
    """GPUs between a node's first and last rank of the group, both counted; 0: as many as ranks."""
    node_stride: int = 1
    """Nodes from one of the group's to the next."""


class Way(NamedTuple):
    """One way to do a collective."""

    algorithm: str
    protocol: str
    seconds: float


class Bandwidths(NamedTuple):
    """Bytes/s."""

    intra: float
    """Of one rank inside its node."""
    inter: float
    """Out of a node, of all the group's ranks in it together, for traffic from node to node along a chain or tree."""
    nic: float
    """Of one rank out of its node, below a leaf switch."""
    spine: float
    """Of one rank beyond its leaf switch when all ranks send there."""


def ways(op: NetworkOp, n_bytes: float, place: Placement, cluster: Cluster, link: LinkModel) -> list[Way]:
    """Every way of ``op`` of ``n_bytes`` (the full tensor; ``send_recv``: the message) over ``place``, with its seconds."""
    rate = bandwidths(place, cluster, link)
    model = _Model(place, cluster, link, rate)
    if op in ("all_to_all", "send_recv"):
        return model.pairs(op, n_bytes)
    found = model.ring(op, n_bytes)
    if op in ("all_reduce", "broadcast"):
        return found + model.tree(op, n_bytes) + model.in_switch(op, n_bytes)
    if place.per_node == 1:
        found += model.pat(n_bytes)
    if cluster.network.hierarchical and place.n_nodes > 1 < place.per_node:
        found += model.two_level(n_bytes)
    return found


def bandwidths(place: Placement, cluster: Cluster, link: LinkModel) -> Bandwidths:
    """What ``place`` has of each level.

    Along chains and trees a leaf switch is left once by each of the groups that share it (consecutive nodes: one), so that
    oversubscription only counts when it exceeds the nodes per group under a leaf.
    """
    gpu, network = cluster.gpu, cluster.network
    extent = max(place.per_node, place.extent)
    efficiency = link.ring_efficiency
    if gpu.link_kind == "pcie" and extent <= SOCKET_RANKS and link.socket_efficiency:
        efficiency = link.socket_efficiency
    intra = efficiency * gpu.link_bytes_per_s
    if gpu.link_kind == "mesh" and cluster.gpus_per_domain > 1:
        intra *= min(1.0, max(1, place.per_node - 1) / (cluster.gpus_per_domain - 1))
    nic = link.inter_efficiency * cluster.internode_bytes_per_s
    leaf = leaf_nodes(cluster)
    share = 1.0
    if place.n_nodes > max(1, leaf // place.node_stride):
        share = min(1.0, leaf / (network.oversubscription * min(place.node_stride, leaf)))
    return Bandwidths(intra, nic * share * place.per_node, nic, nic / network.oversubscription)


def leaf_nodes(cluster: Cluster) -> int:
    """Nodes (NVLink domains) under one leaf switch; a number beyond all where nothing crosses a spine."""
    under = cluster.network.nodes_per_leaf * cluster.gpus_per_node // cluster.gpus_per_domain
    return max(1, under) if cluster.network.nodes_per_leaf else 1 << 40


class _Model(NamedTuple):
    place: Placement
    cluster: Cluster
    link: LinkModel
    rate: Bandwidths

    def ring(self, op: NetworkOp, n_bytes: float) -> list[Way]:
        n, n_nodes = self.place.group_size, self.place.n_nodes
        narrow = self.rate.inter if self.place.per_node == 1 else min(self.rate.intra, self.rate.inter)
        bandwidth = self.rate.intra if n_nodes == 1 else narrow
        rounds = 2 if op == "all_reduce" else 1
        moved = n_bytes if op == "broadcast" else rounds * n_bytes * (n - 1) / n
        outer = n_nodes if n_nodes > 1 else 0
        hops = (rounds * max(0, n - 1 - outer), rounds * outer)
        return self._by_protocol("ring", hops, moved / bandwidth, moved)

    def tree(self, op: NetworkOp, n_bytes: float) -> list[Way]:
        p, n_nodes = self.place.per_node, self.place.n_nodes
        rounds = 2 if op == "all_reduce" else 1
        part = 1.0 if op == "broadcast" else rounds * (p - 1) / p
        inner_s = part * n_bytes / self.rate.intra if p > 1 else 0.0
        hops = (rounds * (p - 1), rounds * log2(n_nodes) if n_nodes > 1 else 0)
        wire_s = max(inner_s, self._outer_s(op, n_bytes))
        moved = rounds * n_bytes * (self.place.group_size - 1) / self.place.group_size
        return self._by_protocol("tree", hops, wire_s, moved)

    def in_switch(self, op: NetworkOp, n_bytes: float) -> list[Way]:
        link, p = self.link, self.place.per_node
        if p < link.in_switch_min_ranks or p == 1:
            return []
        rate = self.rate.intra * link.in_switch_factor
        if op == "broadcast":  # the root's link carries everything once
            inner_s = n_bytes / min(rate, self.cluster.gpu.link_bytes_per_s)
        else:
            inner_s = 2.0 * n_bytes * (p - 1) / p / rate
        wire_s = max(inner_s, self._outer_s(op, n_bytes))
        across_s = 2 * log2(self.place.n_nodes) * NVLS_TREE_HOP_S if self.place.n_nodes > 1 else 0.0
        return [self._way("in_switch", "simple", p * link.in_switch_rank_s + across_s, wire_s)]

    def _outer_s(self, op: NetworkOp, n_bytes: float) -> float:
        """Transfer between nodes of a tree; where network switches add up, a node sends its sum once and gets the total once."""
        n_nodes = self.place.n_nodes
        if n_nodes == 1:
            return 0.0
        rounds = 1.0 if op == "broadcast" else 2.0 * (n_nodes - 1) / n_nodes
        if self.cluster.network.in_network_reduction:
            rounds = 1.0
        return rounds * n_bytes / self.rate.inter

    def pat(self, n_bytes: float) -> list[Way]:
        n = self.place.group_size
        latency_s = PAT_BASE_S + log2(n) * PAT_STEP_S + n * PAT_RANK_S
        return [self._way("pat", "simple", latency_s, n_bytes * (n - 1) / n / self.rate.inter)]

    def two_level(self, n_bytes: float) -> list[Way]:
        p, n_nodes = self.place.per_node, self.place.n_nodes
        inner_s = n_bytes * (p - 1) / p / self.rate.intra
        outer_s = n_bytes * (n_nodes - 1) / n_nodes / self.rate.inter
        return self._by_protocol("two_level", (p - 1, n_nodes - 1), max(inner_s, outer_s), n_bytes)

    def pairs(self, op: NetworkOp, n_bytes: float) -> list[Way]:
        """To all others at once (NCCL's grouped sends and receives), or from one rank to another."""
        n, p, rate, network = self.place.group_size, self.place.per_node, self.rate, self.cluster.network
        part = n_bytes / n if op == "all_to_all" else n_bytes
        within, beyond = (p - 1, n - p) if op == "all_to_all" else (int(p > 1), int(p == 1))
        under_leaf = p * min(self.place.n_nodes, max(1, leaf_nodes(self.cluster) // self.place.node_stride))
        far = max(0, n - under_leaf)
        forwarded = part * beyond * (p - 1) / p if network.rail_optimized else 0.0
        within_s = (part * within + forwarded) / rate.intra
        beyond_s = max(part * beyond / rate.nic, part * far / rate.spine) if beyond else 0.0
        peers_s = (within + beyond) * self.link.peer_s
        return self._by_protocol("pairs", (0.0, float(beyond > 0)), max(within_s, beyond_s), n_bytes, peers_s)

    def _by_protocol(
        self, algorithm: str, hops: tuple[float, float], wire_s: float, moved: float, setup_s: float = 0.0
    ) -> list[Way]:
        """With every protocol that the machine has; ``moved`` bytes at most at the low-latency protocol's limit."""
        link, found = self.link, []
        for protocol in link.intra_hop_s.keys() & link.inter_hop_s.keys():
            if protocol == "ll128" and self.cluster.gpu.link_kind == "pcie":
                continue
            transfer_s = wire_s / SHARE[protocol]
            if protocol == "low_latency":
                limits = LOW_LATENCY_BYTES_PER_S.get(self.cluster.gpu.arch, LOW_LATENCY_BYTES_PER_S["ampere"])
                transfer_s = max(transfer_s, moved / limits[min(self.place.n_nodes, 3) - 1])
            latency_s = setup_s + hops[0] * link.intra_hop_s[protocol] + hops[1] * link.inter_hop_s[protocol]
            found.append(self._way(algorithm, protocol, latency_s, transfer_s))
        return found

    def _way(self, algorithm: str, protocol: str, latency_s: float, transfer_s: float) -> Way:
        crosses = self.place.n_nodes > 1
        latency_s += self.link.launch_s + (self.link.inter_floor_s if crosses else 0.0)
        weight = self.link.node_pipelining if crosses else self.link.pipelining
        return Way(algorithm, protocol, latency_s + transfer_s + 2.0 * weight * sqrt(latency_s * transfer_s))


def placement(group_size: int, per_node: int, extent: int = 0, node_stride: int = 1) -> Placement:
    """``group_size`` ranks, ``per_node`` of them (or all, where there are fewer) in a node."""
    per_node = max(1, min(per_node, group_size))
    return Placement(group_size, per_node, ceil(group_size / per_node), extent, node_stride)
