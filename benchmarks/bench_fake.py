"""How long ``fake`` takes to meter one rank of a 7B model in worlds of up to 4,096."""

from __future__ import annotations

import time

from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from estimator.units import format_bytes
from validator.measure.case import Case
from validator.measure.runner import measure

WORLDS = (1, 64, 512, 4096)


def main() -> None:
    print(f"{'world':>6} {'stage':>5} {'rank':>5} {'peak':>11} {'forecast':>11} {'seconds':>8}")
    for world in WORLDS:
        for zero in (1, 3):
            job = build_job(
                JobOptions(
                    model="llama-2-7b", gpu="h100-sxm", gpus=world, zero=zero, seq_len=4096, recompute="selective"
                )
            )
            start = time.perf_counter()
            peak = measure(Case(job=job, backend="fake", rank=world - 1)).peak_allocated_bytes
            seconds = time.perf_counter() - start
            forecast = predict(job).peak_allocated_bytes
            assert peak is not None and forecast is not None
            print(
                f"{world:>6} {zero:>5} {world - 1:>5} {format_bytes(peak):>11} {format_bytes(forecast):>11} {seconds:>8.1f}"
            )
    print("seconds: the whole case, start of its process and import of torch included")


if __name__ == "__main__":
    main()
