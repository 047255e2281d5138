"""Groups of ranks and compressed messages: ``fake`` says what four gloo processes meter, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from estimator.job import Job, Strategy
from estimator.predict import lay_out, memory_of
from tests.runtime import test_fake_cpu, tiny
from tests.runtime.memory import metered
from tests.runtime.test_fake_cpu import MEMORY

CASES: list[dict[str, Any]] = [
    {"zero_stage": 2, "shard_size": 2, "dtype": "bf16", "offload": "optimizer"},
    {"zero_stage": 3, "shard_size": 2, "secondary_shard": 2, "dtype": "fp32"},
    {"zero_stage": 3, "quantized_weights": True, "secondary_shard": 2, "quantized_grads": 2, "dtype": "bf16"},
    {"zero_stage": 2, "quantized_grads": 4, "dtype": "fp16"},
    {"zero_stage": 0, "grad_compression": "one_bit", "dtype": "bf16", "grad_dtype": "fp32"},
    {"zero_stage": 1, "grad_compression": "one_bit", "dtype": "fp32", "offload": "optimizer"},
    {"zero_stage": 1, "grad_compression": "adacomp", "dtype": "bf16"},
    {"zero_stage": 0, "grad_compression": "one_bit", "compression_warmup_steps": 1, "grad_clip": 0.0, "dtype": "bf16"},
    {
        "zero_stage": 2,
        "shard_size": 2,
        "dtype": "bf16",
        "master_dtype": "model",
        "state_dtype": "model",
        "offload": "optimizer",
    },
]


def job_of(case: dict[str, Any], world: int) -> Job:
    return tiny.job(tiny.GPT, Strategy(**case), world=world, n_micro_batches=2, arch="cpu")


def rank_of(rank: int, folder: str) -> None:
    test_fake_cpu.job_of = job_of  # type: ignore[assignment]  # in this process of its own
    test_fake_cpu.real_rank(rank, 4, folder, CASES)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fake_equals_cpu_to_the_byte(tmp_path: Path) -> None:
    mp.spawn(rank_of, (str(tmp_path),), nprocs=4)

    for i, case in enumerate(CASES):
        rank, job = i % 4, job_of(case, 4)
        real = json.loads((tmp_path / f"{rank}.json").read_text())[i]
        fake = metered(job, "fake-cpu", rank)
        assert not dist.is_initialized()
        assert {name: getattr(fake, name) for name in MEMORY} == real, case
        assert memory_of(lay_out(job)).category_peak_bytes["params"] == real["category_peak_bytes"]["params"]
