"""Remedies: each is a forecast of the changed job, and the order is that of what it saves for what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from estimator.report import StepReport
from estimator.units import format_bytes, format_seconds
from estimator.views import remedies as remedies_module
from estimator.views.remedies import Change, Remedies, changes, find_remedies
from estimator.views.words import memory_remedy_words, surprises, time_remedy_words

OPTIONS = JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=8, zero=2, seq_len=4096, micro_batch=4, global_batch=64)
JOB = build_job(OPTIONS)


@pytest.fixture(scope="module")
def found() -> Remedies:
    return find_remedies(JOB)


def test_each_remedy_is_the_forecast_of_the_changed_job(found: Remedies) -> None:
    assert found.base == predict(JOB) and not found.base.fits
    by_words = {remedy.change.words: remedy for remedy in found.tried}
    for words, flags in {
        "ZeRO stage 3": {"zero": 3},
        "recompute selective": {"recompute": "selective"},
        "recompute full": {"recompute": "full"},
        "micro-batch 2, twice the accumulation": {"micro_batch": 2},
        "micro-batch 1, more accumulation": {"micro_batch": 1},
        "offload optimizer": {"offload": "optimizer"},
        "tensor parallelism 2": {"tp": 2},
        "recompute full with offload of blocks' inputs": {"recompute": "full", "activation_offload": True},
    }.items():
        remedy, expected = by_words[words], predict(build_job(replace(OPTIONS, **flags)))
        assert remedy.report == expected
        assert remedy.saved_bytes == found.base.device_used_bytes - expected.device_used_bytes
        assert remedy.gained_s == found.base.step_s - expected.step_s


def test_what_makes_a_job_fit_comes_first_then_what_costs_least_time_for_its_bytes(found: Remedies) -> None:
    order = [(not r.report.fits, -r.bytes_per_s_lost) for r in found.for_memory]
    assert order == sorted(order) and len(order) > 5
    assert found.for_memory[0].report.fits and not found.for_memory[-1].report.fits
    least = 0.01 * found.base.device_used_bytes
    assert all(r.saved_bytes >= least for r in found.for_memory)
    assert {r.change.words for r in found.tried if r.saved_bytes >= least} == {r.change.words for r in found.for_memory}


def test_what_is_faster_fits_and_comes_by_seconds() -> None:
    job = build_job(replace(OPTIONS, zero=3, micro_batch=1, recompute="full"))
    found = find_remedies(job)
    assert found.base.fits and found.for_time[0].change.words == "no recomputation"
    assert all(r.report.fits and r.gained_s > 0 for r in found.for_time)
    gained = [r.gained_s for r in found.for_time]
    assert gained == sorted(gained, reverse=True)


def test_the_global_batch_stays_and_nothing_is_tried_twice(found: Remedies) -> None:
    assert {r.report.job["workload"]["global_batch_size"] for r in found.tried} == {64}
    keys = [r.report.job_key for r in found.tried]
    assert len(keys) == len(set(keys)) and JOB.key not in keys


def test_a_change_that_cannot_be_is_refused_with_its_reason(monkeypatch) -> None:
    job = build_job(replace(OPTIONS, micro_batch=1, global_batch=8))
    monkeypatch.setattr(
        remedies_module,
        "changes",
        lambda job: iter([Change("three", {}, 3), Change("ZeRO stage 3", {"zero_stage": 3})]),
    )
    found = find_remedies(job)
    ((words, reason),) = found.refused
    assert words == "three" and "global_batch is 8" in reason
    assert [r.change.words for r in found.tried] == ["ZeRO stage 3"]


@pytest.mark.parametrize(
    ("options", "words", "not_words"),
    [
        ({}, {"ZeRO stage 0", "ZeRO stage 1", "ZeRO stage 3"}, {"ZeRO stage 2", "torch.compile of blocks", "sequence parallelism"}),
        ({"zero": 3}, {"prefetch depth 0", "prefetch depth 2", "int8 messages of parameters (ZeRO++ qwZ)"}, set()),
        ({"tp": 2, "sequence_parallel": False}, {"sequence parallelism", "tensor parallelism 4", "tensor parallelism 1"}, set()),
        ({"framework": "fsdp2"}, {"torch.compile of blocks", "torch.compile of the loss", "ZeRO stage 3"}, {"ZeRO stage 1"}),
        ({"framework": "fsdp2", "attention": "eager"}, {"flash attention", "recompute core_attention"}, set()),
        ({"framework": "deepspeed"}, {"overlap_comm"}, {"prefetch depth 0"}),
        ({"gpus": 32, "micro_batch": 1}, {"shards over the 8 GPUs of a node, replicas across"}, set()),
        ({"offload": "optimizer"}, {"no offload", "the host's update one step late"}, {"offload optimizer"}),
        ({"pp": 2, "micro_batch": 1}, {"pipeline parallelism 4", "two chunks of the model per pipeline rank"}, set()),
        ({"recompute": "full"}, {"no recomputation", "offload of blocks' inputs"}, {"recompute full"}),
    ],
)  # fmt: skip
def test_what_is_asked_about_follows_from_the_job(options: dict, words: set[str], not_words: set[str]) -> None:
    asked = {change.words for change in changes(build_job(replace(OPTIONS, **options)))}
    assert words <= asked and not (not_words & asked)


def test_twice_as_fast_hardware_brings_no_more_than_what_it_is_waited_for() -> None:
    job = build_job(
        replace(OPTIONS, gpus=16, gpus_per_node=8, zero=3, micro_batch=1, internode_gbps=50.0, global_batch=16)
    )
    found = find_remedies(job)
    network = next(r for r in found.hardware if r.change.words.startswith("network between nodes"))
    waited_s = found.base.time_parts_s["exposed_gather"] + found.base.time_parts_s["exposed_reduce"]
    assert 0 < network.gained_s <= waited_s * 1.1
    assert network.gained_s == max(r.gained_s for r in found.hardware) == found.hardware[0].gained_s


def test_a_higher_stage_that_needs_more_memory_says_why(monkeypatch) -> None:
    def told(job: Job, profile=None, **_) -> StepReport:
        gathered = {"gathered_params": 300 << 20} if job.zero_stage == 3 else {}
        held = {"params": 50 << 20 if job.zero_stage == 3 else 100 << 20, **gathered}
        return StepReport(
            origin="predicted", job_key=job.key, step_s=1.0, fits=True, device_used_bytes=sum(held.values()),
            category_bytes_at_peak=held, peak_where="forward of blocks.1",
        )  # fmt: skip

    monkeypatch.setattr(remedies_module, "predict", told)
    (sentence,) = surprises(find_remedies(JOB), 2)
    assert sentence == (
        "ZeRO stage 3 would need 250.00 MiB more: at its peak, forward of blocks.1, gathered parameters take 300.00 MiB instead of 0 B."
    )
    assert surprises(find_remedies(JOB), 3) == []


def test_sentences_hold_the_numbers(found: Remedies) -> None:
    best = found.for_memory[0]
    words = memory_remedy_words(best, found)
    assert (
        words.startswith(best.change.words)
        and format_bytes(best.saved_bytes) in words
        and words.endswith("then it fits")
    )
    assert format_seconds(abs(best.gained_s)) in words
    job = build_job(replace(OPTIONS, zero=3, micro_batch=1, recompute="full"))
    faster = find_remedies(job)
    assert format_seconds(faster.for_time[0].gained_s) in time_remedy_words(faster.for_time[0], faster)
    inexact = next(r for r in faster.tried if r.change.inexact)
    assert "not quite the same" in memory_remedy_words(inexact, faster)
