"""Jobs small enough to run in a test, and reports about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.job import Cluster, Gpu, Host, Job, ModelSpec, Strategy, Workload
from estimator.job.files import job_to_dict
from estimator.report import StepReport

MakeJob = Callable[..., Job]
MakeReport = Callable[..., StepReport]


def _job(
    n_gpus: int = 1, micro_batch: int = 1, zero: int = 0, seq_len: int = 16, memory_bytes: int = 8 << 30, **model: Any
) -> Job:
    gpu = Gpu(
        name="test-gpu", arch="hopper", memory_bytes=memory_bytes, memory_bytes_per_s=1e10, peak_flops={"fp32": 1e11, "fp16": 2e11, "bf16": 2e11}, n_sms=132,
        l2_bytes=1 << 20, link_bytes_per_s=1e9, host_link_bytes_per_s=1e9,
    )  # fmt: skip
    shape: dict[str, Any] = dict(
        name="tiny", family="custom", n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=64,
        max_positions=64, **model,
    )  # fmt: skip
    return Job(
        model=ModelSpec(**shape),
        workload=Workload(seq_len=seq_len, micro_batch_size=micro_batch, global_batch_size=micro_batch * n_gpus),
        strategy=Strategy(zero_stage=zero, dtype="fp32"),
        cluster=Cluster(
            gpu=gpu, n_gpus=n_gpus, gpus_per_node=n_gpus, internode_bytes_per_s=1e9,
            host=Host(memory_bytes=8 << 30, n_cores=2, memory_bytes_per_s=1e10),
        ),
    )  # fmt: skip


@pytest.fixture
def make_job() -> MakeJob:
    """Builds a tiny job; ``n_gpus``, ``micro_batch``, ``zero`` and the model's fields can be chosen."""
    return _job


@pytest.fixture
def make_report() -> MakeReport:
    """Builds a full measured report of a tiny job; any field can be replaced."""

    def make(job: Job | None = None, **changes: Any) -> StepReport:
        job = job or _job()
        fields: dict[str, Any] = {
            "origin": "cpu", "job_key": job.key, "job": job_to_dict(job), "peak_allocated_bytes": 1000, "peak_phase": "backward",
            "category_peak_bytes": {"params": 400, "grads": 400}, "category_bytes_at_peak": {"params": 400, "grads": 400},
            "phase_peak_bytes": {"forward": 800}, "step_s": 0.25, "time_parts_s": {"forward": 0.1, "backward": 0.15}, "step_spread_s": 0.01,
            "tokens_per_s": 64.0, "collective_bytes": {"all_gather": 128}, "fits": True, "notes": ("warm", "cold, \"quoted\""),
            "provenance": {"date_utc": "2025-01-01T00:00:00+00:00", "cores": 2, "losses": [1.5, 1.25]},
        }  # fmt: skip
        return StepReport(**{**fields, **changes})

    return make
