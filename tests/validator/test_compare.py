"""Comparison against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from estimator.errors import InputError
from estimator.report import StepReport
from validator.compare import compare, label_of, predict_for, spearman


def errors(comparison):
    return {row.term: row.error for row in comparison.rows}


def predicted(measured: StepReport, **changes) -> StepReport:
    """A prediction equal to ``measured`` but for ``changes``."""
    fields = {**vars(measured), "origin": "predicted", **changes}
    return StepReport(**fields)


def test_every_term_by_hand(make_report):
    measured = make_report(host_bytes=200, copy_bytes={"h2d": 10})
    prediction = predicted(
        measured, peak_allocated_bytes=1100, category_peak_bytes={"params": 400, "grads": 300, "activations": 50, "fragmentation": 9},
        phase_peak_bytes={"forward": 600, "init": 10}, step_s=0.2, time_parts_s={"forward": 0.05, "backward": 0.15},
        tokens_per_s=80.0, collective_bytes={"all_gather": 128}, host_bytes=100, copy_bytes={"h2d": 10},
    )  # fmt: skip
    comparison = compare([prediction], [measured])
    assert errors(comparison) == {
        "peak_allocated_bytes": pytest.approx(0.1),
        "host_bytes": pytest.approx(-0.5),
        "step_s": pytest.approx(-0.2),
        "tokens_per_s": pytest.approx(0.25),
        "category_peak_bytes.params": 0.0,
        "category_peak_bytes.grads": pytest.approx(-0.25),
        "category_peak_bytes.activations": None,  # 0 measured, 50 predicted; fragmentation is no live tensor
        "phase_peak_bytes.forward": pytest.approx(-0.25),
        "time_parts_s.forward": pytest.approx(-0.5),
        "time_parts_s.backward": 0.0,
        "collective_bytes.all_gather": 0.0,
        "copy_bytes.h2d": 0.0,
    }
    row = comparison.rows[0]
    assert (row.case, row.origin, row.predicted, row.measured) == (label_of(measured), "cpu", 1100, 1000)
    assert comparison.inexact == ()


def test_summaries_by_hand(make_job, make_report):
    measured = [make_report(make_job(micro_batch=n), step_s=1.0) for n in range(1, 12)]
    steps = [0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.0]  # |error| 0, 0.1, 0.1, 0.2 ... 0.8, 1.0
    comparison = compare([predicted(m, step_s=s) for m, s in zip(measured, steps, strict=True)], measured)
    summary = next(s for s in comparison.summaries if s.term == "step_s")
    assert (summary.n, summary.n_undefined) == (11, 0)
    assert (summary.median, summary.p90, summary.worst) == pytest.approx((0.4, 0.8, 1.0))
    assert summary.bias == pytest.approx((sum(steps) - 11) / 11)
    assert summary.largest == pytest.approx(1.0)
    perfect = next(s for s in comparison.summaries if s.term == "peak_allocated_bytes")
    assert (perfect.median, perfect.worst, perfect.bias) == (0, 0, 0)


def test_undefined_errors_are_counted_not_hidden(make_report):
    measured = make_report(host_bytes=0)
    summary = next(
        s for s in compare([predicted(measured, host_bytes=5)], [measured]).summaries if s.term == "host_bytes"
    )
    assert (summary.n, summary.n_undefined, summary.median, summary.largest) == (0, 1, None, 5)


def test_the_worst_case_comes_first_with_the_part_to_blame(make_job, make_report):
    good, bad = make_report(), make_report(make_job(micro_batch=2))
    predictions = [
        predicted(good, step_s=0.26, time_parts_s={"forward": 0.11, "backward": 0.15}),
        predicted(bad, step_s=0.5, time_parts_s={"forward": 0.1, "backward": 0.15, "exposed_gather": 0.25}, peak_allocated_bytes=900,
                  category_bytes_at_peak={"params": 400, "grads": 300}),
    ]  # fmt: skip
    blames = compare(predictions, [good, bad]).blames
    assert [(b.job_key, b.total) for b in blames] == [
        (bad.job_key, "step_s"), (bad.job_key, "peak_allocated_bytes"), (good.job_key, "step_s"), (good.job_key, "peak_allocated_bytes"),
    ]  # fmt: skip
    assert (blames[0].error, blames[0].term, blames[0].difference) == (1.0, "time_parts_s.exposed_gather", 0.25)
    assert (blames[1].term, blames[1].difference) == ("category_bytes_at_peak.grads", -100)
    assert blames[2].term == "time_parts_s.forward"


def test_the_part_to_blame_is_off_in_the_direction_of_the_total(make_report):
    measured = make_report(step_s=1.0, time_parts_s={"forward": 0.4, "backward": 0.6})
    prediction = predicted(measured, step_s=0.9, time_parts_s={"forward": 0.7, "backward": 0.2})
    blame = next(b for b in compare([prediction], [measured]).blames if b.total == "step_s")
    assert (blame.term, blame.difference) == ("time_parts_s.backward", pytest.approx(-0.4))


def test_what_the_parts_leave_over_can_be_to_blame(make_report):
    measured = make_report(peak_allocated_bytes=1000, category_bytes_at_peak={"params": 400, "grads": 300})
    prediction = predicted(measured, peak_allocated_bytes=710, category_bytes_at_peak={"params": 400, "grads": 310})
    (blame,) = (b for b in compare([prediction], [measured]).blames if b.total == "peak_allocated_bytes")
    assert (blame.term, blame.difference) == ("category_bytes_at_peak.rest", -300)


def test_blame_for_memory_says_where(make_report):
    measured = make_report(peak_where="backward of head")
    prediction = predicted(measured, peak_allocated_bytes=900, peak_where=None, peak_phase="optimizer")
    blames = {b.total: b for b in compare([prediction], [measured]).blames}
    memory, time = blames["peak_allocated_bytes"], blames["step_s"]
    assert (memory.measured_where, memory.predicted_where) == ("backward of head", "optimizer")
    assert (time.measured_where, time.predicted_where) == (None, None)


def test_blame_for_the_wire_comes_first_and_names_the_collective(make_report):
    measured = make_report(collective_bytes={"all_gather": 100, "all_reduce": 60})
    prediction = predicted(measured, step_s=2.5, collective_bytes={"all_gather": 100, "all_reduce": 28})
    first = compare([prediction], [measured]).blames[0]
    assert (first.total, first.term, first.difference, first.is_bug) == (
        "collective_bytes",
        "collective_bytes.all_reduce",
        -32,
        True,
    )
    assert first.error == pytest.approx(-0.2)
    assert not any(b.is_bug for b in compare([predicted(measured)], [measured]).blames)


def test_steps_within_the_interval_are_counted_by_origin(make_job, make_report):
    measured = [make_report(make_job(micro_batch=n), step_s=s) for n, s in ((1, 0.9), (2, 1.0), (3, 1.3))]
    predictions = [predicted(m, step_low_s=0.9, step_high_s=1.2) for m in measured]
    assert compare(predictions, measured).step_in_interval == {"cpu": (2, 3)}
    assert compare([predicted(measured[0], step_low_s=None)], measured).step_in_interval == {}


def test_a_fake_rank_pins_nothing(make_report):
    measured = make_report(origin="fake", pinned_bytes=0)
    assert "pinned_bytes" not in errors(compare([predicted(measured, pinned_bytes=8)], [measured]))
    on_gpu = replace(measured, origin="cuda")
    assert errors(compare([predicted(on_gpu, pinned_bytes=8)], [on_gpu]))["pinned_bytes"] is None


def test_rank_correlation_keeps_gpus_apart(make_job, make_report):
    jobs = [make_job(micro_batch=n) for n in (1, 2)]
    here = [make_report(job, step_s=s) for job, s in zip(jobs, (1.0, 2.0), strict=True)]
    far = [
        replace(m, job_key=f"far{i}", job={**m.job, "cluster": {**m.job["cluster"], "gpu": "h200"}})
        for i, m in enumerate(here)
    ]
    predictions = [*(predicted(m) for m in here), *(predicted(m, step_s=9 - m.step_s) for m in far)]
    assert compare(predictions, [*here, *far]).step_rank_correlation == pytest.approx(
        {"cpu on test-gpu": 1.0, "cpu on h200": -1.0}
    )


@pytest.mark.parametrize(
    "wrong", [{"all_gather": 129}, {}, {"all_gather": 128, "all_reduce": 4}, {"all_gather": 128 + 2**-20}], ids=str
)
def test_collective_bytes_must_be_exact(make_report, wrong):
    measured = make_report()
    assert compare([predicted(measured)], [measured]).inexact == ()
    assert len(compare([predicted(measured, collective_bytes=wrong)], [measured]).inexact) == 1


def test_a_predicted_collective_that_never_ran_is_inexact(make_report):
    measured = make_report(collective_bytes={})
    (row,) = compare([predicted(measured, collective_bytes={"all_reduce": 4})], [measured]).inexact
    assert (row.term, row.predicted, row.measured, row.error) == ("collective_bytes.all_reduce", 4, 0, None)


def test_what_one_side_does_not_know_is_no_term(make_report):
    measured = make_report(step_s=None, time_parts_s={}, tokens_per_s=None, origin="fake")
    terms = errors(compare([predicted(make_report(), category_peak_bytes={})], [measured]))
    assert set(terms) == {"peak_allocated_bytes", "phase_peak_bytes.forward", "collective_bytes.all_gather"}


def test_a_case_that_did_not_fit_gives_a_verdict_and_no_numbers(make_report):
    full = make_report()
    out_of_memory = StepReport(origin="cpu", job_key=full.job_key, job=full.job, fits=False, explanation="ran out")
    comparison = compare([predicted(full)], [out_of_memory, full])
    assert [(v.predicted, v.measured) for v in comparison.verdicts] == [(True, False), (True, True)]
    assert {row.case for row in compare([predicted(full)], [out_of_memory]).rows} == set()


def test_the_join_is_on_the_job_key(make_job, make_report):
    both, only_measured, only_predicted = (make_report(make_job(micro_batch=n)) for n in (1, 2, 3))
    comparison = compare(
        [predicted(both, step_s=1.0), predicted(both), predicted(only_predicted)], [both, both, only_measured]
    )
    assert comparison.unpredicted == (only_measured.job_key,)
    assert comparison.unmeasured == (only_predicted.job_key,)
    assert [row.error for row in comparison.rows if row.term == "step_s"] == [0.0, 0.0]  # the last prediction, twice


def test_rank_correlation_per_origin(make_job, make_report):
    jobs = [make_job(micro_batch=n) for n in (1, 2, 3)]
    slow = [make_report(job, step_s=s) for job, s in zip(jobs, (1.0, 2.0, 3.0), strict=True)]
    fast = [make_report(job, step_s=s, origin="cuda") for job, s in zip(jobs, (3.0, 2.0, 1.0), strict=True)]
    predictions = [predicted(m, step_s=s) for m, s in zip(slow, (10.0, 11.0, 99.0), strict=True)]
    assert compare(predictions, [*slow, *fast]).step_rank_correlation == pytest.approx({"cpu": 1.0, "cuda": -1.0})


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))  # ranks 1.5, 1.5, 3 and 1, 2, 3
    assert spearman([1, 1], [1, 2]) is None and spearman([], []) is None
    with pytest.raises(ValueError, match="as many"):
        spearman([1], [1, 2])


def test_spearman_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    for _ in range(50):
        n = rng.randint(3, 20)
        x, y = ([rng.randint(0, 6) for _ in range(n)] for _ in range(2))
        expected = stats.spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else None
        assert spearman(x, y) == (None if expected is None else pytest.approx(expected))


def test_plain_data(make_report):
    measured = make_report(host_bytes=0)
    data = json.loads(json.dumps(compare([predicted(measured, host_bytes=1)], [measured]).to_dict(), allow_nan=False))
    assert {"rows", "summaries", "blames", "verdicts", "inexact", "step_rank_correlation"} <= set(data)
    assert data["rows"][0]["error"] == 0.0


def test_nothing_to_compare():
    comparison = compare([], [])
    assert comparison.rows == comparison.summaries == comparison.blames == () and comparison.step_rank_correlation == {}


def test_a_report_without_its_job_cannot_be_predicted(make_report):
    with pytest.raises(InputError, match="does not hold its job"):
        predict_for(replace(make_report(), job={}))


def test_predict_for_predicts_the_recorded_job(make_report):
    prediction = predict_for(make_report())
    assert prediction.origin == "predicted" and prediction.job_key == make_report().job_key
    assert prediction.peak_reserved_bytes is None  # on a CPU


def test_what_ran_on_a_gpu_is_predicted_as_its_allocator_counts() -> None:
    from estimator.job.files import job_to_dict
    from estimator.job.options import JobOptions, build_job
    from estimator.predict import predict

    job = build_job(JobOptions(model="gpt2", gpu="h100-sxm", gpus=8, seq_len=128))
    plain = predict(job)
    real, virtual = (
        predict_for(StepReport(origin=origin, job_key=job.key, job=job_to_dict(job)))  # type: ignore[arg-type]
        for origin in ("cuda", "cuda-virtual")
    )
    assert real.peak_allocated_bytes and plain.peak_allocated_bytes and real.peak_reserved_bytes
    # rounding, and a workspace of 32 MiB
    assert real.peak_allocated_bytes == real.allocator_bytes > plain.peak_allocated_bytes
    assert real.device_used_bytes and virtual.device_used_bytes
    assert real.device_used_bytes - virtual.device_used_bytes == real.category_bytes_at_peak["comm_buffers"]
    assert "comm_buffers" not in virtual.category_bytes_at_peak
