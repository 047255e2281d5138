"""Runs training with offload strategies in a group of gloo processes, for the tests of ``runtime.offload``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from estimator.job import ModelSpec, Strategy
from runtime import Engine, initialize
from runtime.models import Decoder
from runtime.offload.states import NvmePlace
from runtime.reference import PARITY_OPTIMIZER
from tests.runtime import tiny
from tests.runtime.parity_worker import Outcome, batch, run_engine


class OffloadCase(NamedTuple):
    """Has what ``parity_worker``'s functions read of a ``Case``."""

    strategy: Strategy
    world: int = 1
    accumulation: int = 1
    nvme: NvmePlace | None = None
    steps: int | None = None
    """``None``: as ``parity_worker`` trains."""

    @property
    def model(self) -> ModelSpec:
        return tiny.GPT if self.accumulation == 1 else tiny.LLAMA


def make_engine(case: OffloadCase) -> Engine:
    model = Decoder(case.model)
    model.reset_parameters(0)
    return initialize(
        model=model,
        strategy=case.strategy,
        n_micro_batches=case.accumulation,
        optimizer=PARITY_OPTIMIZER,
        nvme=case.nvme,
    )


def train(engine: Engine, case: OffloadCase, rank: int, steps: int) -> list[float]:
    """This rank's losses, of its last micro-batches."""
    losses = []
    for _ in range(steps):
        for micro in range(case.accumulation):
            loss = engine(*batch(micro, rank))
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    return losses


def run(case: OffloadCase, rank: int) -> Outcome:
    """As ``parity_worker.run_engine``, or ``case.steps`` steps of an engine with files."""
    if case.steps is None:
        return run_engine(case, rank)  # type: ignore[arg-type]
    engine = make_engine(case)
    losses = train(engine, case, rank, case.steps)
    params = engine.full_parameters()
    engine.close()
    return Outcome(losses, params, {}, {})


def _worker(rank: int, world: int, folder: str, cases: list[OffloadCase]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    outcomes = [tuple(run(case, rank)) for case in cases]
    if rank == 0:
        torch.save(outcomes, f"{folder}/outcomes.pt")
    dist.barrier()  # who leaves while another still receives breaks its connection
    dist.destroy_process_group()


def run_group(cases: list[OffloadCase], folder: Path) -> list[Outcome]:
    """Outcomes of ``cases``, all of one world size, in processes of their own."""
    world = cases[0].world
    mp.spawn(_worker, (world, str(folder), cases), nprocs=world)
    return [Outcome(*outcome) for outcome in torch.load(folder / "outcomes.pt")]
