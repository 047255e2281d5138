"""Link constants of one cluster from collectives that were measured on it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from estimator.errors import InputError
from estimator.job.cluster import Cluster
from estimator.time.collectives import NetworkOp, placement, ways
from estimator.time.profile import CollectivePoint, LinkModel

INSIDE = {
    "launch_s": (1e-6, 1e-3),
    "ring_efficiency": (0.02, 1.0),
    "pipelining": (0.01, 1.0),
    "in_switch_factor": (1.0, 2.0),
    "peer_s": (1e-7, 1e-4),
}
"""Constants that collectives inside a node tell, with their physical ranges."""
ACROSS = {"inter_floor_s": (1e-6, 5e-3), "inter_efficiency": (0.02, 1.0), "node_pipelining": (0.01, 1.5)}
"""The same of those that cross nodes."""
_STEPS = (1.6, 1.25, 1.1, 1.03, 1.01)
"""Factors by which a constant is tried larger and smaller, the coarse ones first."""


class Fit(NamedTuple):
    """What came out."""

    link: LinkModel
    median_error: float
    """Of forecast over measured seconds, less one, without sign."""
    n_points: int


def fit_link(points: Sequence[CollectivePoint], cluster: Cluster, link: LinkModel) -> Fit:
    """``link`` with the constants changed that ``points`` tell of, so that the sum of squared logarithms of forecast over measured
    seconds is least: a search factor by factor within ``INSIDE`` and ``ACROSS``, with the hops and protocols of ``link``.

    ``cluster`` gives the nominal links that efficiencies are fractions of; its number of GPUs does not matter. Of one GPU's
    groups nothing is learnt. Raises ``InputError`` without a point of two ranks.
    """
    usable = [p for p in points if p.group_size > 1]
    if not usable:
        raise InputError("no collective of at least 2 ranks was measured; there is nothing to fit a network to")
    for ranges, across in ((INSIDE, False), (ACROSS, True)):
        here = [p for p in usable if (p.n_nodes > 1) == across]
        if link.socket_efficiency and not across:
            ranges = {**ranges, "socket_efficiency": ranges["ring_efficiency"]}
        if here:
            link = _search(here, cluster, link, ranges)
    errors = [abs(math.expm1(_log_ratio(p, cluster, link))) for p in usable]
    return Fit(link, statistics.median(errors), len(usable))


def _search(
    points: Sequence[CollectivePoint], cluster: Cluster, link: LinkModel, ranges: dict[str, tuple[float, float]]
) -> LinkModel:
    best = _loss(points, cluster, link)
    for step in _STEPS:
        better = True
        while better:
            better = False
            for name, (low, high) in ranges.items():
                for factor in (step, 1 / step):
                    value = min(high, max(low, getattr(link, name) * factor))
                    tried = replace(link, **{name: value})
                    loss = _loss(points, cluster, tried)
                    if loss < best * (1 - 1e-6):
                        link, best, better = tried, loss, True
    return link


def _loss(points: Sequence[CollectivePoint], cluster: Cluster, link: LinkModel) -> float:
    return sum(_log_ratio(p, cluster, link) ** 2 for p in points)


def _log_ratio(p: CollectivePoint, cluster: Cluster, link: LinkModel) -> float:
    place = placement(p.group_size, -(-p.group_size // p.n_nodes))
    op: NetworkOp = p.op  # type: ignore[assignment]
    return math.log(min(way.seconds for way in ways(op, p.bytes, place, cluster, link)) / p.seconds)
