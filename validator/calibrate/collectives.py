"""Collectives of the process group, with the calls that the runtime makes (and two that it does not make yet)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from validator.calibrate.prepared import Prepared
from validator.calibrate.tasks import Task
from validator.timing import TORCH_DTYPES


def prepare_collective(task: Task, device: str) -> Prepared:
    """The full tensor has about ``task.sizes[0]`` bytes: what all ranks have together, or what one sends to the next."""
    dtype = TORCH_DTYPES[task.dtype]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shard_numel = max(1, task.sizes[0] // (dtype.itemsize * ranks))
    full = torch.ones(shard_numel * ranks, dtype=dtype, device=device)
    shard = torch.ones(shard_numel, dtype=dtype, device=device)
    other = torch.empty_like(full) if task.name in ("all_to_all", "send_recv") else full

    def send_recv() -> None:
        """Round the ring: to the next rank, from the one before."""
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, full, (rank + 1) % ranks),
                dist.P2POp(dist.irecv, other, (rank - 1) % ranks),
            ]
        )
        for work in works:
            work.wait()

    calls: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: dist.all_gather_into_tensor(full, shard),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard, full),
        "all_reduce": lambda: dist.all_reduce(full.fill_(1.0) if device == "cpu" else full),
        "all_to_all": lambda: dist.all_to_all_single(other, full),
        "send_recv": send_recv,
    }
    return Prepared(calls[task.name], float(full.numel() * dtype.itemsize))
