"""Forecasts for ``framework = "fsdp1"`` against PyTorch's own ``FullyShardedDataParallel``."""

from __future__ import annotations

from functools import partial

import pytest

from estimator.job import Job
from tests.runtime.fully_sharded import case, forecast, tracked_step

fsdp1 = partial(case, "fsdp1")

CASES = [
    fsdp1("tiny-llama", 4, 3, slow=False),
    fsdp1("tiny-llama", 4, 2, slow=False),
    fsdp1("tiny-llama", 2, 3, grads="model", micro=2, slow=False),
    fsdp1("tiny-llama", 4, 3, dtype="fp32", grads="model", micro=2, slow=False),
    fsdp1("tiny-gpt", 8, 3, grads="model", micro=2, again="full"),
    fsdp1("tiny-qwen3", 4, 2, micro=2),
    fsdp1("tiny-qwen3", 3, 3),
    fsdp1("tiny-neox", 16, 2, again="full"),
    fsdp1("tiny-gemma2", 8, 3, rows=8),
    fsdp1("wide-llama", 8, 3, micro=2),
    fsdp1("wide-llama", 64, 2, again="full", rows=16),
    fsdp1("deep-llama", 8, 3, again="full"),
    fsdp1("deep-llama", 16, 3, rows=8),
    fsdp1("deep-llama", 32, 2, grads="model", micro=2),
    fsdp1("odd-qwen3", 6, 3),
    fsdp1("odd-qwen3", 24, 2, dtype="fp32", grads="model", again="full"),
]


@pytest.mark.parametrize("job", CASES)
def test_peak_is_that_of_fully_sharded_data_parallel(job: Job) -> None:
    held, peak = tracked_step(job)
    memory = forecast(job)
    assert sum(memory.phase_category_bytes["init"].values()) == held
    assert memory.peak_bytes == pytest.approx(peak, rel=0.005)
