"""A worker with a misbehaving runtime, started in place of ``validator.measure.worker``: ``ODD_WORKER`` names what it does.

Everything around the runtime (launch, process groups, gathering, reports) is the real thing.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from validator.measure import worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionOptions:
    steps: int
    warmup: int
    track_memory: bool
    seed: int
    reference: bool
    nvme_folder: str | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    peak_allocated_bytes: int
    peak_phase: str
    peak_where: str
    category_bytes_at_peak: dict[str, int]
    category_peak_bytes: dict[str, int]
    phase_peak_bytes: dict[str, int]
    phase_category_bytes: dict[str, dict[str, int]]
    host_bytes: int
    pinned_bytes: int
    step_seconds: tuple[float, ...]
    part_seconds: dict[str, float]
    collective_bytes: dict[str, int]
    collective_calls: dict[str, int]
    copy_bytes: dict[str, int]
    losses: tuple[float, ...]
    skipped_steps: int = 0
    device_step_seconds: tuple[float, ...] = ()
    copy_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    attribution: dict[str, Any] = dataclasses.field(default_factory=dict)
    parity: dict[str, float] = dataclasses.field(default_factory=dict)


def run_session(
    job: Any, device: str, options: SessionOptions, *, rank: int, on_step: Callable[[int, float], None]
) -> Measurement:
    what = os.environ["ODD_WORKER"]
    if what == "hang":
        on_step(0, 0.125)
        while True:
            time.sleep(0.01)
    if what == "hang-on-rank-1" and rank == 1:
        while True:
            pass
    if what == "crash" and rank == job.dp - 1:
        raise ArithmeticError("the flux capacitor is empty")
    if what == "train-and-die":
        torch.distributed.all_reduce(torch.ones(1))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1))
    if what == "die":
        sys.stderr.write("last gasp\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "out-of-memory" and rank == job.dp - 1:
        torch.ones(1 << 40, dtype=torch.uint8)
    steps = 0 if device == "meta" else options.warmup + options.steps
    for step in range(steps):
        on_step(step, float(step))
    live = {"params": 100 + rank}
    return Measurement(
        peak_allocated_bytes=100 + rank, peak_phase="forward", peak_where=f"rank {rank}", category_bytes_at_peak=live,
        category_peak_bytes=live, phase_peak_bytes={"forward": 100 + rank}, phase_category_bytes={"forward": live}, host_bytes=0, pinned_bytes=0,
        step_seconds=tuple((1.0 + step) * (2 if rank == step % 2 else 1) for step in range(steps)),
        part_seconds={"forward": 0.5 + rank} if steps else {}, collective_bytes={"all_gather": 64},
        collective_calls={"all_gather": 1}, copy_bytes={}, losses=(2.0, 1.0) if steps else (),
    )  # fmt: skip


if __name__ == "__main__":
    module = types.ModuleType("runtime.session")
    module.SessionOptions, module.run_session = SessionOptions, run_session  # type: ignore[attr-defined]
    sys.modules["runtime.session"] = module
    sys.exit(worker.main())
