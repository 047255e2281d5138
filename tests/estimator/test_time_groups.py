"""Collectives over groups of ranks are timed by where their ranks are; all-to-all by what crosses nodes."""

from __future__ import annotations

import pytest

from estimator.job import Job
from estimator.job.mesh import Span
from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from estimator.time.network import CollectiveTimer, timer_over
from estimator.time.profile import CollectivePoint, HardwareProfile, profile_for

GIB, PIB = 1 << 30, 1 << 50


def job(**fields: object) -> Job:
    return build_job(JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=64, seq_len=2048, **fields))  # type: ignore[arg-type]


def over(span: Span | None) -> CollectiveTimer:
    made = job()
    return timer_over(span, made, profile_for(made.cluster.gpu)[0], "bf16")


def test_spans_are_placed_on_nodes_of_eight() -> None:
    placed = {span: (over(span).group_size, over(span).per_node, over(span).n_nodes) for span in
              (None, Span(8), Span(4), Span(16), Span(8, 8), Span(16, 4))}  # fmt: skip
    assert placed == {
        None: (64, 8, 8), Span(8): (8, 8, 1), Span(4): (4, 4, 1), Span(16): (16, 8, 2), Span(8, 8): (8, 1, 8),
        Span(16, 4): (16, 2, 8),
    }  # fmt: skip


def test_an_all_to_all_takes_what_leaves_the_node_over_one_link() -> None:
    """56 of 64 parts go to other nodes; of a message as large as a pebibyte latency is no matter."""
    timer, link = over(None), profile_for(job().cluster.gpu)[0].link
    assert link is not None
    seconds = 56 / 64 * PIB / (link.inter_efficiency * job().cluster.internode_bytes_per_s)
    assert timer.seconds("all_to_all", PIB) == pytest.approx(seconds, rel=1e-3)
    inside = 7 / 8 * PIB / (link.ring_efficiency * job().cluster.gpu.link_bytes_per_s)
    assert over(Span(8)).seconds("all_to_all", PIB) == pytest.approx(inside, rel=1e-3)


def test_an_all_to_all_that_was_not_measured_takes_an_all_gathers_time() -> None:
    took = {"all_gather": 1e-3, "all_reduce": 5e-3}
    points = tuple(CollectivePoint(op, 8, 1, n, s * n / GIB) for op, s in took.items() for n in (1 << 20, GIB))
    measured = HardwareProfile(name="m", arch="hopper", origin="measured", date="2026-01-01", collectives=points)
    assert timer_over(Span(8), job(), measured, "").seconds("all_to_all", GIB) == pytest.approx(1e-3)


def test_a_shard_per_node_gathers_inside_nodes() -> None:
    slow = {"internode_gbps": 50, "micro_batch": 1}
    whole, hybrid = (predict(job(**slow, **f)).time_parts_s for f in ({}, {"shard_size": 8}))
    assert hybrid["exposed_gather"] < 0.2 * whole["exposed_gather"]
