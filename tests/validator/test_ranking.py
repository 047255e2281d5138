"""After calibration the forecast ranks measured cases in the right order on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from validator.calibrate import calibrate
from validator.compare import compare, spearman
from validator.measure.case import Case
from validator.measure.runner import measure_many
from validator.store.database import Store

CASES: list[dict] = [
    {"gpus": 1, "zero": 0, "seq_len": 64},
    {"gpus": 2, "zero": 0, "seq_len": 64},
    {"gpus": 1, "zero": 0, "seq_len": 128, "micro_batch": 2},
    {"gpus": 2, "zero": 2, "dtype": "bf16", "seq_len": 128},
    {"gpus": 2, "zero": 3, "seq_len": 128},
    {"gpus": 1, "zero": 0, "seq_len": 128, "micro_batch": 4, "recompute": "full"},
    {"gpus": 2, "zero": 1, "offload": "optimizer", "seq_len": 128, "micro_batch": 2},
    {"gpus": 2, "zero": 3, "offload": "optimizer,param", "seq_len": 128, "global_batch": 4},
    {"gpus": 2, "zero": 0, "dtype": "bf16", "seq_len": 256, "micro_batch": 4},
    {"gpus": 2, "zero": 3, "recompute": "full", "seq_len": 256, "micro_batch": 2},
    {"gpus": 2, "zero": 1, "recompute": "selective", "seq_len": 256, "micro_batch": 4},
    {"gpus": 2, "zero": 2, "seq_len": 256, "micro_batch": 2, "global_batch": 12},
]
"""Twelve jobs of a 30M model, from a fifth of a second to several seconds."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forecast_ranks_measured_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = calibrate("cpu", 60, tmp_path / "cpu.json", workers=(1, 2))
    assert profile.gpu is not None and profile.host is not None
    jobs = [
        build_job(
            JobOptions(gpu="cpu", model=("gpt-30m", "llama-30m")[i % 2], gpus_per_node=2, **{"dtype": "fp32", **case}),
            local_gpu=profile.gpu,
            local_host=profile.host,
        )
        for i, case in enumerate(CASES)
    ]
    outcomes = measure_many([Case(job=job, backend="cpu", steps=3, warmup=2) for job in jobs], Store(tmp_path / "r.db"))
    measured = [outcome.report for outcome in outcomes]
    predicted = [predict(job, profile) for job in jobs]
    comparison = compare(predicted, [report for report in measured if report is not None])
    seconds = [(p.step_s, m.step_s) for p, m in zip(predicted, measured, strict=True) if m is not None]
    rank = spearman([p for p, _ in seconds], [m for _, m in seconds])  # type: ignore[misc]
    errors = sorted(abs(p / m - 1) for p, m in seconds)  # type: ignore[operator]
    with capsys.disabled():
        print(f"\nSpearman {rank:.3f}, median error {errors[len(errors) // 2]:.1%}, worst {errors[-1]:.1%}")
    assert len(seconds) == 12
    assert rank is not None and rank >= 0.9
    assert not comparison.inexact
