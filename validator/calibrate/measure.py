"""Times one task: medians of at least three repeats, after a warm-up. Outputs are fresh tensors, as in training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from estimator.units import MIB
from runtime import functional
from validator.calibrate.tasks import Task

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROW = 512
"""Width of the rows in row-wise operators."""
_VOCAB = 8192


class Prepared:
    """A function to time and how much work one call is (FLOPs or bytes; 1 for host figures)."""

    def __init__(self, call: Callable[[], Any], work: float) -> None:
        self.call, self.work = call, work


def prepare(task: Task, device: str) -> Prepared:
    """Inputs of ``task`` on ``device`` (a torch device) and the call that does it."""
    dtype = TORCH_DTYPES[task.dtype]
    if task.kind == "matmul":
        m, n, k = task.sizes
        x, weights = _data((m, k), device, dtype), _cold_weights(n, k, device, dtype)
        return Prepared(lambda: F.linear(x, next(weights)), 2.0 * m * n * k)
    if task.kind == "attention":
        return _attention(task, device, dtype)
    if task.kind == "bandwidth":
        return _bandwidth(task, device, dtype)
    if task.kind == "copy":
        return _copy(task, device)
    if task.kind == "collective":
        return _collective(task, dtype)
    return _host(task, device)


_COLD_BYTES = 96 * MIB
"""More than a last-level cache holds: a layer's weights come from memory, those of all others having passed since."""


def _cold_weights(n: int, k: int, device: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """``[n, k]`` weights in turn, enough of them that none is still in a cache when it comes round again."""
    pool = _pool(max(_COLD_BYTES // dtype.itemsize, n * k), device, dtype)
    return itertools.cycle(pool[: pool.numel() // (n * k) * n * k].view(-1, n, k).unbind())


@lru_cache(maxsize=4)
def _pool(numel: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return _data((numel,), device, dtype)


def _data(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Random on a GPU, whose clocks depend on the bits that toggle; constant on a CPU, where drawing takes long."""
    if device == "cpu":
        return torch.full(shape, 0.01, dtype=dtype)
    return torch.randn(shape, device=device, dtype=dtype)


def _attention(task: Task, device: str, dtype: torch.dtype) -> Prepared:
    seq_len, head_dim = task.sizes
    tokens = 2048 if device == "cpu" else 16384
    batch, heads = max(1, tokens // seq_len), 8 if device == "cpu" else 16
    shape = (batch, heads, seq_len, head_dim)
    q, k, v = (_data(shape, device, dtype).requires_grad_(task.backward) for _ in range(3))
    flops = 4.0 * batch * heads * head_dim * seq_len * (seq_len + 1) / 2
    if not task.backward:
        return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), flops)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    grad = torch.full_like(out, 0.01)
    return Prepared(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), 2.5 * flops)


def _bandwidth(task: Task, device: str, dtype: torch.dtype) -> Prepared:
    """Bytes follow the estimator's count for the operator: tensors read plus tensors written."""
    n_bytes = task.sizes[0]
    width = dtype.itemsize
    name, backward = task.name, task.backward
    passes = {
        "elementwise": 3, "accumulate_grad": 3, "activation": 3 if backward else 2, "norm": 3 if backward else 2,
        "rms_norm": 3 if backward else 2, "gated_activation": 9 if backward else 5, "rotary": 2, "embedding": 2,
        "loss": 3 if backward else 2,
    }[name]  # fmt: skip
    if name == "loss":  # always fp32: logits are widened first
        rows = max(1, n_bytes // (passes * 4 * _VOCAB))
        x = _data((rows, _VOCAB), device, torch.float32).requires_grad_()
        return _maybe_backward(lambda: F.log_softmax(x, dim=-1), [x], backward, passes * 4.0 * x.numel())
    if name == "embedding":
        rows, table = max(1, n_bytes // (2 * width * _ROW)), max(1, n_bytes // (8 * width * _ROW))
        weight = _data((table, _ROW), device, dtype).requires_grad_()
        index = torch.randint(0, table, (rows,), device=device)
        work = 2.0 * rows * _ROW * width + (weight.numel() * width if backward else 0)
        return _maybe_backward(lambda: F.embedding(index, weight), [weight], backward, work)
    rows = max(1, n_bytes // (passes * width * _ROW))
    a, b = _data((rows, _ROW), device, dtype), _data((rows, _ROW), device, dtype)
    work = float(passes) * a.numel() * width
    if name == "elementwise":
        return Prepared(lambda: a + b, work)
    if name == "accumulate_grad":
        b.mul_(1e-6)
        return Prepared(lambda: a.add_(b), work)
    a.requires_grad_()
    weight = torch.ones(_ROW, device=device, dtype=dtype, requires_grad=True)
    if name == "gated_activation":
        b.requires_grad_()
        return _maybe_backward(lambda: functional.gated_activate(a, b, "silu"), [a, b], backward, work)
    if name == "rotary":
        cos = _data((rows, 32), device, dtype)
        x = a.detach().view(1, rows, -1, 64).requires_grad_()
        return _maybe_backward(lambda: functional.rotate(x, cos, cos), [x], backward, work)
    if name == "rms_norm":
        return _maybe_backward(lambda: functional.rms_norm(a, weight, 1e-5), [a, weight], backward, work)
    if name == "norm":
        return _maybe_backward(lambda: F.layer_norm(a, (_ROW,), weight, weight), [a, weight], backward, work)
    return _maybe_backward(lambda: F.gelu(a), [a], backward, work)


def _maybe_backward(
    forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], backward: bool, work: float
) -> Prepared:
    if not backward:
        return Prepared(forward, work)
    out = forward()
    grad = torch.full_like(out, 0.01)
    return Prepared(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), work)


def _copy(task: Task, device: str) -> Prepared:
    host = torch.ones(task.sizes[0] // 4, pin_memory=device != "cpu" and task.pinned)
    there = torch.empty(task.sizes[0] // 4, device=device)
    source, target = (host, there) if task.name == "h2d" else (there.fill_(1.0), host)
    return Prepared(lambda: target.copy_(source, non_blocking=device != "cpu" and task.pinned), float(task.sizes[0]))


def _collective(task: Task, dtype: torch.dtype) -> Prepared:
    ranks = dist.get_world_size()
    shard_numel = max(1, task.sizes[0] // (dtype.itemsize * ranks))
    full, shard = torch.ones(shard_numel * ranks, dtype=dtype), torch.ones(shard_numel, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: dist.all_gather_into_tensor(full, shard),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard, full),
        "all_reduce": lambda: dist.all_reduce(full.fill_(1.0)),
    }
    return Prepared(calls[task.name], float(full.numel() * dtype.itemsize))


def _host(task: Task, device: str) -> Prepared:
    """Issuing an operator, what backward adds to it, one fused fp32 AdamW step, arithmetic beside an all-reduce."""
    if task.name in ("arithmetic", "all_reduce", "both"):
        return _overlapping(task.name)
    if task.name == "adam":
        numel = 1 << 23  # beyond the caches
        param, grad, m, v = (torch.zeros(numel) for _ in range(4))
        step = torch.ones(())

        def update() -> None:
            torch._fused_adamw_(
                [param], [grad], [m], [v], [], [step], lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
                amsgrad=False, maximize=False,
            )  # fmt: skip

        return Prepared(update, float(numel))
    chain = 100
    x = torch.ones(8, device=device, requires_grad=task.name == "autograd_op")

    def forward() -> torch.Tensor:
        y = x
        for _ in range(chain):
            y = y * 1.0
        return y

    if task.name == "op":
        return Prepared(forward, float(chain))
    out = forward()
    grad = torch.ones_like(out)
    return Prepared(lambda: torch.autograd.grad(out, x, grad, retain_graph=True), float(chain))


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


def warm_up(device: str, seconds: float) -> None:
    """Keep the device busy for a while: the first products run at idle clocks, on threads that are just starting."""
    a = _data((512, 512), device, torch.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        F.linear(a, a)
        _wait(device != "cpu")


def time_call(
    prepared: Prepared, device: str, slice_s: float, agree: Callable[[int], int], *, on_host: bool
) -> list[float]:
    """Seconds of each repeat, of which there are 3 to 25 in about ``slice_s``; none if one takes far too long.

    ``agree`` makes all workers do the same number of repeats. ``on_host`` times the host's clock even on a GPU.
    """
    cuda = device != "cpu"
    prepared.call()
    _wait(cuda)
    start = time.perf_counter()
    prepared.call()
    _wait(cuda)
    once = max(time.perf_counter() - start, 1e-7)
    repeats = agree(0 if once * 3 > max(10 * slice_s, 0.3) else int(min(25, max(3, slice_s / once))))
    inner = 1 if not cuda or on_host else agree(max(1, min(50, round(2e-3 / once))))
    seconds: list[float] = []
    for _ in range(repeats):
        if cuda and not on_host:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(inner):
                prepared.call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / inner)
        else:
            start = time.perf_counter()
            prepared.call()
            seconds.append(time.perf_counter() - start)
            _wait(cuda)
    return seconds


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
