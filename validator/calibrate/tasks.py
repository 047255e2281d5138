"""What is measured: a list of small tasks, the indispensable ones first."""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

from estimator.units import KIB, MIB

Device = Literal["cpu", "cuda"]
Effort = Literal["full", "quick"]

DTYPES = ("fp32", "bf16", "fp16")


class Task(NamedTuple):
    """One point to measure. ``sizes`` depends on ``kind``: see the builders below."""

    kind: str
    """``matmul`` (m, n, k); ``attention`` (seq_len, head_dim); ``bandwidth``, ``collective``, ``copy`` (bytes,);
    ``host`` () ."""
    name: str
    """Operator: ``forward``/``backward`` of attention, a bandwidth kind, a collective, ``h2d``/``d2h``, a host figure."""
    dtype: str
    sizes: tuple[int, ...] = ()
    backward: bool = False
    pinned: bool = True
    essential: bool = False
    """Measured even when the budget is spent: without it there is no usable profile."""

    def key(self, workers: int) -> str:
        """Identity in the file of points done so far."""
        return json.dumps([workers, *self[:-1]])


_CPU_SHAPES = (
    (512, 512, 512), (1024, 1024, 1024), (64, 256, 256), (1024, 512, 2048), (1024, 2048, 512), (512, 512, 1024),
    (256, 512, 512), (2048, 512, 1024), (4096, 256, 256), (256, 256, 4096), (1024, 4096, 512), (4096, 512, 1024),
    (128, 1024, 1024), (512, 1536, 384), (1024, 384, 1536), (128, 128, 128), (2048, 1024, 1024), (512, 4096, 256),
    (1024, 1024, 4096), (4096, 1024, 512), (64, 4096, 4096), (2048, 2048, 2048),
)  # fmt: skip
"""m, n, k as transformer layers have them: tokens x width x width forward, width x width x tokens for weight gradients."""

_CUDA_SHAPES = (
    (4096, 4096, 4096), (1024, 1024, 1024), (2048, 2048, 2048), (8192, 8192, 8192), (4096, 14336, 4096),
    (4096, 4096, 14336), (14336, 4096, 4096), (8192, 4096, 4096), (2048, 4096, 4096), (512, 4096, 4096),
    (4096, 1024, 4096), (16384, 4096, 4096), (8192, 6144, 4096), (8192, 28672, 8192), (8192, 8192, 1024),
    (1024, 8192, 8192), (4096, 128256, 4096), (256, 256, 256),
)  # fmt: skip

BANDWIDTH_KINDS = (
    ("elementwise", False), ("accumulate_grad", False), ("activation", False), ("activation", True), ("norm", False),
    ("norm", True), ("rms_norm", False), ("rms_norm", True), ("loss", False), ("loss", True),
    ("gated_activation", False), ("gated_activation", True), ("embedding", False), ("embedding", True),
    ("rotary", False), ("rotary", True),
)  # fmt: skip
"""Operators bound by memory that are timed on their own: ``Op`` kinds and names, forward and backward."""

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


BIG_KINDS = ("elementwise", "accumulate_grad")


def tasks_for(device: Device, workers: int, dtypes: tuple[str, ...], effort: Effort) -> list[Task]:
    """Tasks of one round, in which ``workers`` processes run each task at once."""
    cpu, quick = device == "cpu", effort == "quick"
    shapes = (_CPU_SHAPES if cpu else _CUDA_SHAPES)[: 3 if quick else None]
    if quick:
        shapes = tuple((m // 8, n // 8, k // 8) for m, n, k in shapes)
    matmul = [Task("matmul", "matmul", d, shape) for shape in shapes for d in dtypes]
    seqs = (128,) if quick else (256, 1024, 128, 512) if cpu else (2048, 8192, 512, 4096, 16384)
    heads = (64,) if quick or cpu else (128, 64)
    attention = [
        Task("attention", direction, d, (s, h), direction == "backward")
        for s in seqs
        for h in heads
        for direction in ("forward", "backward")
        for d in dtypes
        if cpu or d != "fp32"
    ]
    byte_sizes = (64 * KIB, MIB) if quick else (MIB, 16 * MIB, 64 * KIB) if cpu else (64 * MIB, MIB, 512 * MIB)
    bandwidth = [
        Task("bandwidth", kind, d, (size,), backward)
        for size in byte_sizes
        for kind, backward in (BANDWIDTH_KINDS[:6] if quick else BANDWIDTH_KINDS)
        for d in dtypes
    ]
    if cpu and not quick:  # beyond the caches
        bandwidth[:0] = [Task("bandwidth", kind, d, (64 * MIB,)) for kind in BIG_KINDS for d in dtypes]
    copies = [
        Task("copy", direction, "fp32", (size,), pinned=pinned)
        for size in byte_sizes
        for direction in ("h2d", "d2h")
        for pinned in ((True,) if cpu else (True, False))
    ]
    host = [Task("host", name, "fp32") for name in ("op", "autograd_op", "adam")]
    collectives: list[Task] = []
    if workers > 1 and cpu:
        host += [Task("host", name, "fp32") for name in ("arithmetic", "all_reduce", "both")]
    if workers > 1:
        sizes = (4 * KIB, MIB) if quick else (4 * KIB, 16 * MIB, MIB, 64 * KIB, 4 * MIB, 64 * MIB, 512 * KIB)
        collectives = [
            Task("collective", op, d, (size,)) for size in sizes for op in COLLECTIVES for d in dtypes if d != "fp16"
        ]
    first = [
        matmul[: 2 * len(dtypes)],
        attention[: 2 * len(dtypes)],
        host,
        bandwidth[: 2 * len(dtypes)],
        copies[:2],
        collectives[:12],
    ]
    essential = [task for group in first for task in group]
    groups = (matmul, bandwidth, attention, collectives, copies)
    # evenly interleaved, so that a spent budget thins out every kind alike
    ordered = sorted((i / len(group), j, task) for j, group in enumerate(groups) for i, task in enumerate(group))
    rest = [task for _, _, task in ordered if task not in essential]
    return [t._replace(essential=True) for t in essential] + rest
