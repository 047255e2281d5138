"""What a framework's libraries hold on a device from step to step, beside the buffers of groups."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from estimator.job.framework import FRAMEWORKS
from estimator.job.job import Job
from estimator.schedule.events import Buffer
from estimator.sharding.units import Param, Unit
from estimator.units import DTYPE_BYTES

_JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "up"}
"""Projections that a framework keeps as one weight, by the last part of their names."""
_WITH_LARGE_WORKSPACE = ("hopper", "blackwell")


def standing_buffers(job: Job, units: Sequence[Unit]) -> tuple[Buffer, ...]:
    """Of a rank that holds ``units``, whose parameters are its parts."""
    profile = FRAMEWORKS[job.strategy.framework]
    sizes: dict[str, int] = {}
    if profile.dummy_grads:
        sizes["dummy_grads"] = dummy_grad_bytes(job, units)
    s = job.strategy
    if profile.gather_buffer and s.tp > 1 and s.sequence_parallel and any(unit.kind == "head" for unit in units):
        sizes["gather_buffer"] = job.tokens_per_micro_batch * job.model.d_model * DTYPE_BYTES[s.dtype]
    if job.cluster.gpu.arch in _WITH_LARGE_WORKSPACE:
        sizes["library_workspace"] = profile.workspace_bytes
    return tuple(Buffer(role, -1, "workspace", n_bytes) for role, n_bytes in sizes.items() if n_bytes)


def dummy_grad_bytes(job: Job, units: Sequence[Unit]) -> int:
    """One gradient of each shape that weights of blocks' projections and of the output layer have."""
    joins = FRAMEWORKS[job.strategy.framework].joins_projections
    shapes = {
        shape
        for params in {_multiplied(unit, units) for unit in units if unit.kind != "embed"}
        for shape in _weights(params, joins)
    }
    return sum(prod(shape) for shape in shapes) * DTYPE_BYTES[job.strategy.dtype]


def _multiplied(unit: Unit, units: Sequence[Unit]) -> tuple[Param, ...]:
    """Parameters that ``unit`` reads; a tied output layer's is the embedding's."""
    tables = (p for other in unit.borrows for p in units[other].params if p.name.startswith("tokens"))
    return (*unit.params, *tables)


def _weights(params: Sequence[Param], joins: bool) -> set[tuple[int, int]]:
    """Shapes of the matrices that ``params`` multiply with, those of every expert alone; a router has a product of its own."""
    rows: dict[tuple[str, int], int] = {}
    for param in params:
        name = param.name.removesuffix(".weight")
        if len(param.shape) < 2 or name.endswith("bias") or name.endswith("router"):
            continue
        n_out, n_in = param.shape[-2:]
        head, _, last = name.rpartition(".")
        key = (f"{head}.{_JOINED.get(last, last) if joins else last}", n_in)
        rows[key] = rows.get(key, 0) + n_out
    return {(n_out, n_in) for (_, n_in), n_out in rows.items()}
