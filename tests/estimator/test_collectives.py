"""The ways of a collective: numbers by hand, levels of the network, and what must never happen."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator import catalog
from estimator.job.cluster import Cluster
from estimator.job.network import Network
from estimator.time.collectives import Placement, bandwidths, placement, ways
from estimator.time.network import CollectiveTimer
from estimator.time.profile import HardwareProfile, LinkModel, profile_for

GIB = 1 << 30
LINK = LinkModel(
    ring_efficiency=0.8, inter_efficiency=0.9, in_switch_factor=1.25, in_switch_min_ranks=5, launch_s=20e-6,
    intra_hop_s={"low_latency": 1e-6, "ll128": 2e-6, "simple": 4e-6}, inter_hop_s={"low_latency": 3e-6, "ll128": 4e-6, "simple": 10e-6},
    inter_floor_s=30e-6, pipelining=0.0, node_pipelining=0.0, in_switch_rank_s=2e-6, derivation="by hand",
)  # fmt: skip
H100 = catalog.gpu("h100-sxm")
OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send_recv")


def cluster(n_nodes: int = 64, gpu: str = "h100-sxm", **network: object) -> Cluster:
    made = catalog.cluster(gpu, 8 * n_nodes, 8, internode_gbps=400)
    return replace(made, network=Network(**network))  # type: ignore[arg-type]


def seconds(
    op: str, n_bytes: float, group: int, per_node: int = 8, where: Cluster | None = None, **link: object
) -> float:
    found = ways(op, n_bytes, placement(group, per_node), where or cluster(), replace(LINK, **link))  # type: ignore[arg-type]
    return min(way.seconds for way in found)


def of(op: str, n_bytes: float, place: Placement, algorithm: str, protocol: str, where: Cluster | None = None) -> float:
    found = ways(op, n_bytes, place, where or cluster(), LINK)  # type: ignore[arg-type]
    return next(way.seconds for way in found if (way.algorithm, way.protocol) == (algorithm, protocol))


def test_rings_by_hand() -> None:
    """8 ranks in a node: 7/8 of the bytes at 0.8 x 450 GB/s, 7 hops; 16 on two: 15/16 at 0.9 x 8 x 50 GB/s, 13 + 2 hops."""
    inside = of("all_gather", GIB, placement(8, 8), "ring", "simple")
    assert inside == pytest.approx(GIB * 7 / 8 / 360e9 + 20e-6 + 7 * 4e-6)
    assert of("all_reduce", GIB, placement(8, 8), "ring", "simple") == pytest.approx(
        2 * GIB * 7 / 8 / 360e9 + 20e-6 + 14 * 4e-6
    )
    across = of("reduce_scatter", GIB, placement(16, 8), "ring", "simple")
    assert across == pytest.approx(GIB * 15 / 16 / 360e9 + 20e-6 + 30e-6 + 13 * 4e-6 + 2 * 10e-6)
    quick = of("all_gather", 8192, placement(8, 8), "ring", "low_latency")
    assert quick == pytest.approx(8192 * 7 / 8 / 141e9 + 20e-6 + 7e-6), "the low-latency protocol's own limit"
    cross = replace(LINK, pipelining=0.5)
    a, s = 20e-6 + 28e-6, GIB * 7 / 8 / 360e9
    found = ways("all_gather", GIB, placement(8, 8), cluster(), cross)
    assert next(w.seconds for w in found if w.protocol == "simple") == pytest.approx(a + s + sqrt(a * s))


def test_sums_in_switches_by_hand() -> None:
    inside = of("all_reduce", GIB, placement(8, 8), "in_switch", "simple")
    assert inside == pytest.approx(2 * GIB * 7 / 8 / (1.25 * 360e9) + 20e-6 + 16e-6)
    few = {way.algorithm for way in ways("all_reduce", GIB, placement(4, 4), cluster(), LINK)}
    assert few == {"ring", "tree"}, "too few ranks for the switch"
    tree = of("all_reduce", GIB, placement(64, 8), "tree", "simple")
    assert tree == pytest.approx(2 * 7 / 8 * GIB / 360e9 + 50e-6 + 14 * 4e-6 + 2 * 3 * 10e-6)
    sharp = of("all_reduce", GIB, placement(64, 8), "in_switch", "simple", cluster(in_network_reduction=True))
    bound = max(2 * GIB * 7 / 8 / 450e9, GIB / 360e9)
    assert sharp == pytest.approx(bound + 50e-6 + 16e-6 + 2 * 3 * 20.9e-6)


def test_two_levels_spare_the_long_ring() -> None:
    """512 ranks: a ring has 447 + 64 hops, two levels 7 + 63."""
    place = placement(512, 8)
    ring = of("all_gather", 1 << 20, place, "ring", "simple")
    two = of("all_gather", 1 << 20, place, "two_level", "simple", cluster(hierarchical=True))
    assert ring - two == pytest.approx((447 - 7) * 4e-6 + (64 - 63) * 10e-6, rel=0.05)
    assert not any(way.algorithm == "two_level" for way in ways("all_gather", GIB, place, cluster(), LINK))


def test_one_rank_per_node_goes_in_logarithmic_steps() -> None:
    found = {way.algorithm: way.seconds for way in ways("all_gather", 1 << 20, placement(64, 1), cluster(), LINK)}
    assert found["pat"] == pytest.approx(50e-6 + 8e-6 + 6 * 4e-6 + 64 * 2.8e-6 + (1 << 20) * 63 / 64 / 45e9)


def test_oversubscription_binds_what_all_ranks_send_beyond_the_leaf() -> None:
    """Rings leave a leaf once per group; an all-to-all sends 3/4 of what leaves nodes beyond a leaf of 4 of 13 nodes."""
    flat, tapered = cluster(16), cluster(16, nodes_per_leaf=4, oversubscription=4.0)
    assert seconds("all_gather", GIB, 128, where=tapered) == seconds("all_gather", GIB, 128, where=flat)
    plain, slow = (of("all_to_all", GIB, placement(128, 8), "pairs", "simple", c) for c in (flat, tapered))
    assert plain == pytest.approx(GIB * 120 / 128 / 45e9 + 50e-6 + 10e-6 + 127 * 7.5e-6)
    assert slow == pytest.approx(GIB * 96 / 128 / (45e9 / 4) + 50e-6 + 10e-6 + 127 * 7.5e-6)
    rail = of("all_to_all", GIB, placement(16, 8), "pairs", "simple", cluster(2, rail_optimized=True))
    assert rail == of("all_to_all", GIB, placement(16, 8), "pairs", "simple", cluster(2)), "NVLink hides the forwarding"


def test_interleaved_groups_share_the_spine() -> None:
    """Groups of every fourth node: four rings leave each leaf of four nodes, with a half of its links."""
    where = cluster(64, nodes_per_leaf=4, oversubscription=2.0)
    alone = bandwidths(Placement(128, 8, 16), where, LINK).inter
    shared = bandwidths(Placement(128, 8, 16, 0, 4), where, LINK).inter
    assert shared == pytest.approx(alone / 2)
    h100 = profile_for(H100)[0]
    timers = [CollectiveTimer(where, h100, 16, 1, stride=stride) for stride in (8, 32)]
    assert timers[0].seconds("all_gather", GIB) < timers[1].seconds("all_gather", GIB)


def test_a_mesh_gives_a_pair_one_link_and_pcie_two_sockets_less() -> None:
    mi300x = catalog.cluster("mi300x", 8)
    all_eight, pair = (bandwidths(placement(n, n), mi300x, LINK).intra for n in (8, 2))
    assert pair == pytest.approx(all_eight / 7)
    pcie = catalog.cluster("a100-pcie", 8)
    link = replace(LINK, socket_efficiency=0.9)
    assert bandwidths(placement(4, 4), pcie, link).intra == pytest.approx(0.9 * 32e9)
    assert bandwidths(placement(8, 8), pcie, link).intra == pytest.approx(0.8 * 32e9)
    assert bandwidths(Placement(2, 2, 1, 5), pcie, link).intra == pytest.approx(0.8 * 32e9), "two, but on both sockets"
    assert "ll128" not in {way.protocol for way in ways("all_gather", GIB, placement(8, 8), pcie, LINK)}


def test_an_nvlink_domain_may_be_larger_than_a_node() -> None:
    rack = catalog.cluster("gb200", 72)
    trays = replace(rack, gpus_per_node=4, network=Network(nvlink_domain=72))
    profile = profile_for(rack.gpu)[0]
    for op in OPS:
        took = [CollectiveTimer(c, profile, 72, c.gpus_per_domain).seconds(op, GIB) for c in (rack, trays)]  # type: ignore[arg-type]
        assert took[0] == took[1]
    lone = CollectiveTimer(replace(trays, network=Network()), profile, 72, 4).seconds("all_gather", GIB)
    assert lone > 2 * CollectiveTimer(trays, profile, 72, 72).seconds("all_gather", GIB)


@settings(max_examples=300, deadline=None)
@given(
    op=st.sampled_from(OPS), n_bytes=st.integers(1, 1 << 36), nodes=st.sampled_from([1, 2, 3, 8, 64, 512]),
    per_node=st.sampled_from([1, 2, 4, 8]), gpu=st.sampled_from(catalog.gpu_names()), factor=st.floats(1.0, 8.0),
    over=st.sampled_from([1.0, 2.0, 8.0]), leaf=st.sampled_from([0, 1, 4, 32]), two=st.booleans(), rail=st.booleans(),
)  # fmt: skip
def test_what_must_never_happen(
    op: str,
    n_bytes: int,
    nodes: int,
    per_node: int,
    gpu: str,
    factor: float,
    over: float,
    leaf: int,
    two: bool,
    rail: bool,
) -> None:
    """Less for more bytes, more for a faster network, less for more nodes, or bytes faster than the links."""
    network = Network(
        nodes_per_leaf=leaf, oversubscription=over if leaf else 1.0, hierarchical=two, rail_optimized=rail
    )
    base = replace(catalog.cluster(gpu, 8 * nodes, 8, internode_gbps=100), network=network)
    profile = profile_for(base.gpu)[0]

    def took(where: Cluster, size: int = n_bytes, n: int = nodes) -> float:
        return CollectiveTimer(where, profile, n * per_node, per_node).seconds(op, size)  # type: ignore[arg-type]

    now = took(base)
    if nodes * per_node == 1:
        assert now == 0.0
        return
    slack = 1 + 1e-9
    assert took(base, 0) == 0.0 < now
    assert now <= took(base, int(n_bytes * factor)) * slack
    assert took(replace(base, internode_bytes_per_s=base.internode_bytes_per_s * factor)) <= now * slack
    assert (
        took(replace(base, gpu=replace(base.gpu, link_bytes_per_s=base.gpu.link_bytes_per_s * factor))) <= now * slack
    )
    assert took(replace(base, network=replace(network, oversubscription=1.0))) <= now * slack
    if op not in ("broadcast", "send_recv"):
        assert now <= took(base, n=2 * nodes) * slack
    n = nodes * per_node
    out = n_bytes * (n - 1) / n if op not in ("send_recv", "broadcast") else n_bytes
    fastest = max(
        base.gpu.link_bytes_per_s,
        8 * base.internode_bytes_per_s if op != "send_recv" else 0,
        base.internode_bytes_per_s,
    )
    assert now >= out / fastest / slack


def test_a_group_of_one_and_a_profile_without_constants() -> None:
    profile = profile_for(H100)[0]
    assert CollectiveTimer(cluster(), profile, 1, 1).seconds("broadcast", GIB) == 0.0
    bare = HardwareProfile(name="bare", arch="hopper", origin="measured", date="2026-01-01")
    with pytest.raises(Exception, match="calibrate with more processes"):
        CollectiveTimer(cluster(), bare, 8, 8).ways("all_gather", GIB)
