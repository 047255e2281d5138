"""Speed of what people wait for: start-up, one forecast, one plan. ``make bench`` prints medians in milliseconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.plan import PlanQuestion, plan
from estimator.predict import predict

JOBS = {
    "llama-3-8b on 8 x h100-sxm": JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=8, zero=3, global_batch=8),
    "llama-3.1-405b on 16,384 x h100-sxm": JobOptions(
        model="llama-3.1-405b", gpu="h100-sxm", gpus=16384, zero=3, offload="optimizer", global_batch=16384
    ),
}


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of ``repeats`` calls after one that warms caches."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def plan_all(job: Job) -> None:
    """Every strategy for the job's model and cluster, with four sequences per GPU."""
    n_gpus = job.cluster.n_gpus
    plan(PlanQuestion(model=job.model, cluster=job.cluster, seq_len=job.workload.seq_len, global_batch_size=4 * n_gpus))


def main() -> None:
    command = [sys.executable, "-m", "zerocast", "--help"]
    rows = [("zerocast --help", median_ms(lambda: subprocess.run(command, capture_output=True, check=True), 10))]
    for name, options in JOBS.items():
        start = time.perf_counter()
        job = build_job(options)
        predict(job)
        rows.append((f"predict {name}, first call", 1e3 * (time.perf_counter() - start)))
        rows.append((f"predict {name}", median_ms(lambda job=job: predict(job), 20)))
        rows.append((f"plan {name}", median_ms(lambda job=job: plan_all(job), 3)))
    for label, milliseconds in rows:
        print(f"{milliseconds:10.2f} ms  {label}")


if __name__ == "__main__":
    main()
