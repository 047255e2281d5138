"""A campaign of kernels: one process times them one after the other; a crash costs that kernel only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.time.profile import HardwareProfile
from estimator.units import format_seconds
from validator.kernels.case import KernelCase
from validator.kernels.files import kernel_from_json, kernel_to_json
from validator.kernels.remote import START_S, Remote
from validator.kernels.report import KernelReport
from validator.kernels.suite import KernelPlan
from validator.kernels.summary import KernelRow, summarise, with_forecasts
from validator.measure.runner import MeasureError, TimeLimitError
from validator.measure.worker import write_atomically
from validator.provenance import cpu_model
from validator.store.journal import Identity, Journal, Tell

FILE_NAME = "kernels.jsonl"
LIMIT_S = 60.0
"""For one kernel; it is ended then."""
SHORTEST_S = 1.0
"""Less time than this is not worth starting a kernel in."""


@dataclass(kw_only=True)
class KernelSummary:
    """What one campaign did. Kernels on one size each, unless a field says otherwise."""

    suite: str
    measured: int = 0
    recorded: int = 0
    """Skipped: the folder has them from before."""
    failed: int = 0
    """Crashed, out of memory, or past the limit."""
    remain: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Combinations that are no case, by reason."""
    seconds: float = 0.0
    kernels: dict[str, Any] = field(default_factory=dict)
    """``summarise`` over all records of this suite."""


class KernelRecords(Journal[KernelReport]):
    """The records in ``folder/kernels.jsonl``. ``devices``: name of the device that ``"cpu"`` and ``"cuda"`` mean here."""

    def __init__(self, folder: Path, tell: Tell, devices: dict[str, str]) -> None:
        self._devices = devices
        super().__init__(folder, FILE_NAME, tell, parse=kernel_from_json, identity=_identity_of_report)

    def identity(self, case: KernelCase) -> Identity:
        return f"kernel on {self._devices[case.device]}", case.key, None

    def add(self, report: KernelReport) -> None:
        """Append ``report``; it is on the disk when this returns."""
        self.write(report, kernel_to_json(report))


def _identity_of_report(report: KernelReport) -> Identity:
    return f"kernel on {report.device_name}", report.key, None


def run_kernel_campaign(
    plan: KernelPlan, folder: Path, budget_s: float, tell: Tell, profile: HardwareProfile | None = None,
    *, device: str | None = None, remote: Remote | None = None,
) -> KernelSummary:  # fmt: skip
    """Measure as much of ``plan`` as ``budget_s`` seconds allow, in its order, skipping what ``folder`` has recorded.

    ``device``: what CUDA calls this machine's GPU. What failed before comes last. Raises ``InputError`` when ``folder``
    cannot be used, or the plan needs a GPU and there is none.
    """
    if not budget_s > 0:
        raise InputError(f"budget_s is {budget_s!r}; allowed: seconds > 0")
    if plan.needs_gpu and device is None:
        raise InputError(
            f"suite {plan.suite!r} needs a GPU and torch can use none here; allowed without one: kernels-cpu"
        )
    start = time.monotonic()
    deadline = start + budget_s
    summary = KernelSummary(suite=plan.suite)
    for item in plan.left_out:
        summary.left_out[item.reason] = summary.left_out.get(item.reason, 0) + 1
    records = KernelRecords(folder, tell, {"cpu": cpu_model() or "", "cuda": device or ""})
    reports: list[KernelReport] = []
    try:
        with remote or Remote() as bench:
            cases = sorted(plan.cases, key=lambda case: records.failed_before(records.identity(case)))
            for number, case in enumerate(cases, start=1):
                known = records.known(records.identity(case))
                if known is not None:
                    summary.recorded += 1
                    reports.append(known)
                    continue
                report = _measure(case, bench, records, deadline, summary)
                if isinstance(report, KernelReport):
                    reports.append(report)
                    report = _told(with_forecasts([report], profile)[0])
                if report:
                    tell(f"[{time.monotonic() - start:.0f} s, {number}/{len(cases)}] {case.label}: {report}")
    finally:
        summary.kernels = summarise(with_forecasts(reports, profile))
        summary.seconds = round(time.monotonic() - start, 1)
        records.close()
        try:
            write_atomically(folder / "summary.json", asdict(summary))
        except OSError as error:
            tell(f"the summary cannot be written: {error.strerror or error}")
    return summary


def _measure(
    case: KernelCase, bench: Remote, records: KernelRecords, deadline: float, summary: KernelSummary
) -> KernelReport | str:
    """The record of ``case``, written down; or a sentence for people, empty when there was no time to start."""
    left_s = deadline - time.monotonic()
    if left_s < SHORTEST_S:
        summary.remain += 1
        return ""
    limit_s = LIMIT_S + (0.0 if bench.is_running else START_S)
    try:
        report = bench.measure(case, min(limit_s, left_s))
    except MeasureError as error:
        if isinstance(error, TimeLimitError) and left_s < limit_s:
            summary.remain += 1
            return "ended, the budget is used up; it runs again next time"
        summary.failed += 1
        records.write_failure(records.identity(case), str(error), {"kernel": asdict(case)})
        return f"failed: {error}"
    records.add(report)
    summary.measured += 1
    return report


def _told(row: KernelRow) -> str:
    r = row.report
    error = "" if row.error is None else f" (forecast {row.error:+.0%})"
    return f"{format_seconds(r.seconds)}{error}, {r.bytes_per_s / 1e9:.4g} GB/s, {r.of_copy:.0%} of a copy"


def kernel_summary_lines(summary: KernelSummary) -> Iterator[str]:
    """The summary for people."""
    s, k = summary, summary.kernels
    yield (
        f"{s.suite}: {s.measured} measured, {s.recorded} recorded before, {s.failed} failed, {s.remain} remain, "
        f"{sum(s.left_out.values())} left out, in {s.seconds:.0f} s"
    )
    for reason, n in sorted(s.left_out.items(), key=lambda item: -item[1])[:5]:
        yield f"  left out {n}: {reason}"
    if k.get("of_copy"):
        worst = k["worst"]
        yield (
            f"  share of a copy's bandwidth at the largest size: median of {len(k['of_copy'])} kernels "
            f"{k['median_of_copy']:.0%}, worst {k['of_copy'][worst]:.0%} ({worst})"
        )
        yield "  " + ", ".join(f"{name} {share:.0%}" for name, share in k["of_copy"].items())
    if k.get("against"):
        yield "  times faster than the best of the others at the largest size: " + ", ".join(
            f"{name} {a['faster']:.2f} ({a['than']})" for name, a in k["against"].items()
        )
    for name, goal in k.get("goals", {}).items():
        yield f"  {name}: {goal['status']} ({goal['detail']})"
    if "forecast" in k:
        e = k["forecast"]
        yield f"  forecast over {e['n']} records: median error {e['median']:.0%}, worst {e['worst']:+.0%} ({e['worst_case']})"
    for reason, n in k.get("no_forecast", {}).items():
        yield f"  no forecast for {n}: {reason}"


def plan_to_dict(plan: KernelPlan) -> dict[str, Any]:
    """What ``--dry-run`` prints."""
    return {
        "suite": plan.suite,
        "about": plan.about,
        "cases": [case.label for case in plan.cases],
        "left_out": [{**item.settings, "reason": item.reason} for item in plan.left_out],
    }
