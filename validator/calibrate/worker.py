"""One of the processes that measure together: every worker runs each task at once, rank 0 reports.

On a CPU that is the point: N ranks of a job share cores, caches and memory bandwidth in the same way.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

from validator.calibrate.tasks import Task


def run(
    rank: int,
    workers: int,
    threads: int,
    device: str,
    rendezvous: str,
    tasks: list[Task],
    budget_s: float,
    results: Any,
) -> None:
    """Entry point of a worker process. Puts ``(key, result)`` on ``results``, then ``None``.

    A result is ``{"work", "seconds": [...]}``, or ``{"skipped": reason}``. Tasks that the budget leaves no time for
    have none, unless they are essential.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.filterwarnings("ignore", category=FutureWarning)  # collectives that torch renames; 2.11 has the old names
    import torch
    import torch.distributed as dist

    from runtime.host_memory import keep_freed_memory
    from validator.calibrate.measure import prepare, time_call, warm_up

    keep_freed_memory()
    torch.set_num_threads(threads)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.manual_seed(0)

    def agree(number: int) -> int:
        if workers == 1:
            return number
        shared = torch.tensor([number])
        dist.broadcast(shared, 0)
        dist.barrier()
        return int(shared.item())

    warm_up(device, min(1.0, budget_s / 5))
    end = time.perf_counter() + budget_s
    for i, task in enumerate(tasks):
        left_s = end - time.perf_counter()
        if not agree(int(left_s > 0 or task.essential)):
            break
        slice_s = max(0.004, min(0.25, left_s / (len(tasks) - i) / 2))
        try:
            prepared = prepare(task, device)
            on_host = task.kind == "host" or (task.kind == "copy" and not task.pinned)
            seconds = time_call(prepared, device, slice_s, agree, on_host=on_host)
            work = prepared.work
            del prepared
        except (RuntimeError, NotImplementedError) as error:  # the operator does not exist here: same on every rank
            report: dict[str, Any] = {"skipped": str(error).splitlines()[0]}
        else:
            report = (
                {"work": work, "seconds": seconds}
                if seconds
                else {"skipped": "takes longer than its share of the budget"}
            )
        if rank == 0:
            results.put((task.key(workers), report))
    if rank == 0:
        results.put(None)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()
