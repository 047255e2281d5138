"""Forecasts of published runs, and how far they are off."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from estimator.errors import InputError
from estimator.predict import predict
from estimator.units import GIB
from validator.published.expression import allocator_of, job_of
from validator.published.runs import PublishedRun

METRICS = ("step_time_s", "peak_mem_bytes", "fits")


class RunForecast(NamedTuple):
    """What is forecast of one run. Fields are ``None`` where nothing is; ``skipped`` says why."""

    run_id: str
    step_time_s: float | None = None
    step_time_low_s: float | None = None
    step_time_high_s: float | None = None
    peak_mem_bytes: int | None = None
    """Of the rank that needs most: reserved where that is what was published, else allocated."""
    fits: bool | None = None
    skipped: str | None = None


class GroupError(NamedTuple):
    """Errors of one metric over the runs of one source and GPU: forecast / published - 1."""

    source: str
    gpu: str
    metric: str
    n: int
    skipped: int
    """Runs that published the metric and have no forecast of it."""
    median_abs_pct: float | None
    p90_abs_pct: float | None
    bias_pct: float | None
    """Mean with its sign; of ``fits``: the share of runs, all of which fitted, that are forecast not to, below zero."""
    coverage90_pct: float | None
    """Share of runs within the forecast's interval; of ``fits``: share forecast to fit."""


class Evaluation(NamedTuple):
    groups: list[GroupError]
    rows: list[RunForecast]


def evaluate(runs: Sequence[PublishedRun], on_run: Callable[[], None] = lambda: None) -> Evaluation:
    """Forecast every one of ``runs`` with shipped constants and group the errors; ``on_run`` is told of each."""
    rows: list[RunForecast] = []
    grouped: dict[tuple[str, str], list[tuple[PublishedRun, RunForecast]]] = defaultdict(list)
    for run in runs:
        row = forecast(run)
        rows.append(row)
        grouped[run.text("source") or "", run.text("gpu") or ""].append((run, row))
        on_run()
    makers = {"step_time_s": _times, "peak_mem_bytes": _peaks, "fits": _fits}
    groups = [
        error
        for (source, gpu), pairs in sorted(grouped.items())
        for metric in METRICS
        if (error := makers[metric](source, gpu, pairs)) is not None
    ]
    return Evaluation(groups, rows)


def forecast(run: PublishedRun) -> RunForecast:
    """One run's forecast, or the reason why there is none."""
    kind = run.text("peak_mem_kind")
    try:
        report = predict(job_of(run), allocator=allocator_of(run) if kind == "reserved" else None)
    except InputError as error:
        return RunForecast(run.run_id, skipped=str(error))
    skipped = None
    if run.number("peak_mem_gib") is not None and kind not in ("allocated", "reserved"):
        skipped = f"peak_mem_bytes: {kind or 'unknown'} memory; forecast: allocated, reserved"
    memory = report.peak_reserved_bytes if kind == "reserved" else report.peak_allocated_bytes
    return RunForecast(
        run.run_id,
        report.step_s,
        report.step_low_s,
        report.step_high_s,
        memory if skipped is None else None,
        report.fits,
        skipped,
    )


Pairs = Sequence[tuple[PublishedRun, RunForecast]]


def _times(source: str, gpu: str, pairs: Pairs) -> GroupError | None:
    measured = [(run.number("step_time_s"), row) for run, row in pairs if run.number("step_time_s") is not None]
    ready = [(seconds, row) for seconds, row in measured if seconds and row.step_time_s is not None]
    errors = [100 * (row.step_time_s / seconds - 1) for seconds, row in ready]  # type: ignore[operator]
    inside = [row.step_time_low_s <= seconds <= row.step_time_high_s for seconds, row in ready]  # type: ignore[operator]
    return _error(source, gpu, "step_time_s", len(measured), errors, inside)


def _peaks(source: str, gpu: str, pairs: Pairs) -> GroupError | None:
    measured = [(run.number("peak_mem_gib"), row) for run, row in pairs if run.number("peak_mem_gib") is not None]
    errors = [100 * (row.peak_mem_bytes / (gib * GIB) - 1) for gib, row in measured if gib and row.peak_mem_bytes]
    return _error(source, gpu, "peak_mem_bytes", len(measured), errors, None)


def _fits(source: str, gpu: str, pairs: Pairs) -> GroupError | None:
    """Every run that published its seconds fitted its GPUs."""
    ran = [row for run, row in pairs if run.number("step_time_s") is not None]
    said = [row.fits for row in ran if row.fits is not None]
    if not ran:
        return None
    right = 100 * sum(said) / len(said) if said else None
    return GroupError(
        source, gpu, "fits", len(said), len(ran) - len(said), None, None, None if right is None else right - 100, right
    )


def _error(
    source: str, gpu: str, metric: str, n_measured: int, errors: list[float], inside: list[bool] | None
) -> GroupError | None:
    if not n_measured:
        return None
    if not errors:
        return GroupError(source, gpu, metric, 0, n_measured, None, None, None, None)
    sizes = sorted(abs(error) for error in errors)
    return GroupError(
        source,
        gpu,
        metric,
        len(errors),
        n_measured - len(errors),
        statistics.median(sizes),
        _quantile(sizes, 0.9),
        statistics.fmean(errors),
        None if inside is None else 100 * sum(inside) / len(inside),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the nearest two, as NumPy's default."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
