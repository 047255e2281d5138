"""Device memory that no tensor has: CUDA's context, NCCL's buffers, the workspace of matrix products.

Figures and their sources are in ``catalog/data/device_memory.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from estimator.catalog.hardware import load_data
from estimator.job.job import Job
from estimator.job.mesh import Span
from estimator.ops.cost import UnitCost
from estimator.schedule.events import Collective, Recv, Send, StepProgram

_FILE = "device_memory.json"


class Outside(NamedTuple):
    """Bytes of one rank's process."""

    context_bytes: int
    """CUDA's context, with the kernels that are loaded."""
    comm_bytes: int
    """NCCL's buffers."""
    workspace_bytes: int
    """Taken from the caching allocator by the first matrix products, for good."""

    @property
    def total_bytes(self) -> int:
        """Of what the caching allocator does not hold."""
        return self.context_bytes + self.comm_bytes


def outside_memory(job: Job, program: StepProgram, costs: Sequence[UnitCost]) -> Outside:
    """Of a rank that runs ``program``. On a CPU there is none."""
    gpu = job.cluster.gpu
    if gpu.arch == "cpu":
        return Outside(0, 0, 0)
    data = load_data(_FILE)
    workspace = data["matmul_workspace"]["bytes"]
    groups = communicators(job, program, costs)
    per_group = data["communicator"]["bytes"]
    n_bytes = sum(per_group["two_ranks" if size == 2 else "more_ranks"] for size in groups.sizes)
    n_bytes += groups.n_peers * data["peer"]["bytes"]
    return Outside(gpu.context_bytes, n_bytes, _HANDLES * workspace.get(gpu.arch, workspace["other"]))


_HANDLES = 2
"""cuBLAS handles of a step, each with its workspace: PyTorch gives every thread its own, and autograd's thread runs the backward pass
(aten/src/ATen/cuda/CublasHandlePool.cpp; seen in torch 2.11's own allocator, over a stub of CUDA)."""


class Communicators(NamedTuple):
    """What a rank's messages go through."""

    sizes: tuple[int, ...]
    """Ranks of each group for collectives."""
    n_peers: int
    """Other ranks with which it exchanges single messages: all-to-alls within a node, neighbours in a pipeline or ring."""


def communicators(job: Job, program: StepProgram, costs: Sequence[UnitCost]) -> Communicators:
    """This runtime has groups of their own for gathers, reductions and what layers exchange; other frameworks one for each set of ranks."""
    apart = job.strategy.framework == "zerocast"
    whole = Span(job.mesh.size)
    groups: set[tuple[str, Span]] = set()
    exchanging: set[Span] = set()
    neighbours: set[int] = set()
    in_ring: set[Span] = set()
    for section in program.step:
        for event in section.events:
            kind = type(event)
            if kind is Collective:
                span = event.span or whole  # type: ignore[union-attr]
                if event.op in _SINGLE:  # type: ignore[union-attr]
                    exchanging.add(span)
                else:
                    groups.add((event.stream if apart else "", span))  # type: ignore[union-attr]
            elif kind is Send or kind is Recv:
                neighbours.add(event.offset)  # type: ignore[union-attr]
    for cost in {id(cost): cost for cost in costs}.values():
        for op in (*cost.forward, *cost.backward):
            if op.kind == "collective":
                span = op.span or whole
                if op.name == "send":
                    in_ring.add(span)
                elif op.name in _SINGLE:
                    exchanging.add(span)
                else:
                    groups.add(("layers" if apart else "", span))
    n_peers = len(neighbours) + sum(_near(span, job.cluster.gpus_per_node) - 1 for span in exchanging)
    n_peers += sum(min(span.size - 1, 2) for span in in_ring)
    return Communicators(tuple(sorted(span.size for _, span in groups if span.size > 1)), n_peers)


_SINGLE = frozenset(("all_to_all", "push", "pull"))
"""Operations that are made of messages from rank to rank."""


def _near(span: Span, gpus_per_node: int) -> int:
    """Ranks of a group that share a node."""
    return max(1, min(span.size, gpus_per_node // span.stride))
