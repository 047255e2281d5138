"""The gate: holds new runs of a case against its baseline and decides, metric by metric.

Timed metrics are decided on runs, not on steps: steps of one process share its memory layout, clocks and neighbours, so they
are no independent samples (``benchmarks/bench_gate.py`` counts the false alarms that this would cost). The tests are exact
(``validator.gate.ranks``). Where both sides timed the same yardstick, a change of the machine's own speed is taken out first
(``validator.gate.pace``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from estimator.report import StepReport
from estimator.units import format_bytes, format_seconds
from validator.gate.baseline import BaselineCase, Identity, Report, Run, case_name, identity_of, run_of
from validator.gate.pace import Pace, at_one_pace
from validator.gate.ranks import (
    ALPHA,
    ALPHA_PASS,
    MOST_RUNS,
    Shift,
    pairs_needed,
    runs_needed,
    shift_of,
    shift_of_pairs,
)

Status = Literal["pass", "regressed", "improved", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a run that the gate decides with a test."""

    name: str
    shown: Callable[[float], str]
    """A value for people."""
    sign: int = 1
    """1: less is better, -1: more is."""
    ratio: bool = True
    """Whether relative changes count, or differences."""

    def scale(self, value: float) -> float:
        """So that a larger difference is worse by as much."""
        return self.sign * (math.log(value) if self.ratio else value)

    def change(self, worse: float) -> float:
        """The change of the value that ``worse``, a difference on the scale, stands for."""
        return math.expm1(self.sign * worse) if self.ratio else self.sign * worse


_METRICS = {
    m.name: m
    for m in (
        Metric(name="step_s", shown=format_seconds),
        Metric(name="tokens_per_s", shown=lambda v: f"{v:,.0f}", sign=-1),
        Metric(name="peak_allocated_bytes", shown=format_bytes),
        Metric(name="step_prediction_error", shown=lambda v: f"{v:.1%}", ratio=False),
        Metric(name="peak_prediction_error", shown=lambda v: f"{v:.1%}", ratio=False),
        Metric(name="kernel_bytes_per_s", shown=lambda v: f"{v / 1e9:,.4g} GB/s", sign=-1),
    )
}
METRICS = tuple(_METRICS)


def shown(metric: str, value: float) -> str:
    """A value of ``metric`` for people."""
    return _METRICS[metric].shown(value)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One metric of one case."""

    case: str
    metric: str
    status: Status
    baseline: float | None
    """Median over the runs (bytes: the largest)."""
    now: float | None
    """The same for the new runs; where the machine's speed is taken out, as it would be at the baseline's speed."""
    change: float | None = None
    """Relative change, for prediction errors the difference of the errors; likewise ``low`` and ``high``, its 98 % interval."""
    low: float | None = None
    high: float | None = None
    machine: float | None = None
    """By how much the machine itself was slower (below 0: faster), by its yardstick."""
    taken_out: bool = False
    """Whether that is taken out of the figures above; else the interval is as much wider."""
    n_baseline: int = 0
    n_now: int = 0
    more_runs: int = 0
    """``inconclusive``: new runs that are probably enough to decide; likewise ``more_baseline_runs``."""
    more_baseline_runs: int = 0
    reason: str = ""
    """One sentence."""


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


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One case: its new runs, and how they are to be compared."""

    case: BaselineCase
    new: Sequence[Run]
    min_effect: float
    forecast: StepReport | None = None
    """Today's."""
    paired: bool = False
    """Whether run i of one side was measured beside run i of the other."""


def check(
    cases: Sequence[BaselineCase],
    reports: Iterable[Report],
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
    seen = {run.record for case in cases for run in case.runs}
    unknown: dict[str, None] = {}
    for report in reports:
        if isinstance(report, StepReport) and report.origin == "predicted":
            continue
        if identity_of(report) not in runs:
            unknown[case_name(report)] = None
        elif (run := run_of(report)).record not in seen:
            runs[identity_of(report)].append(run)
            seen.add(run.record)
    verdicts: list[Verdict] = []
    for case in cases:
        new = runs[case.identity][-newest:] if newest else runs[case.identity]
        forecast = (forecasts or {}).get(case.job_key)
        verdicts += check_runs(case, new, min_effect=min_effect, metrics=metrics, forecast=forecast)
    return Gate(verdicts=tuple(verdicts), unknown_cases=tuple(unknown))


def check_runs(
    case: BaselineCase, new: Sequence[Run], *, min_effect: float = 0.03, metrics: Sequence[str] = METRICS,
    forecast: StepReport | None = None, paired: bool = False,
) -> tuple[Verdict, ...]:  # fmt: skip
    """Decides every known metric of ``case``. ``paired``: run i of ``new`` was measured right before or after ``case.runs[i]``."""
    assert not paired or len(new) == len(case.runs), "runs come in pairs"
    question = _Question(case=case, new=new, min_effect=min_effect, forecast=forecast, paired=paired)
    return tuple(verdict for metric in metrics if (verdict := _decide(question, metric)) is not None)


def _decide(q: _Question, metric: str) -> Verdict | None:
    """The verdict, or ``None`` where the baseline (or the forecast) does not know the metric.

    Timed metrics are decided at one pace and as they were measured, each with the doubt that the machine's own change leaves; the
    narrower interval counts.
    """
    if metric == "peak_allocated_bytes":
        return _decide_bytes(q.case, q.new)
    old, new, pace = at_one_pace(q.case.runs, q.new, paired=q.paired)
    verdict = _decide_at(q, metric, old, new, pace)
    if pace is None or verdict is None or metric == "peak_prediction_error":
        return verdict
    plain = _decide_at(q, metric, q.case.runs, q.new, replace(pace, taken_out=False))
    return min((v for v in (verdict, plain) if v is not None), key=_width)


def _width(verdict: Verdict) -> float:
    return math.inf if verdict.low is None or verdict.high is None else verdict.high - verdict.low


def _decide_at(q: _Question, metric: str, old: Sequence[Run], new: Sequence[Run], pace: Pace | None) -> Verdict | None:
    if metric.endswith("_prediction_error"):
        name = "step_s" if metric.startswith("step") else "peak_allocated_bytes"
        then, now = q.case.forecast.get(name), None if q.forecast is None else getattr(q.forecast, name)
        if then is None or now is None:
            return None
        before, after = _errors(old, name, then), _errors(new, name, now)
        if metric == "peak_prediction_error":
            return _decide_exact_error(q.case.name, before, after, q.min_effect) if before else None
    else:
        before, after = _known(old, metric), _known(new, metric)
    if not before:
        return None
    paired = q.paired and len(before) == len(after)
    return decide_shift(q.case.name, metric, before, after, q.min_effect, pace, paired=paired)


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
    text = f"{max(base):.1%} to {max(new):.1%}, {100 * change:+.1f} points"
    return Verdict(**fields, status=status, change=change, reason=f"error of the forecast peak {text}")


def decide_shift(
    case: str, metric: str, base: Sequence[float], new: Sequence[float], min_effect: float, pace: Pace | None = None,
    *, paired: bool = False,
) -> Verdict:  # fmt: skip
    """Regressed: significantly worse and worse by ``min_effect`` or more; improved: the same for better; pass: a loss of
    ``min_effect`` is excluded; else inconclusive.

    ``pace`` is how the machine's speed differed, which ``new`` holds no more; its own uncertainty widens the interval.
    """
    m = _METRICS[metric]
    n_new, n_base = len(new), len(base)
    fields: dict[str, Any] = {"case": case, "metric": metric, "n_baseline": n_base, "n_now": n_new}
    fields |= {"baseline": statistics.median(base), "machine": pace and pace.change}
    fields |= {"taken_out": pace is not None and pace.taken_out}
    if not new:
        needed = runs_needed(None, 0.0, 0, n_base)
        return Verdict(
            **fields, status="inconclusive", now=None, more_runs=needed[0], more_baseline_runs=needed[1],
            reason=f"no new run: {_needs(*needed, n_new)}",
        )  # fmt: skip
    old_values, new_values = [m.scale(v) for v in base], [m.scale(v) for v in new]
    doubt = 0.0 if pace is None else pace.doubt

    def shift(alpha: float) -> Shift:
        if paired:
            return shift_of_pairs([b - a for a, b in zip(old_values, new_values, strict=True)], alpha)
        return shift_of(old_values, new_values, alpha)

    worse, least = shift(ALPHA), math.log1p(min_effect) if m.ratio else min_effect
    upper = shift(ALPHA_PASS).high
    low, high = (None if end is None else end + side * doubt for end, side in ((worse.low, -1), (worse.high, 1)))
    ends = sorted(m.change(end) for end in (low, high) if end is not None)
    change, now, unit = m.change(worse.estimate), statistics.median(new), "%" if m.ratio else "points"
    fields |= {"now": now, "change": change, **({"low": ends[0], "high": ends[1]} if ends else {})}
    text = f"{m.shown(fields['baseline'])} to {m.shown(now)}, {100 * change:+.1f} {unit}"
    text += f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else ""
    text += f"; {pace.text}" if pace is not None else ""
    if low is not None and high is not None:
        if low > 0 and worse.estimate >= least:
            return Verdict(**fields, status="regressed", reason=f"worse: {text}")
        if high < 0 and worse.estimate <= -least:
            return Verdict(**fields, status="improved", reason=f"better: {text}")
        if upper is not None and upper + doubt < least:
            return Verdict(**fields, status="pass", reason=f"no loss of {100 * min_effect:g} {unit}: {text}")
    half = None if worse.low is None or worse.high is None else (worse.high - worse.low) / 2
    room = (worse.estimate if worse.estimate >= least else least - worse.estimate) - doubt
    needed = pairs_needed(half, room, n_new) if paired else runs_needed(half, room, n_new, n_base)
    return Verdict(
        **fields, status="inconclusive", more_runs=needed[0], more_baseline_runs=needed[1],
        reason=f"cannot tell, {_needs(*needed, n_new, paired=paired, hopeless=room <= 0)}: {text}",
    )  # fmt: skip


def _needs(new: int, baseline: int, n: int, *, paired: bool = False, hopeless: bool = False) -> str:
    """What is missing, in words; ``n`` new runs are there."""
    if hopeless:
        return "needs the machine at the baseline's speed"
    many = n + new >= MOST_RUNS
    if paired:
        return (
            f"needs a quieter machine, or {new} and more further pairs" if many else f"needs {new} more pairs of runs"
        )
    if many:
        return f"needs a quieter machine, or {new} and more further runs on both sides"
    parts = [f"{new} more run{'s' if new != 1 else ''}"] if new else []
    parts += [f"{baseline} more in the baseline"] if baseline else []
    return "needs " + " and ".join(parts)
