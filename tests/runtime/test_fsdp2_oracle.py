"""Forecasts for ``framework = "fsdp2"`` against PyTorch's own ``fully_shard``."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from estimator.job import Job
from tests.runtime.fully_sharded import Tracker, case, forecast, tracked_step

fsdp2 = partial(case, "fsdp2")

CASES = [
    fsdp2("tiny-llama", 2, 3, slow=False),
    fsdp2("tiny-llama", 2, 2, slow=False),
    fsdp2("tiny-llama", 4, 3, micro=3, slow=False),
    fsdp2("tiny-llama", 8, 3, dtype="fp32", grads="model", slow=False),
    fsdp2("tiny-llama", 1, 3, slow=False),
    fsdp2("tiny-gpt", 4, 3, rows=4),
    fsdp2("tiny-gpt", 16, 2, grads="model", micro=2),
    fsdp2("tiny-gpt", 64, 3, again="full"),
    fsdp2("tiny-qwen3", 3, 3, micro=2),
    fsdp2("tiny-qwen3", 8, 2, again="full", micro=2),
    fsdp2("tiny-neox", 4, 3, grads="model", slow=False),
    fsdp2("tiny-neox", 32, 2, dtype="fp32", grads="model", again="full"),
    fsdp2("tiny-gemma2", 8, 3, again="full"),
    fsdp2("tiny-gemma2", 2, 2, rows=8),
    fsdp2("wide-llama", 8, 3),
    fsdp2("wide-llama", 8, 3, again="full", rows=16),
    fsdp2("wide-llama", 48, 2, micro=2),
    fsdp2("wide-llama", 5, 3, grads="model", micro=2),
    fsdp2("deep-llama", 4, 3, rows=8),
    fsdp2("deep-llama", 16, 3, again="full", micro=2, rows=8),
    fsdp2("deep-llama", 16, 2, again="full", rows=8),
    fsdp2("deep-llama", 64, 3, dtype="fp32", grads="model"),
    fsdp2("deep-llama", 7, 2, rows=1),
    fsdp2("odd-qwen3", 6, 3),
    fsdp2("odd-qwen3", 64, 3, micro=2, again="full"),
    fsdp2("odd-qwen3", 24, 2, grads="model"),
    fsdp2("tiny-llama", 4, 3, apart=True, slow=False),
    fsdp2("deep-llama", 16, 3, apart=True, micro=2),
    fsdp2("deep-llama", 8, 3, apart=True, again="full", rows=8),
    fsdp2("wide-llama", 8, 2, apart=True),
]


@pytest.mark.parametrize("job", CASES)
def test_peak_is_that_of_fully_shard(job: Job) -> None:
    held, peak = tracked_step(job)
    memory = forecast(job)
    assert sum(memory.phase_category_bytes["init"].values()) == held
    assert memory.peak_bytes == pytest.approx(peak, rel=0.005)


def test_a_tracker_sees_what_is_emptied_and_refilled() -> None:
    with (tracker := Tracker()):
        x = torch.zeros(256)
        x.untyped_storage().resize_(0)
        torch.zeros(16)
        assert tracker.live == 64
        x.untyped_storage().resize_(2048)
        torch.zeros(16)
    assert tracker.peak == 2048 + 64
