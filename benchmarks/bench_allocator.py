"""Seconds that the simulated allocator takes for a step of Llama-3.1-405B, cold and once more, and what it makes of it.

    python benchmarks/bench_allocator.py

One core, medians of process time; each of a pipeline's stages is replayed by itself.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from estimator.job.options import JobOptions, build_job
from estimator.memory.replay import Replay, replay
from estimator.predict import lay_out, subject_of
from estimator.units import GIB

PIPELINE = JobOptions(
    model="llama-3.1-405b", gpu="h100-sxm", gpus=16384, tp=8, pp=16, zero=1, recompute="selective", global_batch=32768
)  # fmt: skip
SHARDED = JobOptions(
    model="llama-3.1-405b", gpu="h100-sxm", gpus=16384, zero=3, offload="optimizer", global_batch=16384
)  # fmt: skip
JOBS: dict[str, tuple[JobOptions, int]] = {
    "126 layers, ZeRO-3, one micro-batch": (SHARDED, 0),
    "tp 8, pp 16, 16 micro-batches, first stage": (replace(PIPELINE, global_batch=2048), 0),
    "tp 8, pp 16, 256 micro-batches, first stage": (PIPELINE, 0),
    "tp 8, pp 16, 256 micro-batches, last stage": (PIPELINE, 15),
}
"""Options, and of which of a pipeline's stages."""


def timed(options: JobOptions, stage: int, repeats: int = 5) -> tuple[float, Replay]:
    """Median milliseconds, and the replay."""
    subject = subject_of(lay_out(build_job(options), stage))
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = replay(subject)
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds), result


def main() -> None:
    for name, (options, stage) in JOBS.items():
        milliseconds, got = timed(options, stage)
        print(
            f"{milliseconds:8.1f} ms  {name}: {got.requested_bytes / GIB:.2f} GiB asked for, "
            f"{got.reserved_bytes / GIB:.2f} GiB reserved"
        )


if __name__ == "__main__":
    main()
