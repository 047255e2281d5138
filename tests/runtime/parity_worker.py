"""Runs parity cases in a group of gloo processes, and the same training in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from estimator.job import ModelSpec, Strategy
from runtime import OptimizerConfig, initialize
from runtime.models import Decoder
from runtime.storage import TORCH_DTYPES
from tests.runtime import tiny

STEPS, BATCH, SEQ = 20, 2, 16
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5)
"""eps is raised because a key bias has a gradient of exactly zero in theory: Adam turns its rounding noise into steps."""


class Case(NamedTuple):
    stage: int
    world: int
    dtype: str
    accumulation: int
    offload: str
    clip: float = 0.0
    recompute: str = "none"

    @property
    def model(self) -> ModelSpec:
        """GPT without accumulation, Llama with it: both kinds meet every stage, offload, dtype and world size."""
        return tiny.GPT if self.accumulation == 1 else tiny.LLAMA

    @property
    def strategy(self) -> Strategy:
        return Strategy(
            zero_stage=self.stage, offload=self.offload, dtype=self.dtype, grad_clip=self.clip,  # type: ignore[arg-type]
            recompute=self.recompute, bucket_bytes=20_000,  # type: ignore[arg-type]
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
    engine = initialize(model=model, strategy=case.strategy, n_micro_batches=case.accumulation, optimizer=OPTIMIZER)
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
    """Plain PyTorch in one process: the ranks' batches one after another, one fused AdamW on fp32 parameters.

    Gradients are added in the order that the stage prescribes: over micro-batches first where they stay local
    (stages 0, 1), over ranks first where every micro-batch is reduced (2, 3).
    """
    torch.set_num_threads(1)
    dtype = TORCH_DTYPES[case.dtype]
    model = Decoder(case.model)
    model.reset_parameters(0)
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(dtype)
    params = list(model.parameters())
    adam = torch.optim.AdamW(
        masters,
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    scale = 2.0**16 if case.dtype == "fp16" else 1.0
    losses = []
    for _ in range(STEPS):
        total, grads = _summed_gradients(model, params, case, scale)
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad.float() / (case.world * scale)
        overflow = not all(bool(torch.isfinite(m.grad).all()) for m in masters if m.grad is not None)
        if overflow:
            scale /= 2
        else:
            if case.clip:
                torch.nn.utils.clip_grad_norm_(masters, case.clip)
            adam.step()
        with torch.no_grad():
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
        losses.append(total / (case.accumulation * case.world))
    names = [name for name, _ in model.named_parameters()]
    return Outcome(losses, dict(zip(names, masters, strict=True)), {}, {})


def _summed_gradients(
    model: Decoder, params: list[torch.nn.Parameter], case: Case, scale: float
) -> tuple[float, list[Tensor]]:
    """Sum of the losses and gradients of all micro-batches of all ranks, added in the order of ``case``'s stage."""
    ranks_first = case.stage >= 2 and case.world > 1
    outer_range, inner_range = range(case.world), range(case.accumulation)
    if ranks_first:
        outer_range, inner_range = inner_range, outer_range
    total, outer_sum = 0.0, None
    for outer in outer_range:
        inner_sum = None
        for inner in inner_range:
            micro, rank = (outer, inner) if ranks_first else (inner, outer)
            loss = model(*batch(micro, rank))
            total += loss.item()
            inner_sum = _plus(inner_sum, torch.autograd.grad(loss * (scale / case.accumulation), params))
        assert inner_sum is not None
        outer_sum = _plus(outer_sum, inner_sum)
    assert outer_sum is not None
    return total, outer_sum


def _plus(sums: list[Tensor] | None, more: Sequence[Tensor]) -> list[Tensor]:
    return list(more) if sums is None else [a + b for a, b in zip(sums, more, strict=True)]


def worker(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    outcomes: dict[Any, Outcome] = {}
    for case in cases:
        outcomes[case] = run_engine(case, rank)
    if rank == 0:
        torch.save({tuple(case): tuple(outcome) for case, outcome in outcomes.items()}, f"{folder}/outcomes.pt")
    if world > 1:
        dist.destroy_process_group()
