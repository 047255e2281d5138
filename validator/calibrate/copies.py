"""Copies between device and host memory: each way, both at once, pinned and pageable; and within the device's."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from runtime.streams import SideStreams
from validator.calibrate.prepared import Prepared, Skip
from validator.calibrate.products import COLD_BYTES
from validator.calibrate.tasks import Task


def prepare_copy(task: Task, device: str) -> Prepared:
    """``task.sizes[0]`` bytes, half of them each way where the name is ``both``. Pageable copies keep the host busy, so
    its clock times them."""
    n_bytes, cuda = task.sizes[0], device != "cpu"
    if task.name == "both":
        if not cuda:
            raise Skip("on a CPU both ends of a copy are the same memory")
        return _both(n_bytes, device, task.pinned)
    if not cuda:
        return _cold(n_bytes)
    there = torch.ones(n_bytes // 4, device=device)
    if task.name == "d2d":
        target = torch.empty_like(there)
        return Prepared(lambda: target.copy_(there), float(n_bytes))
    here = _host_tensor(n_bytes, task.pinned)
    source, target = (here, there) if task.name == "h2d" else (there, here)
    return Prepared(lambda: target.copy_(source, non_blocking=task.pinned), float(n_bytes), on_host=not task.pinned)


def _cold(n_bytes: int) -> Prepared:
    """A CPU's copies, either way from memory to memory: what a step copies was last used a step ago."""
    turns = max(1, COLD_BYTES // n_bytes)
    source, target = (torch.ones(turns, n_bytes // 4).unbind() for _ in range(2))
    ends = itertools.cycle(zip(target, source, strict=True))

    def call() -> None:
        to, of = next(ends)
        to.copy_(of)

    return Prepared(call, float(n_bytes))


def _both(n_bytes: int, device: str, pinned: bool) -> Prepared:
    up, down = ((_host_tensor(n_bytes // 2, pinned), torch.ones(n_bytes // 8, device=device)) for _ in range(2))
    if pinned:  # the runtime's own streams
        streams = SideStreams(torch.device(device))

        def call() -> None:
            done = [streams.copy("h2d", up[0], up[1]), streams.copy("d2h", down[1], down[0])]
            for work in done:
                streams.wait("compute", work)

        return Prepared(call, float(n_bytes))
    threads = ThreadPoolExecutor(2)

    def copy(source: Tensor, target: Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)
        stream.synchronize()

    ends = ((up[0], up[1], torch.cuda.Stream(device)), (down[1], down[0], torch.cuda.Stream(device)))

    def call_threads() -> None:
        for done in [threads.submit(copy, *end) for end in ends]:
            done.result()

    return Prepared(call_threads, float(n_bytes), on_host=True, after=threads.shutdown)


def _host_tensor(n_bytes: int, pinned: bool) -> Tensor:
    return torch.ones(n_bytes // 4, pin_memory=pinned)
