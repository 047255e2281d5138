"""Times a call: repeats after a warm-up, device seconds on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from runtime.storage import TORCH_DTYPES

__all__ = ["TORCH_DTYPES", "filled", "time_call", "wait"]


def filled(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Random on a GPU, whose clocks depend on the bits that toggle; constant on a CPU, where drawing takes long."""
    if device == "cpu":
        return torch.full(shape, 0.01, dtype=dtype)
    return torch.randn(shape, device=device, dtype=dtype)


def wait(cuda: bool) -> None:
    """Until the GPU is done."""
    if cuda:
        torch.cuda.synchronize()


def time_call(
    call: Callable[[], Any], device: str, slice_s: float, *, agree: Callable[[int], int] = int, on_host: bool = False,
    before: Callable[[], Any] | None = None, min_repeats: int = 3,
) -> list[float]:  # fmt: skip
    """Seconds of each repeat, of which there are ``min_repeats`` to 25 in about ``slice_s``; none if one takes far too long.

    ``agree`` makes all workers do the same number of repeats. ``on_host`` times the host's clock even on a GPU.
    ``before`` runs ahead of every repeat and is not timed (to empty caches); without it short calls on a GPU are
    timed many in a row.
    """
    cuda = device != "cpu"
    call()
    wait(cuda)
    start = time.perf_counter()
    call()
    wait(cuda)
    once = max(time.perf_counter() - start, 1e-7)
    repeats = agree(0 if once * 3 > max(10 * slice_s, 0.3) else int(min(25, max(min_repeats, slice_s / once))))
    inner = 1 if not cuda or on_host or before else agree(max(1, min(50, round(2e-3 / once))))
    seconds: list[float] = []
    for _ in range(repeats):
        if before is not None:
            before()
        if cuda and not on_host:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / inner)
        else:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            wait(cuda)
    return seconds
