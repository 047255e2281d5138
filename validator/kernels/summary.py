"""What kernel records say together: shares of the copy's bandwidth, and errors of the forecast."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from estimator.errors import InputError
from estimator.time.profile import HardwareProfile
from validator.kernels.forecast import Forecaster
from validator.kernels.goals import PRODUCTS, contests, goals
from validator.kernels.report import KernelReport


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One record beside its forecast."""

    report: KernelReport
    forecast_s: float | None
    """``None``: there is none."""
    why: str = ""
    """Why not."""

    @property
    def error(self) -> float | None:
        """Forecast over measured, less one."""
        return None if self.forecast_s is None else self.forecast_s / self.report.seconds - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        r = self.report
        return {
            "kernel": r.kernel, "backward": r.backward, "both": r.both, "implementation": r.implementation, "device": r.device,
            "device_name": r.device_name, "dtype": r.dtype, "shape": list(r.shape), "bytes": r.bytes, "seconds": r.seconds,
            "peak_bytes": r.peak_bytes,
            "spread_s": r.spread_s, "bytes_per_s": r.bytes_per_s, "of_copy": r.of_copy, "forecast_s": self.forecast_s,
            "error": self.error, "no_forecast": self.why,
        }  # fmt: skip


def with_forecasts(reports: Iterable[KernelReport], profile: HardwareProfile | None = None) -> list[KernelRow]:
    """Every report beside its forecast."""
    forecaster, rows = Forecaster(profile), []
    for report in reports:
        try:
            rows.append(KernelRow(report=report, forecast_s=forecaster.seconds(report)))
        except InputError as error:
            rows.append(KernelRow(report=report, forecast_s=None, why=str(error)))
    return rows


def summarise(rows: Sequence[KernelRow]) -> dict[str, Any]:
    """``of_copy``: median share of the copy's bandwidth by kernel at the largest size of each dtype, of what the runtime
    runs, ``worst`` the least of them; ``forecast``: count, median absolute and worst error; ``no_forecast``: counts by
    reason. With kernels of ours among them ``against``: how many times faster they are than the best of the others at the largest
    size, which that is, and ``goals``."""
    largest: dict[tuple[str, str], KernelReport] = {}
    for row in rows:
        if row.report.implementation not in ("torch", "cuda") or row.report.kernel in PRODUCTS:
            continue
        at = (short_name(row.report), row.report.dtype)
        if at not in largest or row.report.bytes > largest[at].bytes:
            largest[at] = row.report
    shares: dict[str, list[float]] = {}
    for (name, _), report in largest.items():
        shares.setdefault(name, []).append(report.of_copy)
    of_copy = {name: statistics.median(values) for name, values in sorted(shares.items())}
    data: dict[str, Any] = {"n": len(rows), "of_copy": of_copy}
    if of_copy:
        data["median_of_copy"] = statistics.median(of_copy.values())
        data["worst"] = min(of_copy, key=lambda name: of_copy[name])
    known = [(row.error, row.report.label) for row in rows if row.error is not None]
    if known:
        worst, label = max(known, key=lambda item: abs(item[0]))
        median = statistics.median(abs(error) for error, _ in known)
        data["forecast"] = {"n": len(known), "median": median, "worst": worst, "worst_case": label}
    reasons: dict[str, int] = {}
    for row in rows:
        if row.why:
            reasons[row.why] = reasons.get(row.why, 0) + 1
    data["no_forecast"] = reasons
    reports = [row.report for row in rows]
    if any(report.implementation == "cuda" for report in reports):
        data["against"] = _against(reports)
        data["goals"] = {goal.name: {"status": goal.status, "detail": goal.detail} for goal in goals(reports)}
    return data


def _against(reports: Sequence[KernelReport]) -> dict[str, dict[str, Any]]:
    """By kernel and dtype."""
    found: dict[str, dict[str, Any]] = {}
    for contest in sorted(contests(reports), key=lambda c: c.any.bytes):
        best = contest.best_rival
        if best is not None and (ratio := contest.faster(best)):
            found[f"{contest.any.passes} {contest.any.dtype}"] = {"faster": ratio, "than": best}
    return dict(sorted(found.items()))


def kernel_comparison(rows: Sequence[KernelRow]) -> dict[str, Any]:
    """Summary and every row, plain data for JSON."""
    return {**summarise(rows), "rows": [row.to_dict() for row in rows]}


def short_name(report: KernelReport) -> str:
    """Kernel, direction, and implementation where it is not torch."""
    return report.passes + ("" if report.implementation == "torch" else f" [{report.implementation}]")
