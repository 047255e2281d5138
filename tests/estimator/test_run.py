"""The whole run: formulas by hand, and what must follow from them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from estimator.report import StepReport
from estimator.run import RunQuestion, RunReport, token_count, whole_run
from estimator.run.checkpoint import checkpoint_bytes, checkpoint_of
from estimator.run.failures import FAILURE_RATES, daly_interval_s, failure_rate, goodput, young_interval_s
from estimator.run.utilisation import unattended_flops, utilisation


def job(**fields: object) -> Job:
    given = {"model": "llama-3-8b", "gpu": "h100-sxm", "gpus": 64, "seq_len": 4096, "global_batch": 256, **fields}
    return build_job(JobOptions(**given))  # type: ignore[arg-type]


def report(of: Job, step_s: float = 2.0, **fields: object) -> StepReport:
    return StepReport(origin="predicted", job_key=of.key, step_s=step_s, **fields)  # type: ignore[arg-type]


def run(of: Job, step_s: float = 2.0, **question: object) -> RunReport:
    return whole_run(of, report(of, step_s), RunQuestion(**{"tokens": 10**12, "mtbf": "none", **question}))  # type: ignore[arg-type]


def test_intervals_by_hand() -> None:
    """A minute to save, three hours between failures: sqrt(2 x 60 x 10800) = 1138.42; Daly: x (1 + 0.017568 + 0.000309) - 60."""
    assert young_interval_s(60, 10_800) == pytest.approx(1138.420, abs=1e-3)
    assert daly_interval_s(60, 10_800) == pytest.approx(1138.420 * (1 + 0.0175682 + 0.00030864) - 60, abs=1e-2)
    assert daly_interval_s(500, 200) == 200 and daly_interval_s(60, math.inf) == math.inf
    ratio = 10_800 * math.exp(600 / 10_800) * math.expm1(1260 / 10_800) / 1200
    assert goodput(1200, 60, 600, 10_800) == pytest.approx(1 / ratio)
    assert goodput(1200, 60, 600, math.inf) == pytest.approx(1200 / 1260)
    assert goodput(math.inf, 60, 600, math.inf) == 1.0 and goodput(1e9, 60, 600, 1.0) == 0.0


@given(st.floats(0.1, 500), st.floats(0, 3600), st.floats(2000, 1e7), st.floats(0.2, 5))
def test_the_optimum_is_one(save_s: float, restart_s: float, mtbf_s: float, factor: float) -> None:
    best = daly_interval_s(save_s, mtbf_s)
    assert goodput(best, save_s, restart_s, mtbf_s) >= 0.999 * goodput(best * factor, save_s, restart_s, mtbf_s)
    assert 0 <= goodput(best, save_s, restart_s, mtbf_s) < 1
    assert goodput(best, save_s, restart_s, mtbf_s) <= goodput(best, save_s, restart_s / 2, mtbf_s)


def test_failure_rates() -> None:
    """Llama 3: 21.2 million GPU-hours over 419; on 16,384 GPUs one in 3.1 hours."""
    assert FAILURE_RATES["llama-3"].gpu_hours == pytest.approx(50_676, rel=1e-3)
    assert failure_rate("Llama-3").gpu_hours / 16_384 == pytest.approx(3.093, abs=1e-3)
    assert failure_rate("none").gpu_hours == math.inf and failure_rate("1e4").gpu_hours == 10_000
    assert failure_rate(5000).gpu_hours == 5000
    for wrong in ("often", "0", -3.0, "nan"):
        with pytest.raises(InputError, match="mtbf"):
            failure_rate(wrong)


def test_checkpoints_by_hand() -> None:
    """Llama-3-8B, 8,030,261,248 parameters: fp32 masters and two fp32 moments, 12 bytes each; a shard per rank under ZeRO."""
    one = job()
    assert checkpoint_bytes(one) == 12 * 8_030_261_248
    saved = checkpoint_of(one, storage_bytes_per_s=8e9, asynchronous=False)
    assert (saved.n_writers, saved.rank_bytes) == (64, 12 * 8_030_261_248 / 64)
    assert saved.write_s == saved.blocked_s == saved.read_s == pytest.approx(96.363e9 / 8e9, rel=1e-4)
    quick = checkpoint_of(one, storage_bytes_per_s=8e9, asynchronous=True)
    assert quick.blocked_s == pytest.approx(12 * 8_030_261_248 / 64 / 64e9) and quick.write_s == saved.write_s
    assert checkpoint_of(job(zero=0, tp=8), storage_bytes_per_s=8e9, asynchronous=False).n_writers == 8
    assert checkpoint_bytes(job(optimizer="sgd")) == 8 * 8_030_261_248
    assert checkpoint_bytes(job(master_dtype="model", state_dtype="model")) == 6 * 8_030_261_248


def test_who_writes_a_checkpoint() -> None:
    def writers(**fields: object) -> int:
        return checkpoint_of(job(**fields), storage_bytes_per_s=1e9, asynchronous=False).n_writers

    assert (writers(), writers(shard_size=8), writers(zero=1, tp=8)) == (64, 8, 64)
    assert (writers(zero=0), writers(zero=0, sync="parameter_server", n_servers=4), writers(zero=0, tp=8)) == (1, 4, 8)
    small = run(job(model="llama-3.1-405b", gpus=64, gpu="h100-sxm", global_batch=64), asynchronous=True)
    assert not any(note.startswith("checkpoints") for note in small.notes)
    held = run(job(model="llama-3.1-405b", zero=0, tp=8, gpus=8, global_batch=8), asynchronous=True)
    assert any("the copies of a node's ranks take 4.43 TiB, its host has 2.00 TiB" in note for note in held.notes), (
        held.notes
    )


def test_llama_3_trained_over_nine_tenths_of_the_time() -> None:
    """405B on 16,384 H100: more than 90% effective training time (arXiv 2407.21783, section 3.3.4), about one failure in three hours."""
    big = job(model="llama-3.1-405b", gpus=16_384, tp=8, pp=16, zero=1, seq_len=8192, global_batch=2048)
    done = run(big, step_s=5.4, tokens=15_600 * 10**9, mtbf="llama-3")
    assert 0.90 < done.goodput < 0.95 and done.mtbf_s == pytest.approx(3.09 * 3600, rel=0.01)
    assert done.n_failures == pytest.approx(419 / 54 * done.days)


def test_a_run_without_failures_by_hand() -> None:
    """2^20 tokens a step, 2 s each: 953,675 steps are 22.08 days on 64 GPUs at 3 dollars; 64 x 700 W x 1.5 x 1.2 of power."""
    done = run(job(), usd_per_gpu_hour=3.0, pue=1.2)
    assert done.n_steps == 953_675 and done.tokens_per_s == 256 * 4096 / 2
    assert done.days == pytest.approx(953_675 * 2 / 86_400) and done.goodput == 1.0 and done.n_checkpoints == 0
    assert done.gpu_hours == pytest.approx(done.days * 24 * 64) and done.usd == pytest.approx(3 * done.gpu_hours)
    assert done.tokens_per_usd == pytest.approx(1e12 / (3 * done.gpu_hours))
    assert done.mean_watts == pytest.approx(64 * 700 * 1.5 * 1.2)
    assert done.kwh == pytest.approx(done.mean_watts / 1e3 * done.days * 24)
    assert done.data_bytes_per_s == 256 * 4096 * 4 / 2 and done.data_bytes == 4e12
    assert done.mtbf_s is None and done.n_failures == 0 and done.day_without_failure == 1.0


def test_a_run_with_failures_by_hand() -> None:
    """32,000 GPU-hours are 500 h for 64 GPUs; 8 nodes save 96.4 GB at 8 GB/s: 12.05 s."""
    done = run(job(), mtbf=32_000.0, restart_s=300.0)
    save_s = 12 * 8_030_261_248 / 8e9
    assert done.mtbf_s == 500 * 3600 and done.checkpoint.write_s == pytest.approx(save_s)
    best = daly_interval_s(save_s, 500 * 3600)
    assert done.checkpoint_every_s == done.optimum_s == pytest.approx(best)
    share = goodput(best, save_s, 300 + save_s, 500 * 3600)
    assert done.goodput == pytest.approx(share) and done.days == pytest.approx(953_675 * 2 / 86_400 / share)
    assert done.n_failures == pytest.approx(done.days * 24 / 500)
    assert done.day_without_failure == pytest.approx(math.exp(-24 / 500))
    rare = run(job(), mtbf=32_000.0, restart_s=300.0, checkpoint_every_s=36_000.0)
    assert rare.goodput < done.goodput and rare.optimum_s == done.optimum_s and rare.checkpoint_every_s == 36_000


def test_more_gpus_fail_more_often_and_faster_storage_helps() -> None:
    few, many = run(job(gpus=64), mtbf="llama-3"), run(job(gpus=256), mtbf="llama-3")
    assert few.mtbf_s == pytest.approx(4 * (many.mtbf_s or 0))
    slow, fast, beside = (
        run(job(), mtbf=3000.0, storage_bytes_per_s=s, asynchronous=a)
        for s, a in ((1e8, False), (1e10, False), (1e8, True))
    )
    assert slow.goodput < fast.goodput and slow.goodput < beside.goodput
    assert (
        beside.checkpoint_every_s is not None
        and beside.checkpoint_every_s >= beside.checkpoint.write_s - beside.checkpoint.blocked_s
    )
    with pytest.raises(InputError, match="never gets anywhere"):
        run(job(), mtbf=0.01)


def test_intervals_of_a_step_become_those_of_a_run() -> None:
    one = job()
    done = whole_run(one, report(one, 2.0, step_low_s=1.8, step_high_s=2.4), RunQuestion(tokens=10**9, mtbf="none"))
    assert (done.days_low, done.days_high) == (pytest.approx(0.9 * done.days), pytest.approx(1.2 * done.days))
    with pytest.raises(InputError, match="no step time"):
        whole_run(one, StepReport(origin="fake", job_key=one.key), RunQuestion(tokens=1))


def test_both_conventions_of_utilisation() -> None:
    """Llama-3-8B at 8,192 tokens: the square's other half adds 2 x 32 layers x 4096 x 8191 forward FLOPs per token."""
    one = job(seq_len=8192, recompute="full")
    left_out = unattended_flops(one)
    assert left_out == pytest.approx(256 * 8192 * 2 * 32 * 4096 * 8191)
    made = predict(one)
    found = utilisation(one, made)
    assert made.mfu and made.model_flops and made.hfu
    assert found.mfu_causal == made.mfu and found.mfu_full == pytest.approx(
        made.mfu * (1 + 3 * left_out / made.model_flops)
    )
    palm = (6 * (8_030_261_248 - 128_256 * 4096) + 12 * 32 * 4096 * 8192) * 256 * 8192
    assert found.mfu_full == pytest.approx(made.mfu * palm / made.model_flops, rel=0.01), (
        "PaLM's formula without the table"
    )
    assert found.hfu_causal == made.hfu and found.hfu_full is not None
    assert found.hfu_full - found.mfu_full == pytest.approx(
        made.hfu - made.mfu + made.mfu * left_out / made.model_flops
    )
    windowed = unattended_flops(job(model="mistral-7b", seq_len=8192))
    assert windowed is not None and windowed > 256 * 8192 * 2 * 32 * 4096 * 8191, "a window leaves out more"
    assert unattended_flops(job(model="bert-base-uncased", seq_len=512)) == 0.0


def test_token_counts() -> None:
    assert [token_count(t) for t in ("15T", "300b", "2e9", "1_000", "1.5M")] == [
        15 * 10**12, 300 * 10**9, 2 * 10**9, 1000, 1_500_000,
    ]  # fmt: skip
    for wrong in ("", "T", "many", "-5B", "1e30", "0"):
        with pytest.raises(InputError, match="tokens is"):
            token_count(wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"pue": 0.5}, {"node_power_factor": 0.0}, {"usd_per_gpu_hour": -1.0}, {"storage_bytes_per_s": 0.0},
     {"checkpoint_every_s": math.nan}, {"restart_s": -1.0}],
)  # fmt: skip
def test_figures_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        RunQuestion(**{"tokens": 1, **wrong})  # type: ignore[arg-type]
