"""Temporaries of torch's optimizers that go list by list, against FSDP's own steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.predict import lay_out, memory_of
from tests.runtime import tiny
from tests.runtime.fully_sharded import DEEP, forecast, tracked_step

TALL = replace(DEEP, n_layers=14, vocab_size=61)
"""Its step needs more than its passes."""


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "dtype"), [("fsdp1", "bf16"), ("fsdp2", "fp32")])
@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_the_peak_of_a_step_is_forecast(framework: str, dtype: str, impl: str) -> None:
    strategy = Strategy(
        zero_stage=3,
        dtype=dtype,
        grad_dtype="fp32",
        framework=framework,
        optimizer_impl=impl,  # type: ignore[arg-type]
    )
    job = tiny.job(TALL, strategy, world=2, micro_batch=1, seq_len=2, arch="cpu")
    memory = forecast(job)
    assert (memory.peak_phase == "optimizer") == (impl == "foreach")
    assert memory.peak_bytes == pytest.approx(tracked_step(job)[1], rel=0.005)


@pytest.mark.parametrize(("optimizer", "n_lists"), [("adamw", 1), ("sgd", 0), ("adagrad", 2)])
def test_lists_are_as_long_as_a_ranks_shards(optimizer: str, n_lists: int) -> None:
    def at_step(impl: str) -> int:
        strategy = Strategy(zero_stage=3, framework="fsdp2", optimizer=optimizer, optimizer_impl=impl)  # type: ignore[arg-type]
        return (
            memory_of(lay_out(tiny.job(TALL, strategy, world=8)))
            .phase_category_bytes["optimizer"]
            .get("temporaries", 0)
        )

    strategy = Strategy(zero_stage=3, framework="fsdp2")
    numel = sum(group.shard_numel for group in lay_out(tiny.job(TALL, strategy, world=8)).layout.groups)
    assert at_step("foreach") - at_step("fused") == 4 * numel * n_lists


@pytest.mark.parametrize("fields", [{"framework": "deepspeed"}, {}, {"framework": "fsdp2", "optimizer": "lion"}])
def test_other_steps_are_refused(fields: dict) -> None:
    with pytest.raises(InputError, match="optimizer_impl is 'foreach' with"):
        Strategy(zero_stage=3, optimizer_impl="foreach", **fields)
