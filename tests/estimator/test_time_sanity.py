"""What no constant may break: a faster machine is never slower, and no step is faster than its products or its critical path."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from estimator.time.stack import RANGES, Stack

SLACK = 1 + 1e-9


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Jobs of all frameworks on 8 to 128 GPUs."""
    framework = draw(st.sampled_from(("zerocast", "composer", "fsdp2", "deepspeed", "megatron")))
    pp, tp = (draw(st.sampled_from((1, 2, 4))) for _ in range(2)) if framework == "megatron" else (1, 1)
    zero = draw(st.sampled_from((0, 1) if framework == "megatron" else (0, 2, 3)))
    micro_batch, rounds = draw(st.sampled_from((1, 4))), draw(st.sampled_from((1, 8)))
    gpus = draw(st.sampled_from((16, 64, 128)))
    return build_job(
        JobOptions(
            model=draw(st.sampled_from(("llama-3.2-1b", "llama-2-7b", "gpt2-medium"))), gpu=draw(st.sampled_from(("a100-80", "h100-sxm"))),
            gpus=gpus, framework=framework, zero=zero, pp=pp, tp=tp, seq_len=1024, micro_batch=micro_batch,
            global_batch=micro_batch * rounds * gpus // (tp * pp), recompute=draw(st.sampled_from(("none", "full"))),
        )
    )  # fmt: skip


def seconds(job: Job, stack: Stack | None = None) -> float:
    step_s = predict(job, stack=stack).step_s
    assert step_s is not None
    return step_s


@settings(max_examples=25, deadline=None)
@given(jobs())
def test_a_faster_network_is_never_slower(job: Job) -> None:
    cluster = job.cluster
    wider = replace(cluster, internode_bytes_per_s=2 * cluster.internode_bytes_per_s)
    gpu = replace(cluster.gpu, link_bytes_per_s=2 * cluster.gpu.link_bytes_per_s)
    assert seconds(replace(job, cluster=wider)) <= seconds(job) * SLACK
    assert seconds(replace(job, cluster=replace(cluster, gpu=gpu))) <= seconds(job) * SLACK


@settings(max_examples=25, deadline=None)
@given(jobs())
def test_a_step_takes_at_least_its_products_at_the_peak(job: Job) -> None:
    report = predict(job)
    assert report.model_flops is not None and report.step_s is not None
    floor_s = report.model_flops / (job.cluster.n_gpus * job.cluster.gpu.peak_flops["bf16"])
    assert report.step_s >= floor_s
    assert sum(report.time_parts_s.values()) == pytest.approx(report.step_s)


@settings(max_examples=15, deadline=None)
@given(jobs(), st.sampled_from(sorted(RANGES)))
def test_better_constants_are_never_slower(job: Job, name: str) -> None:
    r = RANGES[name]
    usual = Stack(**{n: v.prior for n, v in RANGES.items()})
    slow, fast = replace(usual, **{name: r.low}), replace(usual, **{name: r.high})
    if name in ("contention", "straggling", "step_s", "issue_s"):  # the others are rates and shares: more is better
        slow, fast = fast, slow
    assert seconds(job, fast) <= seconds(job, slow) * SLACK


@pytest.mark.parametrize("gpus", [1, 2])
def test_one_gpu_has_no_network(gpus: int) -> None:
    job = build_job(JobOptions(model="gpt2", gpu="a100-80", gpus=gpus, zero=3))
    report = predict(job)
    exposed = sum(report.time_parts_s[name] for name in ("exposed_gather", "exposed_reduce"))
    assert (exposed == 0.0) == (gpus == 1)


def test_an_unknown_framework_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="framework is 'fsdp3'"):
        build_job(JobOptions(model="gpt2", gpu="a100-80", gpus=8, framework="fsdp3"))
