"""Losses injected into real runs, and what the benchmark of the gate makes of runs."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from validator.gate.baseline import Baseline, update
from validator.gate.decide import check
from validator.measure import runner
from validator.measure.case import Case

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_one_percent_more_memory_is_flagged_in_real_runs(make_job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", "slow_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]))
    case = Case(job=make_job(), backend="cpu", steps=2, warmup=1)
    before = runner.measure(case)
    assert before.peak_allocated_bytes is not None
    n_bytes = round(0.01 * before.peak_allocated_bytes)
    monkeypatch.setenv("MORE_BYTES", str(n_bytes))
    after = runner.measure(case)
    assert after.peak_allocated_bytes == before.peak_allocated_bytes + n_bytes
    (place,) = update(Baseline(), [before], {}).environments
    (found,) = check(place.cases, [after], metrics=["peak_allocated_bytes"]).verdicts
    assert found.status == "regressed" and found.change == pytest.approx(0.01, rel=0.05)


def test_the_injected_delay_is_inside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOWER", "0.5")
    step = load("slow_worker").worse(lambda engine: (time.sleep(0.02), engine))
    start = time.perf_counter()
    assert step("engine")[1] == "engine"
    assert time.perf_counter() - start >= 0.03


def test_the_benchmark_tells_rates_from_runs(make_report, capsys: pytest.CaptureFixture[str]) -> None:
    bench, rng = load("gate_real"), np.random.default_rng(0)

    def reports(n: int, factor: float = 1.0, peak: int = 1000):
        made = []
        for _ in range(n):
            pace = np.exp(rng.normal(0, 0.1))
            steps, yards = (
                [float(s * pace * np.exp(rng.normal(0, 0.002))) for _ in range(8)] for s in (0.1 * factor, 0.003)
            )
            facts = {"torch": "2", "steps": 8, "step_seconds": steps, "yardstick_seconds": yards, "yardstick": "y"}
            made.append(make_report(step_s=sorted(steps)[4], peak_allocated_bytes=peak, provenance=facts))
        return made

    runs = bench.Runs(baseline=reports(12), same=reports(60), slower=reports(60, 1.05), fatter=reports(3, peak=1010))
    bench.tell(runs)
    rows = {line[:44].strip(): line[44:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["unchanged, 12 old and 3 new runs"][:2] == ["20", "0"]
    slower = rows["5% slower, 12 old and 3 new runs"]
    assert slower[0] == "20" and int(slower[1]) >= 15
    assert rows["5% slower, 12 old and 6 new runs"][:2] == ["10", "10"]
    assert rows["memory, one more tensor of 1%"] == ["3", "3", "0", "0", "0"]
    assert rows["memory of unchanged code"][-1] == "20"
    assert bench.neighbours([1, 2, 3, 4, 5]) == [(1, 2), (4, 3)]
