"""The gate: holds new runs of a case against its baseline and decides, metric by metric.

Timed metrics are decided on runs, not on steps: steps of one process share its memory layout, clocks and neighbours, so they
are no independent samples (``benchmarks/bench_gate.py`` counts the false alarms that this would cost). The test is the exact
rank test of Mann and Whitney (Annals of Mathematical Statistics 18, 1947) on the runs' medians; the change is the Hodges-Lehmann
estimate (Annals of Mathematical Statistics 34, 1963), the median of all pairwise differences of logarithms, and its interval is
what the rank test does not reject (Moses; D. F. Bauer, JASA 67, 1972). No random numbers: equal records give equal answers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from estimator.report import StepReport
from estimator.units import format_bytes, format_seconds
from validator.baseline import BaselineCase, Identity, Run, case_name, identity_of, run_of

ALPHA = 0.01
"""Largest probability of a false alarm of one metric in one direction that the rank test admits (before the minimum effect)."""
ALPHA_PASS = 0.05
"""Largest probability with which a loss of exactly the minimum effect may pass."""
GOOD_RUNS = 5
"""Runs on each side with which the rank test can reach ``ALPHA`` with one pair of runs in the wrong order: P(U <= 1) = 2/252."""
MOST_RUNS = 30
"""More than this is never asked for."""
METRICS = ("step_s", "tokens_per_s", "peak_allocated_bytes", "step_prediction_error", "peak_prediction_error")
Status = Literal["pass", "regressed", "improved", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One metric of one case."""

    case: str
    metric: str
    status: Status
    baseline: float | None
    """Median over the runs (bytes: the largest)."""
    now: float | None
    change: float | None = None
    """Relative change, for prediction errors the difference of the errors; likewise ``low`` and ``high``, its 98 % interval."""
    low: float | None = None
    high: float | None = None
    n_baseline: int = 0
    n_now: int = 0
    more_runs: int = 0
    """``inconclusive``: new runs that are probably enough to decide; likewise ``more_baseline_runs``."""
    more_baseline_runs: int = 0
    reason: str = ""
    """One sentence."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """By how much new values lie above old ones."""

    estimate: float
    low: float | None
    """Bounds that the rank test at ``ALPHA`` on each side does not reject; ``None``: too few values for any bound."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The answer of one check."""

    verdicts: tuple[Verdict, ...]
    unknown_cases: tuple[str, ...] = ()
    """Cases among the records that the baseline does not hold."""

    @property
    def regressed(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.status == "regressed")

    @property
    def inconclusive(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.status == "inconclusive")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check(
    cases: Sequence[BaselineCase],
    reports: Iterable[StepReport],
    *,
    min_effect: float = 0.03,
    metrics: Sequence[str] = METRICS,
    forecasts: Mapping[str, StepReport] | None = None,
    newest: int | None = None,
) -> Gate:
    """Decides every known metric of every case.

    ``reports`` are measured in the cases' environment; those that the baseline was made from are left out, and only the
    ``newest`` of each case are taken when that is given. ``forecasts`` by job key are today's. A ``min_effect`` of 0.03 lets
    slow-downs below 3 % pass.
    """
    runs: dict[Identity, list[Run]] = {case.identity: [] for case in cases}
    old = {run.record for case in cases for run in case.runs}
    unknown: dict[str, None] = {}
    for report in reports:
        if report.origin == "predicted":
            continue
        if identity_of(report) not in runs:
            unknown[case_name(report)] = None
        elif (run := run_of(report)).record not in old:
            runs[identity_of(report)].append(run)
            old.add(run.record)
    verdicts = [
        verdict
        for case in cases
        for metric in metrics
        if (
            verdict := _decide(
                case,
                metric,
                runs[case.identity][-newest:] if newest else runs[case.identity],
                min_effect,
                (forecasts or {}).get(case.job_key),
            )
        )
        is not None
    ]
    return Gate(verdicts=tuple(verdicts), unknown_cases=tuple(unknown))


def _decide(
    case: BaselineCase, metric: str, now: Sequence[Run], min_effect: float, forecast: StepReport | None
) -> Verdict | None:
    """The verdict, or ``None`` where the baseline (or the forecast) does not know the metric."""
    if metric == "peak_allocated_bytes":
        return _decide_bytes(case, now)
    if metric.endswith("_prediction_error"):
        name = "step_s" if metric.startswith("step") else "peak_allocated_bytes"
        then_s, now_s = case.forecast.get(name), None if forecast is None else getattr(forecast, name)
        if then_s is None or now_s is None:
            return None
        base, new = _errors(case.runs, name, then_s), _errors(now, name, now_s)
        if metric == "peak_prediction_error":
            return _decide_exact_error(case.name, base, new, min_effect) if base else None
        return decide_shift(case.name, metric, base, new, min_effect, lambda x: x, _points) if base else None
    base, new = _known(case.runs, metric), _known(now, metric)
    return decide_ratio(case.name, metric, base, new, min_effect) if base else None


def _known(runs: Iterable[Run], name: str) -> list[float]:
    return [value for run in runs if (value := getattr(run, name)) is not None and value > 0]


def _errors(runs: Iterable[Run], name: str, forecast: float) -> list[float]:
    return [abs(forecast / value - 1) for value in _known(runs, name)]


def _decide_bytes(case: BaselineCase, now: Sequence[Run]) -> Verdict | None:
    """Memory is exact: one byte more than the baseline ever took is a regression."""
    base, new = _known(case.runs, "peak_allocated_bytes"), _known(now, "peak_allocated_bytes")
    if not base:
        return None
    most = max(base)
    fields: dict[str, Any] = {"case": case.name, "metric": "peak_allocated_bytes", "baseline": most}
    fields |= {"n_baseline": len(base), "n_now": len(new), "now": max(new, default=None)}
    if any(run.fits is False for run in now):
        return Verdict(**fields, status="regressed", reason="it runs out of memory, and did not before")
    if not new:
        return Verdict(**fields, status="inconclusive", more_runs=1, reason="no new run: needs 1 more run")
    grown = int(max(new) - most)
    text = f"{format_bytes(abs(grown))} ({grown:+,} bytes, {grown / most:+.2%})"
    if grown > 0:
        return Verdict(**fields, status="regressed", change=grown / most, reason=f"peak memory grew by {text}")
    if max(new) < min(base):
        return Verdict(**fields, status="improved", change=grown / most, reason=f"peak memory shrank by {text}")
    return Verdict(**fields, status="pass", change=grown / most, reason="no growth of peak memory")


def _decide_exact_error(case: str, base: Sequence[float], new: Sequence[float], min_effect: float) -> Verdict:
    """Memory has no noise, so one run decides about the error of its forecast: the worst now against the worst before."""
    fields: dict[str, Any] = {"case": case, "metric": "peak_prediction_error", "baseline": max(base)}
    fields |= {"n_baseline": len(base), "n_now": len(new), "now": max(new, default=None)}
    if not new:
        return Verdict(**fields, status="inconclusive", more_runs=1, reason="no new run: needs 1 more run")
    change = max(new) - max(base)
    status: Status = "regressed" if change >= min_effect else "improved" if change <= -min_effect else "pass"
    text = f"{_points(max(base))} to {_points(max(new))}, {100 * change:+.1f} points"
    return Verdict(**fields, status=status, change=change, reason=f"error of the forecast peak {text}")


def decide_ratio(case: str, metric: str, base: Sequence[float], new: Sequence[float], min_effect: float) -> Verdict:
    """Decides ``step_s`` (less is better) or ``tokens_per_s`` (more is better) by relative change."""
    unit = format_seconds if metric == "step_s" else _rate
    return decide_shift(case, metric, base, new, min_effect, math.log, unit, sign=-1 if metric == "tokens_per_s" else 1)


def decide_shift(
    case: str, metric: str, base: Sequence[float], new: Sequence[float], min_effect: float,
    scale: Callable[[float], float], shown: Callable[[float], str], sign: int = 1,
) -> Verdict:  # fmt: skip
    """Regressed: significantly worse and worse by ``min_effect`` or more; improved: the same for better; pass: a loss of
    ``min_effect`` is excluded; else inconclusive. ``scale`` makes differences comparable (``math.log`` for ratios).
    """
    fields: dict[str, Any] = {"case": case, "metric": metric, "n_baseline": len(base), "n_now": len(new)}
    then = statistics.median(base)
    if not new:
        needed = runs_needed(None, 0.0, 0, len(base))
        return Verdict(
            **fields, status="inconclusive", baseline=then, now=None, more_runs=needed[0], more_baseline_runs=needed[1],
            reason=f"no new run: {_needs(*needed, len(new))}",
        )  # fmt: skip
    now = statistics.median(new)
    worse = shift_of([sign * scale(v) for v in base], [sign * scale(v) for v in new])
    ratio = scale is math.log
    upper = shift_of([sign * scale(v) for v in base], [sign * scale(v) for v in new], ALPHA_PASS).high
    least = math.log1p(min_effect) if ratio else min_effect
    bounds = [sign * b for b in (worse.low, worse.high) if b is not None]
    back: Callable[[float], float] = math.expm1 if ratio else (lambda x: x)
    change, ends = back(sign * worse.estimate), sorted(back(b) for b in bounds)
    fields |= {"baseline": then, "now": now, "change": change}
    fields |= {"low": ends[0], "high": ends[1]} if ends else {}
    unit = "%" if ratio else "points"
    text = f"{shown(then)} to {shown(now)}, {100 * change:+.1f} {unit}"
    text += f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else ""
    if worse.low is not None and worse.high is not None:
        if worse.low > 0 and worse.estimate >= least:
            return Verdict(**fields, status="regressed", reason=f"worse: {text}")
        if worse.high < 0 and worse.estimate <= -least:
            return Verdict(**fields, status="improved", reason=f"better: {text}")
        if upper is not None and upper < least:
            return Verdict(**fields, status="pass", reason=f"no loss of {100 * min_effect:g} {unit}: {text}")
    half = None if worse.low is None or worse.high is None else (worse.high - worse.low) / 2
    room = worse.estimate if worse.estimate >= least else least - worse.estimate
    needed = runs_needed(half, room, len(new), len(base))
    return Verdict(
        **fields, status="inconclusive", more_runs=needed[0], more_baseline_runs=needed[1],
        reason=f"cannot tell, {_needs(*needed, len(new))}: {text}",
    )  # fmt: skip


def shift_of(base: Sequence[float], new: Sequence[float], alpha: float = ALPHA) -> Shift:
    """Hodges-Lehmann estimate and interval; each bound is wrong with a probability of at most ``alpha`` (exact for
    exchangeable, untied values, whatever their distribution).
    """
    differences = np.sort(np.subtract.outer(np.asarray(new, float), np.asarray(base, float)).ravel())
    k = critical_rank(len(new), len(base), alpha)
    return Shift(
        estimate=float(np.median(differences)),
        low=float(differences[k - 1]) if k else None,
        high=float(differences[-k]) if k else None,
    )


@lru_cache(maxsize=4096)
def critical_rank(n: int, m: int, alpha: float = ALPHA) -> int:
    """Largest k with P(U <= k - 1) <= ``alpha`` for Mann and Whitney's U of ``n`` against ``m`` values; 0: none.

    The counts of U are the coefficients of the Gaussian binomial coefficient, in whole numbers.
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):  # times (1 - q^(m+i))
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):  # divided by (1 - q^i)
            counts[u] += counts[u - i]
    most, below, k = alpha * math.comb(n + m, n), 0, 0
    while k <= n * m and below + counts[k] <= most:
        below += counts[k]
        k += 1
    return min(k, (n * m + 1) // 2)


def runs_needed(half_width: float | None, room: float, n: int, m: int) -> tuple[int, int]:
    """(new runs, baseline runs) to add until the interval is probably narrower than ``room``: its half-width shrinks like
    the square root of 1/n + 1/m. A baseline grows only when new runs alone cannot do it.
    """
    for baseline in range(max(m, GOOD_RUNS), MOST_RUNS + 1):
        for new in range(max(n, 1), MOST_RUNS + 1):
            if (new, baseline) == (n, m) or ALPHA * math.comb(new + baseline, new) < 1:  # no bound exists
                continue
            if half_width is None:
                return new - n, baseline - m
            shrunk = half_width * math.sqrt((1 / new + 1 / baseline) / (1 / n + 1 / m))
            if shrunk < room and new <= max(2 * baseline, n):
                return new - n, baseline - m
    return max(MOST_RUNS - n, 1), max(MOST_RUNS - m, 0)


def _needs(new: int, baseline: int, n: int) -> str:
    """What is missing, in words; ``n`` new runs are there."""
    if n + new >= MOST_RUNS:
        return f"needs a quieter machine, or {new} and more further runs on both sides"
    parts = [f"{new} more run{'s' if new != 1 else ''}"] if new else []
    parts += [f"{baseline} more in the baseline"] if baseline else []
    return "needs " + " and ".join(parts)


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f} tokens/s"


def _points(error: float) -> str:
    return f"{error:.1%}"
