"""Forecast memory equals the meter's: model states to the byte, the peak to a few bytes of scalars."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.job import Job, ModelSpec, Strategy
from estimator.memory.reader import StepMemory
from estimator.predict import lay_out, memory_of
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime import tiny

STATES = ("params", "grads", "master_params", "optimizer_state", "gathered_params", "reduce_buckets", "offload_staging",
          "workspace")  # fmt: skip
WIDE = {"n_layers": 3, "d_model": 128, "head_dim": 32, "n_heads": 4, "vocab_size": 1024, "max_positions": 64}
MODELS: dict[str, ModelSpec] = {
    "gpt": replace(tiny.GPT, **WIDE, n_kv_heads=4, d_ff=512, position_rows=64),
    "llama": replace(tiny.LLAMA, **WIDE, n_kv_heads=2, d_ff=344),
    "qwen3": replace(tiny.QWEN3, **WIDE, n_kv_heads=1, d_ff=344),
    "neox": replace(tiny.NEOX, **WIDE, n_kv_heads=4, d_ff=512),
    "gemma2": replace(tiny.GEMMA2, **WIDE, n_kv_heads=2, d_ff=344),
}

STAGES, OFFLOADS, RECOMPUTES = (0, 1, 2, 3), ("none", "optimizer", "optimizer,param"), ("none", "selective", "full")
GRID = list(itertools.product(("gpt", "llama"), STAGES, OFFLOADS, RECOMPUTES, (1, 4), (1, 2, 8, 64)))
"""model x stage x offload x recompute x micro-batch x world size: 576 cases."""
FAST = GRID[::7] + GRID[3::16]


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def fake_run(job: Job, rank: int = 0) -> Measurement:
    if job.dp > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.dp)
    return run_session(job, "meta", SessionOptions(), rank=rank)


def check(job: Job) -> None:
    compare(fake_run(job), memory_of(lay_out(job)))


def compare(got: Measurement, want: StepMemory) -> None:
    for category in STATES:
        assert want.category_peak_bytes.get(category, 0) == got.category_peak_bytes.get(category, 0), category
    assert want.host_peak_bytes == got.host_bytes
    assert want.peak_bytes == pytest.approx(got.peak_allocated_bytes, rel=1e-3)
    for category in ("activations", "logits_loss"):
        assert want.category_peak_bytes[category] == pytest.approx(got.category_peak_bytes[category], rel=1e-3)
    assert want.peak_where == got.peak_where
    assert want.phase_peak_bytes.keys() == got.phase_peak_bytes.keys()
    for phase, n_bytes in got.phase_peak_bytes.items():
        assert want.phase_peak_bytes[phase] == pytest.approx(n_bytes, rel=5e-3, abs=64), phase  # scalars


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
    dist.destroy_process_group()
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
    for dtype_and_offload in (1, 4):
        check(without(case(model, 3, "none", recompute, dtype_and_offload, 8), off))
        dist.destroy_process_group()


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
    assert fake_run(job, rank).peak_allocated_bytes == pytest.approx(memory_of(lay_out(job)).peak_bytes, rel=1e-3)
