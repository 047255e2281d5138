"""The engine on each device that there is: the same logic on the CPU, which always runs, and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from estimator.job import Strategy
from estimator.predict import lay_out, memory_of
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.memory import MODELS

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer,param"])
def test_live_bytes_are_the_forecast(device: str, offload: str, recompute: str) -> None:
    """States to the byte, the metered peak within 1% (random seeds, dtypes of statistics), finite losses."""
    strategy = Strategy(dtype="bf16", offload=offload, recompute=recompute, bucket_bytes=300_000)  # type: ignore[arg-type]
    arch = "cpu" if device == "cpu" else "hopper"
    job = tiny.job(MODELS["llama"], strategy, n_micro_batches=2, micro_batch=4, seq_len=64, arch=arch)
    measured = run_session(job, device, SessionOptions(steps=4, warmup=1, lr=1e-2))  # type: ignore[arg-type]
    forecast = memory_of(lay_out(job))
    for category in ("params", "grads", "master_params", "optimizer_state", "gathered_params"):
        assert measured.category_peak_bytes.get(category, 0) == forecast.category_peak_bytes.get(category, 0), category
    assert measured.host_bytes == forecast.host_peak_bytes
    assert measured.peak_allocated_bytes == pytest.approx(forecast.peak_bytes, rel=1e-2)
    assert all(math.isfinite(loss) for loss in measured.losses)
    assert min(measured.losses) < math.log(MODELS["llama"].vocab_size) + 1
    assert (measured.part_seconds["recompute"] > 0) == (recompute != "none")
