"""Runs on tensors without data, and how their live bytes are held against the forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.job import Job, ModelSpec
from estimator.memory.reader import StepMemory
from estimator.predict import lay_out, memory_of
from runtime.session import Device, Measurement, SessionOptions, run_session
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


def metered(job: Job, device: Device = "meta", rank: int = 0) -> Measurement:
    """What one rank of ``job`` measures; over the fake group where it has several."""
    if job.cluster.n_gpus > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.cluster.n_gpus)
    try:
        return run_session(job, device, SessionOptions(steps=1, warmup=1), rank=rank)
    finally:
        if job.cluster.n_gpus > 1:
            dist.destroy_process_group()


def check(job: Job, rank: int = 0) -> Measurement:
    """A ``meta`` run of ``job``, whose live bytes are the forecast's."""
    got = metered(job, rank=rank)
    is_server = job.mesh.data_place(rank) < job.strategy.n_servers
    compare(got, memory_of(lay_out(job, is_server=is_server)))
    return got


def compare(got: Measurement, want: StepMemory) -> None:
    for category in STATES:
        assert want.category_peak_bytes.get(category, 0) == got.category_peak_bytes.get(category, 0), category
    assert want.host_peak_bytes == got.host_bytes
    assert want.peak_bytes == pytest.approx(got.peak_allocated_bytes, rel=1e-3)
    for category in ("activations", "logits_loss"):
        held = want.category_peak_bytes.get(category, 0)  # the first ranks of a pipeline have no loss
        assert held == pytest.approx(got.category_peak_bytes.get(category, 0), rel=1e-3, abs=64)
    assert want.peak_where == got.peak_where
    assert want.phase_peak_bytes.keys() == got.phase_peak_bytes.keys()
    for phase, n_bytes in got.phase_peak_bytes.items():
        assert want.phase_peak_bytes[phase] == pytest.approx(n_bytes, rel=5e-3, abs=64), phase  # scalars
