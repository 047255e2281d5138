"""Forecast memory equals the meter's: model states to the byte, the peak to a few bytes of scalars."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from estimator.job import Job, Strategy
from tests.runtime import tiny
from tests.runtime.memory import MODELS, check

STAGES, OFFLOADS, RECOMPUTES = (0, 1, 2, 3), ("none", "optimizer", "optimizer,param"), ("none", "selective", "full")
GRID = list(itertools.product(("gpt", "llama"), STAGES, OFFLOADS, RECOMPUTES, (1, 4), (1, 2, 8, 64)))
"""model x stage x offload x recompute x micro-batch x world size: 576 cases."""
FAST = GRID[::7] + GRID[3::16]


def case(model: str, stage: int, offload: str, recompute: str, micro_batch: int, world: int) -> Job:
    index = stage + micro_batch + len(offload) + world
    strategy = Strategy(
        zero_stage=stage, offload=offload, recompute=recompute, dtype=("bf16", "fp32", "fp16")[index % 3],  # type: ignore[arg-type]
        bucket_bytes=300_000, prefetch_depth=1 + index % 2,
    )  # fmt: skip
    return tiny.job(
        MODELS[model], strategy, world=world, n_micro_batches=1 + index % 3, micro_batch=micro_batch, seq_len=64
    )


@pytest.mark.parametrize("case_args", FAST, ids=lambda a: "-".join(map(str, a)))
def test_peak_and_states(case_args: tuple) -> None:
    check(case(*case_args))


@pytest.mark.slow
@pytest.mark.parametrize("case_args", [c for c in GRID if c not in set(FAST)], ids=lambda a: "-".join(map(str, a)))
def test_peak_and_states_everywhere(case_args: tuple) -> None:
    check(case(*case_args))


@pytest.mark.parametrize("model", ["qwen3", "neox", "gemma2"])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_other_architectures(model: str, recompute: str) -> None:
    check(case(model, 3, "none", recompute, 4, 8))
    check(case(model, 1, "none", recompute, 4, 2))


OFF = ("all", "rms_norm,layer_norm", "rotary", "activation,gated_activation", "linear_cross_entropy",
       "linear_cross_entropy,cross_entropy", "adam", "grad_norm", "adam,rms_norm,linear_cross_entropy")  # fmt: skip


def without(job: Job, off: str) -> Job:
    return replace(job, strategy=replace(job.strategy, kernels_off=tuple(off.split(","))))


@pytest.mark.parametrize("off", OFF)
def test_kernels_switched_off(off: str) -> None:
    """Two models each; the slow test below has all."""
    for model in ("llama", "gpt") if len(off) % 2 else ("qwen3", "neox"):
        check(without(case(model, 0, "none", "none", 4, 1), off))


@pytest.mark.slow
@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("model", list(MODELS))
def test_kernels_switched_off_everywhere(model: str, recompute: str, off: str) -> None:
    for micro_batch in (1, 4):
        check(without(case(model, 3, "none", recompute, micro_batch, 8), off))


@pytest.mark.parametrize("arch", ["ampere", "blackwell", "volta", "cdna3"])
def test_other_chips(arch: str) -> None:
    """Grids, and with them partial sums, depend on the chip; AMD's has none of the kernels."""
    job = case("llama", 0, "none", "none", 4, 1)
    for n_sms in (108, 0) if arch == "ampere" else (80,):
        gpu = replace(job.cluster.gpu, arch=arch, n_sms=n_sms)
        check(replace(job, cluster=replace(job.cluster, gpu=gpu)))


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_every_rank_holds_the_same(rank: int) -> None:
    job = case("llama", 3, "optimizer", "none", 1, 8)
    check(job, rank)
