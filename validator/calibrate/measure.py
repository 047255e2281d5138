"""From a task to seconds: operands, the call, its repeats. Outputs are fresh tensors, as in training."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from runtime import functional
from validator.calibrate import copies, files, host, products
from validator.calibrate.collectives import prepare_collective
from validator.calibrate.prepared import Prepared
from validator.calibrate.products import COLD_BYTES
from validator.calibrate.tasks import Task
from validator.kernels.implementation import check, default
from validator.kernels.table import kernel
from validator.timing import TORCH_DTYPES, filled, held_until_issued, hold, time_call, wait

_TOKENS = {"cpu": 2048, "cuda": 16384}
_BACKWARD_FLOPS = 2.5
"""Of attention, in forward passes: five products instead of two."""


def prepare(task: Task, device: str, folder: Path | None = None) -> Prepared:
    """Inputs of ``task`` on ``device`` (a torch device) and the call that does it. ``folder``: for files.

    A CPU's results go to memory that is in no cache: those of a step are kept for its backward pass, and what is written next comes
    from memory. Raises ``Skip`` where the device has no such thing.
    """
    prepared = _prepare(task, device, folder)
    if device == "cpu" and task.kind in ("matmul", "attention", "bandwidth") and prepared.before is None:
        started_s = _autograd_s() if task.backward else 0.0
        return prepared._replace(call=keeping(prepared.call), less_s=started_s)
    return prepared


def _prepare(task: Task, device: str, folder: Path | None) -> Prepared:
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
    if not on_gpu and task.name in _IN_PLACE:
        rest = (kernel(task.name).prepare(found.shape, task.dtype, device) for _ in range(_turns(found.n_bytes) - 1))
        calls = itertools.cycle([found.call, *(one.call for one in rest)])
        return Prepared(lambda: next(calls)(), found.n_bytes)
    if on_gpu:
        if found.before is not None:
            found.before()
        check(task.name, implementation, found.call)
    return Prepared(found.call, float(found.n_bytes), before=found.before)


_IN_PLACE = ("accumulate_grad",)
"""Kernels of the table that write to one of their operands, each of which a step uses once."""
_MOST_TURNS = 512


@lru_cache(maxsize=1)
def _autograd_s() -> float:
    """Seconds in which autograd starts and ends: a step's backward pass does so once, a timed one for every operator."""
    x = torch.ones(8, requires_grad=True)
    y, grad = x * 1.0, torch.ones(8)
    return min(time_call(lambda: torch.autograd.grad(y, x, grad, retain_graph=True), "cpu", 0.01, min_repeats=25))


def keeping(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call``, whose last results are kept until they fill more than a last-level cache; where it makes none, itself."""
    once, again = _storages(call()), _storages(call())
    n_bytes = sum(storage.nbytes() for storage in again.values())
    if not n_bytes or (once.keys() == again.keys() and once):
        return call
    turns = _turns(n_bytes)
    kept: deque[Any] = deque(
        ([torch.empty(storage.nbytes(), dtype=torch.uint8) for storage in again.values()] for _ in range(turns)), turns
    )
    return lambda: kept.append(call())


def _turns(n_bytes: int) -> int:
    return max(1, min(_MOST_TURNS, COLD_BYTES // n_bytes))


def _storages(result: Any) -> dict[int, torch.UntypedStorage]:
    """Memory of a call's results, by where it begins."""
    tensors = result if isinstance(result, tuple | list) else (result,)
    found = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return {storage.data_ptr(): storage for storage in found}


def touch_memory() -> None:
    """Have the system map as much memory as ``keeping`` keeps, so that no timed call has to wait for a page."""
    torch.ones(3 * COLD_BYTES, dtype=torch.uint8)


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
    return [max(s / inner - prepared.less_s, s / inner / 2) for s in seconds]


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
