"""Matrix products in the three layouts of training, and in the dtypes that only products have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.units import MIB
from validator.calibrate.prepared import Prepared, Skip
from validator.calibrate.tasks import Task
from validator.timing import TORCH_DTYPES, filled

COLD_BYTES = 96 * MIB
"""More than a last-level cache holds: a layer's weights come from memory, those of all others having passed since."""

_MOST_TURNS = 2048
"""Tiny operands need not fill the cache: what they cost is the launch."""

FP8_CAPABILITY = (8, 9)
TF32_CAPABILITY = (8, 0)


def prepare_matmul(task: Task, device: str) -> Prepared:
    """``m x k`` by ``k x n`` from row-major operands: ``nt`` x W' (a linear layer), ``nn`` dy W (its input's gradient),
    ``tn`` dy' x (its weight's gradient). Weights, and what backward has kept, come from memory, not from a cache."""
    m, n, k = task.sizes
    flops = 2.0 * m * n * k
    if task.dtype == "fp8":
        return Prepared(_fp8(m, n, k, device), flops)
    if task.dtype == "tf32":
        _require_capability("tf32", device, TF32_CAPABILITY)
    dtype = TORCH_DTYPES["fp32" if task.dtype == "tf32" else task.dtype]
    if task.name == "nt":
        x, weights = filled((m, k), device, dtype), _cold((n, k), device, dtype)
        return Prepared(lambda: F.linear(x, next(weights)), flops)
    if task.name == "nn":
        grad, weights = filled((m, k), device, dtype), _cold((k, n), device, dtype)
        return Prepared(lambda: grad @ next(weights), flops)
    grad, inputs = filled((k, m), device, dtype), _cold((k, n), device, dtype)
    return Prepared(lambda: grad.t() @ next(inputs), flops)


def _fp8(m: int, n: int, k: int, device: str):  # type: ignore[no-untyped-def]
    """e4m3 by e4m3 to bf16 with one scale per tensor and fast accumulation, as a forward pass has it."""
    _require_capability("fp8", device, FP8_CAPABILITY)
    if k % 16 or n % 16:
        raise Skip(f"n and k of fp8 products are multiples of 16, not {n} and {k}")
    x = filled((m, k), device, torch.bfloat16).to(torch.float8_e4m3fn)
    weights = _cold((n, k), device, torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        x, next(weights).t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _require_capability(dtype: str, device: str, least: tuple[int, int]) -> None:
    if device == "cpu":
        raise Skip(f"a CPU has no {dtype} products")
    found = torch.cuda.get_device_capability(device)
    if found < least:
        raise Skip(f"{dtype} needs compute capability {least[0]}.{least[1]}, this GPU has {found[0]}.{found[1]}")


def _cold(shape: tuple[int, int], device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Operands of ``shape`` in turn, enough of them that none is still in a cache when it comes round again."""
    rows, columns = shape
    numel = rows * columns
    pool = _pool(max(COLD_BYTES // dtype.itemsize, numel), device, dtype)
    n_turns = min(_MOST_TURNS, pool.numel() // numel)
    return itertools.cycle(pool[: n_turns * numel].view(n_turns, rows, columns).unbind())


@lru_cache(maxsize=4)
def _pool(numel: int, device: str, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        return filled((numel,), device, torch.bfloat16).to(dtype)
    return filled((numel,), device, dtype)


def forget_pools() -> None:
    """Free the operands kept for the next product."""
    _pool.cache_clear()
