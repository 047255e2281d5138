"""How far a forecast of seconds may be off, from residuals: of calibration on this machine, or of published runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from estimator.job.job import Job
from estimator.time.profile import HardwareProfile


class Residuals(NamedTuple):
    """Measured seconds divided by forecast seconds over runs that took no part in any constant."""

    n_runs: int
    median: float
    high: float
    """95% of the runs took at most this many times the forecast."""
    source: str


PUBLISHED_RUNS = Residuals(
    n_runs=110,
    median=1.33,
    high=1.64,
    source="bf16 ZeRO-2 and ZeRO-3 step times on A100 and H100: llm-foundry benchmarking README (103), torchtitan's performance "
    "notes (6), DeepSpeed's ZenFlow blog (1); benchmarks/published_residuals.py, 2026-11-22. The fastest took 1.06 times "
    "the forecast",
)
"""Published kernel rates come from short runs of one kernel alone: training reaches less of them."""


def interval(step_s: float, parts: Mapping[str, float], job: Job, profile: HardwareProfile) -> tuple[float, float]:
    """Low and high end of ``step_s``.

    With shipped curves: from the forecast itself, which no published run has beaten, to where 95% of them lie. With a
    calibrated profile: every part moved by the spread of the measured points of its kind, all in the same direction.
    """
    if not profile.is_measured:
        return step_s, step_s * PUBLISHED_RUNS.high
    off = sum(seconds * min(1.0, profile.spread.get(_kind_of(part, job), 0.0)) for part, seconds in parts.items())
    return max(step_s - off, 0.0), step_s + off


def _kind_of(part: str, job: Job) -> str:
    """Kind of calibration point that decides a part of the step."""
    if part.startswith("exposed"):
        return "collective"
    if part == "optimizer":
        return "bandwidth"
    if part == "offload" and job.strategy.offload_nvme:
        return "file"
    if part == "offload":
        return "host" if job.strategy.offload_optimizer else "copy"
    return "matmul"


def note_of(profile: HardwareProfile) -> str | None:
    """What the reader of a forecast made with shipped curves must know."""
    if profile.is_measured:
        return None
    known = PUBLISHED_RUNS
    return (
        f"time is at the rates of lone kernels: {known.n_runs} published ZeRO-2/3 runs took {known.median} times the forecast "
        f"in the median, 95% at most {known.high} times"
    )
