"""Forecast memory and traffic of models with experts and latent attention equal the meter's, for every stage and recomputation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, traffic_of
from tests.runtime import experts, test_fake_cpu, tiny
from tests.runtime.memory import check

WIDE: dict[str, Any] = {"d_model": 128, "vocab_size": 1024, "max_positions": 64, "d_ff": 344}
MODELS: dict[str, ModelSpec] = {
    "mixtral": replace(experts.MIXTRAL, **WIDE, n_heads=4, n_kv_heads=2, head_dim=32,
                       experts=replace(experts.MIXTRAL.experts, d_ff=344)),
    "qwen-moe": replace(experts.QWEN_MOE, **WIDE, n_heads=4, n_kv_heads=1, head_dim=32,
                        experts=replace(experts.QWEN_MOE.experts, d_ff=96, shared_d_ff=200)),
    "deepseek-v2": replace(experts.DEEPSEEK_V2, **WIDE, n_heads=4, head_dim=48, latent=replace(
        experts.DEEPSEEK_V2.latent, kv_rank=64, nope_head_dim=32, rope_head_dim=16, value_head_dim=48)),
    "deepseek-v3": replace(experts.DEEPSEEK_V3, **WIDE, n_heads=4, head_dim=48, latent=replace(
        experts.DEEPSEEK_V3.latent, kv_rank=64, q_rank=96, nope_head_dim=32, rope_head_dim=16, value_head_dim=32),
        experts=replace(experts.DEEPSEEK_V3.experts, d_ff=96, shared_d_ff=96)),
    "biased": replace(experts.BIASED, **WIDE, n_heads=4, n_kv_heads=2, head_dim=32,
                      experts=replace(experts.BIASED.experts, d_ff=200)),
}  # fmt: skip
STAGES, RECOMPUTES, DTYPES = (0, 1, 2, 3), ("none", "selective", "full"), ("bf16", "fp32", "fp16")
GRID = list(itertools.product(MODELS, STAGES, RECOMPUTES, DTYPES, (0.0, 1.25)))
"""model x stage x recomputation x dtype x capacity factor (0: dropless): 360 cases."""
FAST = GRID[::17]


def case(model: str, stage: int, recompute: str, dtype: str, capacity_factor: float) -> Job:
    spec = MODELS[model]
    assert spec.experts is not None
    spec = replace(spec, experts=replace(spec.experts, capacity_factor=capacity_factor))
    strategy = Strategy(
        zero_stage=stage, recompute=recompute, dtype=dtype, bucket_bytes=300_000, prefetch_depth=1 + stage % 2,  # type: ignore[arg-type]
    )  # fmt: skip
    world = 1 if stage == 0 and recompute == "none" else 8
    return tiny.job(spec, strategy, world=world, n_micro_batches=1 + stage % 2, micro_batch=4, seq_len=64)


PARTS = ("attention", "mlp", "activation,norms", "attention,norms")
OFF = ("all", "rms_norm", "gated_activation", "rotary", "linear_cross_entropy")


def check_all(job: Job) -> None:
    got = check(job)
    assert (got.collective_bytes, got.collective_calls, got.copy_bytes) == traffic_of(lay_out(job).program)


@pytest.mark.parametrize("case_args", FAST, ids=lambda a: "-".join(map(str, a)))
def test_peak_and_states(case_args: tuple) -> None:
    check_all(case(*case_args))


@pytest.mark.slow
@pytest.mark.parametrize("case_args", [c for c in GRID if c not in set(FAST)], ids=lambda a: "-".join(map(str, a)))
def test_peak_and_states_everywhere(case_args: tuple) -> None:
    check_all(case(*case_args))


@pytest.mark.parametrize("recompute", PARTS)
@pytest.mark.parametrize("model", MODELS)
def test_parts_of_blocks_recomputed(model: str, recompute: str) -> None:
    check_all(case(model, 3, recompute, "bf16", 0.0 if "norms" in recompute else 1.25))


@pytest.mark.parametrize("off", OFF)
def test_kernels_switched_off(off: str) -> None:
    for model in ("qwen-moe", "deepseek-v3"):
        job = case(model, 0, "none", "bf16", 0.0)
        check_all(replace(job, strategy=replace(job.strategy, kernels_off=(off,))))


def test_every_second_block_recomputed_with_activations_on_the_host() -> None:
    """Dense blocks, blocks with experts, and both again recomputing."""
    for model in ("qwen-moe", "deepseek-v2"):
        job = case(model, 2, "full", "bf16", 0.0)
        check_all(replace(job, strategy=replace(job.strategy, recompute_every=2)))
        check_all(replace(job, strategy=replace(job.strategy, activation_offload=True)))


@pytest.mark.slow
def test_no_buffer_depends_on_what_the_router_chooses(tmp_path: Path) -> None:
    """A gloo process, whose router chooses, meters what ``fake`` does, whose router has no numbers to choose by."""
    names = [spec.name.removeprefix("tiny-") for spec in experts.ALL]
    cases = [
        {"model": name, "zero": i % 4, "dtype": ("fp32", "bf16")[i % 2], "offload": ("none", "optimizer")[i % 2],
         "recompute": RECOMPUTES[i % 3], "micro_batch": 1 + i % 3, "n_micro_batches": 1 + i % 2}
        for i, name in enumerate(names)
    ]  # fmt: skip
    test_fake_cpu.check(2, cases, tmp_path)
