"""Runs parity cases in a group of gloo processes, and the same training in plain PyTorch (``runtime.reference``)."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from estimator.job import ModelSpec, Strategy
from runtime import initialize, process_group
from runtime.models import Decoder
from runtime.reference import PARITY_OPTIMIZER, train_plain
from tests.runtime import tiny

STEPS, BATCH, SEQ = 20, 2, 16


class Case(NamedTuple):
    stage: int
    world: int
    dtype: str
    accumulation: int
    offload: str
    clip: float = 0.0
    recompute: str = "none"
    grad_dtype: str = "model"

    @property
    def model(self) -> ModelSpec:
        """GPT without accumulation, Llama with it: both kinds meet every stage, offload, dtype and world size."""
        return tiny.GPT if self.accumulation == 1 else tiny.LLAMA

    @property
    def strategy(self) -> Strategy:
        return Strategy(
            zero_stage=self.stage, offload=self.offload, dtype=self.dtype, grad_clip=self.clip,  # type: ignore[arg-type]
            recompute=self.recompute, bucket_bytes=20_000, grad_dtype=self.grad_dtype,  # type: ignore[arg-type]
        )  # fmt: skip


MATRIX = [
    Case(stage, world, dtype, accumulation, offload)
    for world, stage, dtype, accumulation, offload in itertools.product(
        (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16"), (1, 4), ("none", "optimizer", "optimizer,param")
    )
]
EXTRA = [
    Case(stage, world, dtype, 4, offload, clip=0.5, recompute=recompute)
    for world, stage, (dtype, offload, recompute) in itertools.product(
        (1, 2), (0, 1, 2, 3), (("fp32", "none", "full"), ("bf16", "optimizer", "selective"), ("fp16", "none", "none"))
    )
]


class Outcome(NamedTuple):
    losses: list[float]
    params: dict[str, Tensor]
    bytes: dict[str, int]
    calls: dict[str, int]


def batch(micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """The same few sequences in every step, so that they can be learnt."""
    generator = torch.Generator().manual_seed(10 * micro + rank)
    ids = torch.randint(61, (BATCH, SEQ + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def run_engine(case: Case, rank: int) -> Outcome:
    torch.manual_seed(0)
    model = Decoder(case.model)
    model.reset_parameters(0)
    engine = initialize(
        model=model, strategy=case.strategy, n_micro_batches=case.accumulation, optimizer=PARITY_OPTIMIZER
    )
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for micro in range(case.accumulation):
            loss = engine(*batch(micro, rank))
            total += loss.detach()
            engine.backward(loss)
            engine.step()
        if case.world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / (case.accumulation * case.world))
    return Outcome(losses, engine.full_parameters(), dict(engine.comm.bytes), dict(engine.comm.calls))


def run_plain(case: Case) -> Outcome:
    """The same training in plain PyTorch."""
    torch.set_num_threads(1)
    model = Decoder(case.model)
    model.reset_parameters(0)
    plain = train_plain(
        model, case.strategy, PARITY_OPTIMIZER, lambda _, rank, micro: batch(micro, rank),
        n_ranks=case.world, n_micro_batches=case.accumulation, steps=STEPS,
    )  # fmt: skip
    totals = [sum(itertools.chain.from_iterable(step)) for step in plain.losses]
    return Outcome([total / (case.accumulation * case.world) for total in totals], plain.params, {}, {})


def worker(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        outcomes = {case: run_engine(case, rank) for case in cases}
    if rank == 0:
        torch.save({tuple(case): tuple(outcome) for case, outcome in outcomes.items()}, f"{folder}/outcomes.pt")


def gloo_group(rank: int, world: int, folder: str) -> AbstractContextManager[None]:
    """Inside, this process is one of ``world`` ranks that meet in ``folder``; one rank needs no group."""
    where = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": world}
    return process_group("gloo", **where) if world > 1 else nullcontext()  # type: ignore[arg-type]
