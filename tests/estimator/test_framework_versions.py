"""What older versions of frameworks did otherwise: recomputation to the end of a block, gradients added by passes of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.job.strategy import Strategy
from estimator.ops.cost import UnitCost
from estimator.predict import lay_out, predict
from validator.published.cases import TABLE
from validator.published.expression import job_of
from validator.published.runs import read_runs


def job(**options: Any) -> Job:
    strategy = {name: options.pop(name) for name in ("whole_recompute", "grad_fusion") if name in options}
    plain = build_job(JobOptions(model="mpt-7b", gpu="a100-80", gpus=8, seq_len=512, **options))
    return replace(plain, strategy=replace(plain.strategy, **strategy))


def block(of: Job) -> UnitCost:
    return lay_out(of).costs[1]


def flops(ops: Any) -> float:
    return sum(op.flops for op in ops if op.kind == "matmul")


def test_a_block_that_runs_to_its_end_makes_its_last_product_again() -> None:
    early, whole = (job(framework="composer", zero=3, recompute="full", whole_recompute=w) for w in (False, True))
    d, rows = early.model.d_model, early.tokens_per_micro_batch
    assert flops(block(whole).recompute) == flops(block(whole).forward)
    assert flops(block(whole).recompute) - flops(block(early).recompute) == 2 * rows * 4 * d * d
    assert predict(whole).step_s > predict(early).step_s  # type: ignore[operator]
    assert early.key != whole.key == replace(whole).key


def test_gradients_without_fusion_are_read_and_added_once_more() -> None:
    fused, passes = (job(framework="megatron", zero=0, grad_fusion=f) for f in (True, False))
    added = [op for op in block(passes).backward if op.name == "accumulate_grad"]
    weights = sum(layer.shape[2] * layer.shape[3] for layer in block(fused).forward if layer.kind == "matmul")
    assert sum(op.n_bytes for op in added) >= 6 * weights  # bf16: two reads and a write
    assert sum(op.n_bytes for op in block(fused).backward if op.name == "accumulate_grad") < 0.01 * 6 * weights
    assert predict(passes).step_s > predict(fused).step_s  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"framework": "zerocast", "whole_recompute": True}, "never does so"),
        ({"framework": "megatron", "zero": 0, "whole_recompute": True}, "always does so"),
        ({"framework": "composer", "zero": 3, "grad_fusion": False}, "allowed: true"),
        ({"framework": "megatron", "zero": 0, "grad_fusion": 1}, "allowed: true or false"),
    ],
)
def test_frameworks_without_the_choice_refuse_it(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        job(**options)


def test_published_runs_are_of_the_versions_of_their_days() -> None:
    runs = {run.run_id: run for run in read_runs(TABLE)}

    def strategy(start: str) -> Strategy:
        return job_of(next(run for name, run in runs.items() if name.startswith(start))).strategy

    old, new = strategy("mosaic-a100_40gb-13b-s512"), strategy("mosaic-a100_80gb-13b-s1024")
    assert (old.whole_recompute, old.grads) == (True, "bf16")  # torch 1.13.1, as its note says
    assert (new.whole_recompute, new.grads) == (False, "fp32")  # torch 2.1, Composer 0.16.4
    assert not strategy("sc21-t1-18.4B").grad_fusion and strategy("seqsel-tab5-22B-full").grad_fusion
