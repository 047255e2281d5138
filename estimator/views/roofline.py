"""The operators of a step under the GPU's roofs (Williams, Waterman & Patterson 2009): FLOPs per byte against FLOPs per second."""

from __future__ import annotations

from typing import NamedTuple

from estimator.ops.operator import Op
from estimator.views.step import StepView
from estimator.views.waterfall import op_counts


class Roof(NamedTuple):
    """What the GPU's datasheet allows."""

    dtype: str
    flops_per_s: float
    """Dense peak of ``dtype``."""
    bytes_per_s: float

    def reachable(self, flops_per_byte: float) -> float:
        """FLOPs per second at an intensity."""
        return min(self.flops_per_s, flops_per_byte * self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which both roofs meet."""
        return self.flops_per_s / self.bytes_per_s


class RoofPoint(NamedTuple):
    """All runs of one operator in a step of one rank."""

    name: str
    kind: str
    part: str
    shape: tuple[int, ...]
    runs: int
    flops: float
    """Of one run."""
    n_bytes: int
    """Read and written, of one run."""
    seconds: float
    """Of all runs."""
    roof: str
    """``compute`` or ``memory``: the roof above its intensity."""
    of_roof: float
    """Share of that roof that it reaches: of FLOPs or of bytes per second. What a cache serves may exceed memory's."""

    @property
    def flops_per_byte(self) -> float:
        return self.flops / self.n_bytes if self.n_bytes else float("inf")

    @property
    def flops_per_s(self) -> float:
        return self.runs * self.flops / self.seconds


def roof_of(view: StepView) -> Roof:
    gpu, dtype = view.job.cluster.gpu, view.job.strategy.dtype
    return Roof(dtype, view.record.durations.ops.peak_flops(dtype), gpu.memory_bytes_per_s)


def roofline(view: StepView, rank: int | None = None) -> tuple[RoofPoint, ...]:
    """The operators of a pipeline rank (default: the one that ends last), by seconds; those of layers, not the optimizer's."""
    rank = view.record.last if rank is None else rank
    timer = view.record.durations.ops
    points = []
    for (op, part), count in op_counts(view, rank).items():
        if op.kind == "collective" or (seconds := timer.seconds(op)) <= 0:
            continue
        limit, roof = _roof_above(op, timer.peak_flops(op.dtype), view.job.cluster.gpu.memory_bytes_per_s)
        points.append(
            RoofPoint(
                op.name, op.kind, part, op.shape, count, op.flops, op.n_bytes, count * seconds, roof, limit / seconds
            )
        )
    return tuple(sorted(points, key=lambda point: -point.seconds))


def _roof_above(op: Op, flops_per_s: float, bytes_per_s: float) -> tuple[float, str]:
    """Seconds that the higher of both roofs asks for, and which it is."""
    compute_s, memory_s = op.flops / flops_per_s, op.n_bytes / bytes_per_s
    return (compute_s, "compute") if compute_s >= memory_s else (memory_s, "memory")
