"""Groups of processes for tests: forked from a server that has imported torch once, so that they start quickly."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

_PRELOAD = ["runtime", "runtime.session", "tests.runtime.tiny"]


def run_ranks(run: Callable[..., None], world: int, *args: Any) -> None:
    """``run(rank, world, *args)`` in ``world`` processes; raises when one of them fails."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    mp.start_processes(run, (world, *args), nprocs=world, start_method="forkserver")


def start_ranks(run: Callable[..., None], world: int, *args: Any) -> list[Any]:
    """As ``run_ranks``, but the processes are left to themselves: they are returned."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=run, args=(rank, world, *args), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
