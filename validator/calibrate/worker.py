"""One of the processes that measure together: every worker runs each task at once, rank 0 reports.

On a CPU that is the point: N ranks of a job share cores, caches and memory bandwidth in the same way.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from estimator.job.cluster import Gpu
from validator.calibrate.tasks import Task
from validator.provenance import available_memory_bytes

CONTEXT_LOST = 3
"""Exit code of a process whose GPU context an error has ruined: a new process goes on after the task that did it."""
_TIMEOUT = timedelta(seconds=90)
_ESSENTIAL_S = 0.1
"""At least for a point that must not be left out because the machine was busy for a moment."""


class Round(NamedTuple):
    """What all workers of one round know."""

    workers: int
    threads: int
    device: str
    """``cpu`` or ``cuda``; of several workers each has the GPU of its rank."""
    rendezvous: str
    tasks: list[Task]
    deadline: float
    """On ``time.monotonic``'s clock."""
    at_least_s: float
    """Measured even where starting the processes ate up the time until ``deadline``."""
    folder: Path | None
    """For files."""
    gpu: Gpu | None = None
    """The catalogue's description of the device; ``None`` for a CPU."""


def run(rank: int, this: Round, results: Any) -> None:
    """Entry point of a worker process. Puts ``(key, result)`` on ``results``, then ``None``.

    A result is ``{"work", "seconds": [...]}``, with ``"sizes"`` where memory called for smaller ones, or
    ``{"skipped": reason}``. Tasks that the budget leaves no time for have none, unless they are essential.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.filterwarnings("ignore", category=FutureWarning)  # collectives that torch renames; 2.11 has the old names
    import torch
    import torch.distributed as dist

    from runtime.host_memory import keep_freed_memory
    from validator.calibrate.measure import touch_memory, warm_up

    keep_freed_memory()
    torch.set_num_threads(this.threads)
    device = this.device
    cuda = device != "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        touch_memory()
    if this.workers > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"file://{this.rendezvous}", rank=rank,
            world_size=this.workers, timeout=_TIMEOUT,
        )  # fmt: skip
    torch.manual_seed(0)

    def agree(number: int) -> int:
        """Rank 0's number; every worker gets here before any goes on."""
        if this.workers == 1:
            return number
        shared = torch.tensor([number if rank == 0 else 0])
        dist.all_reduce(shared)
        return int(shared.item())

    warm_up(device, min(1.0, max(0.3, this.at_least_s / 5)))
    deadline = max(this.deadline, time.monotonic() + this.at_least_s)
    parent = multiprocessing.parent_process()
    for i, task in enumerate(this.tasks):
        left_s = deadline - time.monotonic()
        if not agree(int(left_s > 0 or task.essential)):
            break
        if parent is not None and not parent.is_alive():
            return  # killed: nobody waits for the rest
        slice_s = max(_ESSENTIAL_S if task.essential else 0.004, min(0.25, left_s / (len(this.tasks) - i) / 2))
        free_bytes = agree(_free_bytes(device))
        if task.kind == "step":
            report, lost = _train(task, this, rank)
        else:
            report, lost = _measure(task, this, device, slice_s, agree, free_bytes)
        if rank == 0:
            results.put((task.key(this.workers), report))
        if lost:
            results.close()
            results.join_thread()
            sys.exit(CONTEXT_LOST)
    if rank == 0:
        results.put(None)
    if this.workers > 1:
        agree(0)
        dist.destroy_process_group()


def _measure(
    task: Task, this: Round, device: str, slice_s: float, agree: Any, free_bytes: int
) -> tuple[dict[str, Any], bool]:
    """The result of one task, and whether the device is lost to this process. Nothing that goes wrong ends the round."""
    from validator.calibrate.measure import prepare, time_task
    from validator.calibrate.room import fitted

    prepared = None
    reason = ""
    smaller = fitted(task, free_bytes)
    try:
        if smaller is None:
            raise MemoryError(f"even its smallest size does not fit into the free memory of {device}")
        prepared = _prepare_twice(prepare, smaller, device, this.folder)
    except Exception as error:
        reason = _sentence(error)
    if not _all_ready(reason == "", this.workers):
        reason = reason or "another process could not prepare it"
    seconds: list[float] = []
    work = 0.0
    if not reason:
        assert prepared is not None
        work = prepared.work
        try:
            seconds = time_task(prepared, device, slice_s, agree)
            reason = "" if seconds else "takes longer than its share of the budget"
        except Exception as error:
            reason = _sentence(error)
    if prepared is not None and prepared.after is not None:
        try:
            prepared.after()
        except Exception as error:
            reason = reason or _sentence(error)
    del prepared
    if reason:
        return {"skipped": reason}, not _recover(device)
    report: dict[str, Any] = {"work": work, "seconds": seconds}
    if smaller is not None and smaller.sizes != task.sizes:
        report["sizes"] = list(smaller.sizes)
    return report, False


def _train(task: Task, this: Round, rank: int) -> tuple[dict[str, Any], bool]:
    """As ``_measure``, of a small job. All workers train it together."""
    from runtime.session import SessionOptions, run_session
    from validator.calibrate.steps import MEASURED_STEPS, WARMUP_STEPS, jobs_of

    options = SessionOptions(steps=MEASURED_STEPS, warmup=WARMUP_STEPS, track_memory=False)
    try:
        job = jobs_of(this.device)[task.name].job(this.workers, this.gpu)
        measured = run_session(job, "cpu" if this.device == "cpu" else "cuda", options, rank=rank)
    except Exception as error:
        return {"skipped": _sentence(error)}, not _recover(this.device)
    lost = not _recover(this.device)
    return {"work": 1.0, "seconds": list(measured.step_seconds), "parts": measured.part_seconds}, lost


def _free_bytes(device: str) -> int:
    """Of ``device``; plenty where that is not known."""
    import torch

    if device == "cpu":
        return available_memory_bytes() or sys.maxsize
    try:
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + kept
    except (RuntimeError, AssertionError):  # a ruined context: the task itself will say so
        return sys.maxsize


def _prepare_twice(prepare: Any, task: Task, device: str, folder: Path | None) -> Any:
    """Memory that earlier tasks left in caches is given back before a task is said not to fit."""
    import torch

    try:
        return prepare(task, device, folder)
    except torch.OutOfMemoryError:
        pass
    _recover(device)
    return prepare(task, device, folder)


def _all_ready(ready: bool, workers: int) -> bool:
    import torch
    import torch.distributed as dist

    if workers == 1:
        return ready
    flag = torch.tensor([int(ready)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _recover(device: str) -> bool:
    """Free what is cached; false when the GPU does not answer any more."""
    import torch

    from validator.calibrate.products import forget_pools

    forget_pools()
    gc.collect()
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except (RuntimeError, AssertionError):
        return False
    return True


def _sentence(error: Exception) -> str:
    """The first line of an error, with its kind where the text alone says little."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text[:200] if len(text) > 20 else f"{type(error).__name__}: {text}"
