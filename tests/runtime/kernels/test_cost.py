"""The launchers' costs beside the operators that the estimator charges for the same calls."""

from __future__ import annotations

import pytest

from estimator.ops.graph import Graph
from estimator.ops.operator import Op
from runtime.kernels import norm, rotary

ROWS, WIDTH = 8192, 4096


def charged(graph: Graph) -> tuple[Op, Op]:
    (node,) = graph.nodes
    return node.forward[0], node.backward[0]


@pytest.mark.parametrize("rms", [True, False])
def test_norms(rms: bool) -> None:
    """The estimator leaves out weights, statistics and partial sums: under 1% here."""
    graph = Graph("bf16", ROWS)
    graph.norm(graph.activation(WIDTH), WIDTH, rms=rms, bias=not rms)
    for ours, theirs in zip(
        norm.cost(norm.NormCall(ROWS, WIDTH, "bf16", 2, rms, not rms)), charged(graph), strict=True
    ):
        assert (ours.name, ours.kind, ours.backward) == (theirs.name, theirs.kind, theirs.backward)
        assert theirs.n_bytes < ours.n_bytes < 1.01 * theirs.n_bytes


def test_rotation() -> None:
    """The estimator leaves out the tables, which all heads and sequences share."""
    graph = Graph("bf16", ROWS)
    graph.rotary(graph.activation(WIDTH), WIDTH)
    ours = rotary.cost((4, ROWS // 4, WIDTH // 128, 128), 128, "bf16", 2, in_place=True)
    for mine, theirs in zip(ours, charged(graph), strict=True):
        assert mine.name == theirs.name and mine.flops == theirs.flops
        assert theirs.n_bytes < mine.n_bytes < 1.01 * theirs.n_bytes
