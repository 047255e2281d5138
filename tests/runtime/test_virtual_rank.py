"""One process over the fake group plays one rank of a real job: same live bytes, same traffic, finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.job import Strategy
from estimator.predict import lay_out, memory_of
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny


@pytest.fixture(autouse=True)
def group_of_four() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer,param"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_virtual_rank_trains_on_plausible_values(stage: int, offload: str) -> None:
    strategy = Strategy(zero_stage=stage, offload=offload, dtype="fp32", bucket_bytes=20_000)  # type: ignore[arg-type]
    job = tiny.job(tiny.GPT, strategy, world=4, n_micro_batches=2, arch="cpu")
    measured = run_session(job, "cpu", SessionOptions(steps=2, warmup=1), rank=1)
    forecast = memory_of(lay_out(job))
    assert all(math.isfinite(loss) for loss in measured.losses)
    for category in ("params", "grads", "optimizer_state", "gathered_params", "reduce_buckets"):
        assert measured.category_peak_bytes.get(category, 0) == forecast.category_peak_bytes.get(category, 0)
    assert measured.peak_allocated_bytes == pytest.approx(forecast.peak_bytes, rel=1e-3)
