"""Failures and restarts: how often to save, and what share of the wall clock trains."""

from __future__ import annotations

from math import exp, expm1, inf, sqrt
from typing import NamedTuple

from estimator.errors import InputError
from estimator.job.fields import nearest, number, refuse, shown


class FailureRate(NamedTuple):
    """How long one GPU runs, in the mean, until something makes the job stop: mean time between failures times GPUs."""

    gpu_hours: float
    source: str


FAILURE_RATES = {
    "llama-3": FailureRate(
        16_384 * 54 * 24 / 419,
        "419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4; 466 with planned ones)",
    ),
    "rsc-1": FailureRate(
        8 * 24 * 1000 / 6.5, "6.5 failures per 1,000 node-days of 8 A100 (arXiv 2410.21680, Meta's RSC-1)"
    ),
    "rsc-2": FailureRate(
        8 * 24 * 1000 / 2.34, "2.34 failures per 1,000 node-days of 8 A100 (arXiv 2410.21680, Meta's RSC-2)"
    ),
    "bloom": FailureRate(384 * 7 * 24 / 1.5, "1 to 2 GPU failures a week on 384 A100 (arXiv 2211.05100)"),
}
"""Published rates by name. The job's own is this over its GPUs: failures are taken as independent, without a memory (Poisson)."""


def failure_rate(given: str | float) -> FailureRate:
    """A published rate by name, ``"none"``, or GPU-hours between failures. Raises ``InputError``."""
    if isinstance(given, str):
        name = given.strip().lower()
        if name == "none":
            return FailureRate(inf, "no failures")
        if name in FAILURE_RATES:
            return FAILURE_RATES[name]
        try:
            given = float(name)
        except ValueError:
            names = (*FAILURE_RATES, "none")
            raise InputError(
                f"mtbf is {shown(given)}; allowed: GPU-hours between failures, or one of {', '.join(names)}{nearest(given, names)}"
            ) from None
    if not number("mtbf", given) > 0:
        raise refuse("mtbf", given, "GPU-hours > 0 between failures")
    return FailureRate(float(given), "given")


def young_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that lose least, to first order: ``sqrt(2 save mtbf)`` (Young 1974)."""
    return sqrt(2.0 * save_s * mtbf_s)


def daly_interval_s(save_s: float, mtbf_s: float) -> float:
    """The same to higher order (Daly 2006, equation 37); where saving takes over twice the time between failures, that time."""
    if mtbf_s == inf:
        return inf
    if save_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2.0 * mtbf_s)
    return sqrt(2.0 * save_s * mtbf_s) * (1.0 + sqrt(ratio) / 3.0 + ratio / 9.0) - save_s


def goodput(interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the wall clock in which work is done that stays: useful over expected seconds of a job that saves for ``save_s`` after
    every ``interval_s`` of work, fails after exponentially distributed times and needs ``restart_s`` each (Daly 2006, equation 20)."""
    if mtbf_s == inf:
        return interval_s / (interval_s + save_s) if interval_s != inf else 1.0
    try:
        return interval_s / (mtbf_s * exp(restart_s / mtbf_s) * expm1((interval_s + save_s) / mtbf_s))
    except OverflowError:
        return 0.0
