"""From a task to seconds: operands, the call, its repeats. Outputs are fresh tensors, as in training."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from runtime import functional
from validator.calibrate import copies, files, host, products
from validator.calibrate.collectives import prepare_collective
from validator.calibrate.prepared import Prepared
from validator.calibrate.tasks import Task
from validator.kernels.implementation import check, default
from validator.kernels.table import kernel
from validator.timing import TORCH_DTYPES, filled, held_until_issued, hold, time_call, wait

_TOKENS = {"cpu": 2048, "cuda": 16384}
_BACKWARD_FLOPS = 2.5
"""Of attention, in forward passes: five products instead of two."""


def prepare(task: Task, device: str, folder: Path | None = None) -> Prepared:
    """Inputs of ``task`` on ``device`` (a torch device) and the call that does it. ``folder``: for files.

    Raises ``Skip`` where the device has no such thing.
    """
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = task.dtype == "tf32"
    if task.kind == "matmul":
        return products.prepare_matmul(task, device)
    if task.kind == "attention":
        return _attention(task, device)
    if task.kind == "bandwidth":
        return _bandwidth(task, device)
    if task.kind == "copy":
        return copies.prepare_copy(task, device)
    if task.kind == "collective":
        return prepare_collective(task, device)
    if task.kind == "file":
        assert folder is not None
        return files.prepare_file(task, folder)
    if task.kind == "optimizer":
        return host.prepare_step(task)
    if task.kind == "overhead":
        return host.prepare_overhead(task, device)
    return host.prepare_host(task, device)


def _attention(task: Task, device: str) -> Prepared:
    """The runtime's own attention, on about as many tokens as a micro-batch has."""
    seq_len, heads, kv_heads, head_dim = task.sizes
    dtype = TORCH_DTYPES[task.dtype]
    batch = max(1, _TOKENS[device] // seq_len)
    q = filled((batch, seq_len, heads, head_dim), device, dtype).requires_grad_(task.backward)
    k, v = (filled((batch, seq_len, kv_heads, head_dim), device, dtype).requires_grad_(task.backward) for _ in range(2))
    flops = 4.0 * batch * heads * head_dim * seq_len * (seq_len + 1) / 2
    if not task.backward:
        return Prepared(lambda: functional.attention(q, k, v), flops)
    out = functional.attention(q, k, v)
    grad = torch.full_like(out, 0.01)
    return Prepared(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), _BACKWARD_FLOPS * flops)


def _bandwidth(task: Task, device: str) -> Prepared:
    """A kernel of the table as the runtime runs it here: its own on a GPU unless it is switched off, else plain torch; bytes
    are the estimator's count for that."""
    on_gpu = device != "cpu"
    implementation = default(task.name, "cuda" if on_gpu else "cpu")
    found = kernel(task.name, task.backward).prepare(task.sizes[0], task.dtype, device, implementation)
    if on_gpu:
        if found.before is not None:
            found.before()
        check(task.name, implementation, found.call)
    return Prepared(found.call, float(found.n_bytes), before=found.before)


def warm_up(device: str, seconds: float) -> None:
    """Keep the device busy for a while: the first products run at idle clocks, on threads that are just starting."""
    a = filled((512, 512), device, torch.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        F.linear(a, a)
        wait(device != "cpu")


_SHORT_S = 2e-3


def time_task(prepared: Prepared, device: str, slice_s: float, agree: Callable[[int], int]) -> list[float]:
    """Seconds of one call, for each repeat in about ``slice_s``; none if one takes far too long (see ``time_call``).

    Short work of a GPU is timed many in a row behind a kernel that holds the stream until all are issued: otherwise
    the host's pace would be measured. What needs something done before each call is timed call by call, held likewise.
    ``agree`` makes all workers do the same.
    """
    call, before = prepared.call, prepared.before
    inner = 1
    on_gpu = device != "cpu" and not prepared.on_host
    if on_gpu and before is not None:
        before = held_until_issued(call, before)
    elif on_gpu:
        call()
        wait(True)
        start = time.perf_counter()
        call()
        issue_s = time.perf_counter() - start
        wait(True)
        once_s = time.perf_counter() - start
        inner = agree(max(1, min(50, round(_SHORT_S / once_s))))
        if inner > 1:
            before = partial(hold, 1.5 * inner * issue_s)
    seconds = time_call(
        call if inner == 1 else lambda: _repeat(call, inner), device, slice_s, agree=agree, on_host=prepared.on_host,
        before=before,
    )  # fmt: skip
    return [s / inner for s in seconds]


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
