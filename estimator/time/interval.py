"""How far a forecast of seconds may be off, from residuals: of calibration on this machine, or of published runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, exp, log

from estimator.job.job import Job
from estimator.time.profile import HardwareProfile
from estimator.time.stack import stack_of

NOMINAL = 0.9
"""Share of runs that the interval is to hold."""

UNKNOWN = log(2.0)
"""Without any residual: half to twice the forecast. A guess, and notes say so."""


def interval(step_s: float, parts: Mapping[str, float], job: Job, profile: HardwareProfile) -> tuple[float, float]:
    """Low and high end of ``step_s``.

    The split-conformal interval (Vovk et al. 2005) of the runs that are as comparable as there are, each forecast with constants
    that it took no part in: for a profile that was calibrated through this runtime its own steps. Where that has none, every part
    is moved by the spread of the measured points of its kind, all in the same direction.
    """
    if profile.is_measured and job.strategy.framework == "zerocast" and not profile.stacks:
        off = sum(seconds * min(1.0, profile.spread.get(_kind_of(part, job), 0.0)) for part, seconds in parts.items())
        return max(step_s - off, 0.0), step_s + off
    width = conformal(stack_of(job, profile).errors)
    return step_s * exp(-width), step_s * exp(width)


def conformal(log_errors: Sequence[float]) -> float:
    """The size that ``NOMINAL`` of such errors do not exceed: of ``n`` the ``ceil((n + 1) * NOMINAL)``-th smallest, or the largest
    where there are too few to know."""
    if not log_errors:
        return UNKNOWN
    sizes = sorted(map(abs, log_errors))
    return sizes[min(len(sizes), ceil((len(sizes) + 1) * NOMINAL)) - 1]


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


def note_of(job: Job, profile: HardwareProfile) -> str | None:
    """What the reader of a forecast must know of its constants and interval."""
    evidence = stack_of(job, profile)
    if not evidence.words:
        return None
    here = profile.is_measured and job.strategy.framework == "zerocast"
    n = len(evidence.errors)
    if not n:
        why = "is of the spread of kernels alone" if here else "is a guess"
        return f"time: {evidence.words}; no run says how far off it is, the interval {why}"
    few = "" if n >= 9 else f", of which there are too few for {NOMINAL:.0%}"
    of = "of those, each left out in turn" if here else f"of {n} published runs that took no part in them"
    return f"time: {evidence.words}; the interval is {of}{few}"
