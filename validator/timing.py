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


_CYCLES_PER_S = 2e9
"""At least a GPU's clock: holding it for too many cycles costs only time."""
_SLACK_S = 2e-5


def hold(seconds: float) -> None:
    """Keeps the GPU's current stream busy for about ``seconds``."""
    torch.cuda._sleep(round(seconds * _CYCLES_PER_S))


def held_until_issued(call: Callable[[], Any], before: Callable[[], Any] | None = None) -> Callable[[], None]:
    """``before``, and then a GPU's stream held for as long as the host needs to issue ``call``: what is timed after it are
    the device's seconds, not the host's pace. Runs ``before`` and ``call`` twice to find out."""
    issue_s = 0.0
    for _ in range(2):
        if before is not None:
            before()
        wait(True)
        start = time.perf_counter()
        call()
        issue_s = time.perf_counter() - start
    wait(True)

    def ready() -> None:
        if before is not None:
            before()
        hold(1.5 * issue_s + _SLACK_S)

    return ready


def time_call(
    call: Callable[[], Any], device: str, slice_s: float, *, agree: Callable[[int], int] = int, on_host: bool = False,
    before: Callable[[], Any] | None = None, min_repeats: int = 3,
) -> list[float]:  # fmt: skip
    """Seconds of each repeat, of which there are ``min_repeats`` to 25 in about ``slice_s``; none if one takes far too long.

    ``agree`` makes all workers do the same number of repeats. ``on_host`` times the host's clock even on a GPU.
    ``before`` runs ahead of every call and is not timed (to empty caches, or to make what the call uses up); without it
    short calls on a GPU are timed many in a row.
    """
    cuda = device != "cpu"
    if before is not None:
        before()
    call()
    if before is not None:
        before()
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
