"""Fits tasks into the memory that is free: a GPU that others use too is measured at smaller sizes."""

from __future__ import annotations

from estimator.units import DTYPE_BYTES, MIB
from validator.calibrate.tasks import Task

_USABLE = 0.9
_LEAST_BYTES = 64 << 10
_BY_BYTES = {"bandwidth": 3, "copy": 2, "collective": 3, "overhead": 3}
"""Kinds whose first size is bytes -> how many times that they take at most."""


def needed_bytes(task: Task) -> int:
    """About the most device memory that ``task`` takes: operands, results, what autograd keeps, cold operands."""
    width = DTYPE_BYTES[task.dtype]
    if task.kind in _BY_BYTES:
        return _BY_BYTES[task.kind] * task.sizes[0]
    if task.kind == "matmul":
        m, n, k = task.sizes
        pool = max(96 * MIB, n * k * width)
        return (3 * pool if task.dtype == "fp8" else pool) + (m * k + m * n) * max(2, width)
    if task.kind == "attention":
        seq_len, heads, kv_heads, head_dim = task.sizes
        tokens = max(seq_len, 16384)
        return 4 * tokens * (heads + kv_heads) * head_dim * width
    return 0


def fitted(task: Task, free_bytes: int) -> Task | None:
    """``task`` with its largest size halved until it fits into ``free_bytes``; ``None`` when nothing of it does."""
    while needed_bytes(task) > _USABLE * free_bytes:
        sizes = list(task.sizes)
        if task.kind in _BY_BYTES:
            largest, least = 0, _LEAST_BYTES
        elif task.kind == "attention":
            largest, least = 0, 128
            if sizes[0] <= 16384:  # the batch fills it up to as many tokens
                return None
        else:
            largest, least = max(range(3), key=lambda i: sizes[i]), 256
        if sizes[largest] <= least:
            return None
        sizes[largest] //= 2
        task = task._replace(sizes=tuple(sizes))
    return task
