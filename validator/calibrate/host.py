"""What the host takes: issuing operators, its optimizer step, its memory, the allocator, kernel launches."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from estimator.units import MIB
from validator.calibrate.prepared import Prepared, Skip
from validator.calibrate.tasks import Task
from validator.kernels.table import kernel

_CHAIN = 100
_LAUNCHES = 400
"""Fewer than the driver queues before it makes the host wait (about a thousand)."""
_HOLD_CYCLES = 40_000_000
"""Tens of milliseconds: the host has issued all launches before the device starts on the first."""
_ALLOCATIONS = 200
_ROW = 4096
_ADAM_NUMEL = 1 << 23
_MEMORY_BYTES = 512 * MIB


def prepare_host(task: Task, device: str) -> Prepared:
    """Issuing an operator, what backward adds to it, a fused fp32 AdamW step of the host, its memory, arithmetic beside
    an all-reduce."""
    if task.name in ("arithmetic", "all_reduce", "both"):
        return _overlapping(task.name)
    if task.name == "adam":
        step = kernel("adamw").prepare((_ADAM_NUMEL // _ROW, _ROW), "fp32", "cpu")  # beyond the caches
        return Prepared(step.call, float(_ADAM_NUMEL), on_host=True)
    if task.name == "memory":
        copy = kernel("copy").prepare(_MEMORY_BYTES, "fp32", "cpu")
        return Prepared(copy.call, float(copy.n_bytes), on_host=True)
    x = torch.ones(8, device=device, requires_grad=task.name == "autograd_op")
    if task.name == "op":
        return Prepared(lambda: _chain(x), float(_CHAIN), on_host=True)
    out = _chain(x)
    grad = torch.ones_like(out)
    return Prepared(lambda: torch.autograd.grad(out, x, grad, retain_graph=True), float(_CHAIN), on_host=True)


def _chain(y: Tensor) -> Tensor:
    for _ in range(_CHAIN):
        y = y * 1.0
    return y


def _overlapping(name: str) -> Prepared:
    """Products that take longer than an 8 MiB all-reduce, that all-reduce, or one behind the other's back."""
    a, payload = torch.full((512, 512), 0.01), torch.ones(2 * MIB)

    def call() -> None:
        work = dist.all_reduce(payload.fill_(1.0), async_op=True) if name != "arithmetic" else None
        for _ in range(16 if name != "all_reduce" else 0):
            F.linear(a, a)
        if work is not None:
            work.wait()

    return Prepared(call, 1.0)


def prepare_step(task: Task) -> Prepared:
    """The runtime's offloaded AdamW step on the host, on ``task.sizes[0]`` threads."""
    threads, numel = task.sizes
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step = kernel("optimizer_step").prepare((numel // _ROW, _ROW), task.dtype, "cpu")
    return Prepared(step.call, float(prod(step.shape)), on_host=True, after=partial(torch.set_num_threads, before))


def prepare_overhead(task: Task, device: str) -> Prepared:
    """See ``OverheadPoint``."""
    (n_bytes,) = task.sizes
    if task.name == "cached_alloc":
        return Prepared(partial(_allocate, n_bytes // 4, device), float(_ALLOCATIONS), on_host=True)
    if device == "cpu":
        raise Skip("a CPU has neither kernel launches nor segments")
    if task.name == "segment_alloc":
        return _fresh_segment(n_bytes, device)
    x = torch.zeros(1, device=device)
    launch = partial(_launch, x)
    if task.name == "launch":
        return Prepared(launch, float(_LAUNCHES), on_host=True)
    return Prepared(launch, float(_LAUNCHES), before=lambda: torch.cuda._sleep(_HOLD_CYCLES))


@torch.no_grad()
def _launch(x: Tensor) -> None:
    """In place, so that nothing but the launch is left."""
    for _ in range(_LAUNCHES):
        x.add_(1.0)


def _allocate(numel: int, device: str) -> None:
    for _ in range(_ALLOCATIONS):
        torch.empty(numel, device=device)


def _fresh_segment(n_bytes: int, device: str) -> Prepared:
    kept: list[Tensor] = []

    def give_back() -> None:
        kept.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    return Prepared(
        lambda: kept.append(torch.empty(n_bytes, dtype=torch.uint8, device=device)), 1.0, on_host=True,
        before=give_back, after=give_back,
    )  # fmt: skip
