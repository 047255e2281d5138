"""``plan``: the winner is brute force's, everything else has its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, Strategy, Workload
from estimator.plan import PlanQuestion, plan
from estimator.predict import predict

MODEL, CLUSTER = catalog.model("llama-3-8b"), catalog.cluster("h100-sxm", 8)
QUESTION = PlanQuestion(model=MODEL, cluster=CLUSTER, seq_len=2048, global_batch_size=32)


@pytest.fixture(scope="module")
def result():
    return plan(QUESTION)


def test_winner_is_brute_force(result) -> None:
    best = None
    grid = product((0, 1, 2, 3), ("none", "optimizer", "optimizer,param"), ("none", "selective", "full"), (1, 2, 4))
    for stage, offload, recompute, micro in grid:
        job = Job(
            model=MODEL,
            workload=Workload(seq_len=2048, micro_batch_size=micro, global_batch_size=32),
            strategy=Strategy(zero_stage=stage, offload=offload, recompute=recompute),
            cluster=CLUSTER,
        )
        report = predict(job)
        if report.fits and (best is None or report.tokens_per_s > best.tokens_per_s):
            best = report
    assert best is not None
    assert result.ranked[0].report.tokens_per_s == best.tokens_per_s
    assert result.ranked[0].report.job_key == best.job_key


def test_every_candidate_is_accounted_for(result) -> None:
    assert result.n_tried == 4 * 3 * 3 * 3
    tried = [c.job.strategy for c in result.ranked] + [r.strategy for r in result.rejected]
    assert len(set(tried)) == 4 * 3 * 3


def test_what_fits_is_ranked_by_throughput(result) -> None:
    speeds = [c.report.tokens_per_s for c in result.ranked]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) > 1
    assert all(c.report.fits for c in result.ranked)


def test_what_does_not_fit_says_why(result) -> None:
    assert result.rejected
    for rejection in result.rejected:
        assert rejection.report is not None and not rejection.report.fits
        assert any(char.isdigit() for char in rejection.reason)
        assert rejection.cause in rejection.report.category_bytes_at_peak
    assert any(r.excess_bytes > 0 for r in result.rejected)


def test_progress_counts_up() -> None:
    seen: list[tuple[int, int]] = []
    plan(
        replace(QUESTION, recomputes=("full",), offloads=("none",)),
        None,
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 12) for i in range(1, 13)]


def test_same_question_same_answer(result) -> None:
    assert plan(QUESTION).to_dict() == result.to_dict()
    json.dumps(result.to_dict(), allow_nan=False)


def test_one_gpu_has_one_stage() -> None:
    single = catalog.cluster("h100-sxm", 1)
    answer = plan(PlanQuestion(model=catalog.model("gpt2"), cluster=single, seq_len=512, global_batch_size=4))
    assert answer.n_tried == 3 * 3 * 3
    assert {c.job.strategy.zero_stage for c in answer.ranked} == {0}


def test_given_choices_are_kept() -> None:
    answer = plan(
        replace(
            QUESTION,
            zero_stages=(3,),
            offloads=("none",),
            recomputes=("full",),
            micro_batch_sizes=(2,),
            base=Strategy(dtype="fp16"),
        )
    )
    (only,) = answer.ranked
    assert only.job.strategy == Strategy(zero_stage=3, recompute="full", dtype="fp16")
    assert only.job.workload.micro_batch_size == 2


def test_a_micro_batch_that_does_not_divide_is_a_rejection() -> None:
    answer = plan(replace(QUESTION, global_batch_size=48, zero_stages=(3,), offloads=("none",), recomputes=("full",)))
    assert [c.job.workload.micro_batch_size for c in answer.ranked] and len(answer.ranked) == 2
    (rejection,) = answer.rejected
    assert rejection.micro_batch_size == 4 and rejection.cause == "not possible" and rejection.excess_bytes == 0
    assert "global_batch is 48" in rejection.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_batch_size": 12}, "multiple of the 8 data-parallel GPUs"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"zero_stages": ()}, "zero_stages"),
        ({"zero_stages": (4,)}, "zero is 4"),
        ({"offloads": ("disk",)}, "offload is 'disk'"),
        ({"recomputes": ("some",)}, "recompute is 'some'"),
        ({"micro_batch_sizes": (0,)}, "micro_batch is 0"),
        ({"base": Strategy(tp=3)}, "divisor of gpus"),
    ],
)
def test_a_bad_question_is_refused(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(QUESTION, **change)


def test_a_question_that_no_strategy_can_answer_is_refused() -> None:
    with pytest.raises(InputError, match="seq_len is 4096"):
        plan(PlanQuestion(model=catalog.model("gpt2"), cluster=CLUSTER, seq_len=4096, global_batch_size=8))
