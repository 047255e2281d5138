"""``run_campaign``: measure as much of a suite as fits into a time budget, and go on from there the next time.

Reports are appended to ``DIR/records.jsonl`` one by one, each on the disk before the next case starts, so that killing
the campaign loses at most the case under way. Cases that gave no result go to ``DIR/failures.jsonl``; the next campaign
tries them again, after all others. ``DIR/summary.json`` holds the last campaign's summary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from estimator.errors import InputError
from estimator.report import StepReport
from estimator.time.profile import HardwareProfile
from estimator.units import format_bytes, format_seconds
from validator.compare import predict_for
from validator.measure.case import Case, case_to_dict
from validator.measure.runner import MeasureError, TimeLimitError, measure
from validator.measure.worker import write_atomically
from validator.store.journal import Identity, Journal, Tell
from validator.store.records import report_from_json, report_to_json
from validator.suites import Boundary, Plan

RESERVE_S = 4.0
"""End of the budget in which nothing runs: what it may take to end a case's processes."""
SHORTEST_S = 5.0
"""Less time than this is not worth starting a process in."""


class Records(Journal[StepReport]):
    """The reports in ``folder/records.jsonl``."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        super().__init__(folder, "records.jsonl", tell, parse=report_from_json, identity=_identity_of_report)

    def find(self, case: Case) -> StepReport | None:
        """The last report of ``case``, of its rank where one is played; with its ``reference`` where that is asked for."""
        report = self.known(_identity(case))
        return None if report is not None and case.reference and not (report.parity or report.fits is False) else report

    def has_failed(self, case: Case) -> bool:
        """Whether ``case`` gave no result in an earlier campaign."""
        return self.failed_before(_identity(case))

    def add(self, report: StepReport) -> None:
        """Append ``report``; it is on the disk when this returns. Raises ``InputError`` when it cannot be written."""
        self.write(report, report_to_json(report))

    def add_failure(self, case: Case, error: str) -> None:
        """Append a case that gave no result."""
        self.write_failure(_identity(case), error, {"case": case_to_dict(case)})


def _identity(case: Case) -> Identity:
    return case.backend, case.job.key, case.rank if case.plays_one_rank else None


def _identity_of_report(report: StepReport) -> Identity:
    return report.origin, report.job_key, report.rank if report.origin in ("fake", "cuda-virtual") else None


@dataclass(frozen=True, kw_only=True)
class BoundaryResult:
    """How far one search for the largest micro-batch has come."""

    label: str
    forecast: int
    """Largest micro-batch that is forecast to fit, like ``ran`` in sequences."""
    ran: int
    """Largest micro-batch that ran; 0: none."""
    failed: int | None
    """Smallest one that ran out of memory; ``None``: none did."""
    finished: bool


@dataclass(kw_only=True)
class Summary:
    """What one campaign did. Cases, unless a field says otherwise."""

    suite: str
    measured: int = 0
    """New results, those that ran out of memory included."""
    out_of_memory: int = 0
    recorded: int = 0
    """Skipped: the folder has them from before."""
    failed: int = 0
    remain: int = 0
    """Not started, or ended by the end of the budget. Searches count as one each until they are finished."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Combinations that are no case, by reason."""
    seconds: float = 0.0
    peak_error: dict[str, Any] | None = None
    """Of the forecast's peak over all records of this suite, as fractions: ``n``, ``median``, ``worst``, ``worst_case``."""
    wrong_verdicts: list[str] = field(default_factory=list)
    """Cases that ran and were forecast not to fit, or the other way round."""
    boundaries: list[BoundaryResult] = field(default_factory=list)
    unforecast: dict[str, int] = field(default_factory=dict)
    """Records without a forecast, by reason."""


def next_probe(forecast: int, largest: int, results: dict[int, bool]) -> int | None:
    """The micro-batch to try next, given which ones ran; ``None`` when the boundary is known.

    First the forecast itself, then away from it in growing steps until one runs and one does not, then halves between.
    The boundary is searched to one sequence up to 64, above to a 64th.
    """
    low = max((size for size, ran in results.items() if ran), default=0)
    high = min((size for size, ran in results.items() if not ran), default=largest + 1)
    start = min(max(forecast, 1), largest)
    if not results:
        return start
    if high - low <= max(1, low // 64) or low >= largest:
        return None
    step = max(1, start // 16) * 2 ** (len(results) - 1)
    if not any(results.values()):
        return max(1, high - step)
    if all(results.values()):
        return min(largest, low + step)
    return (low + high) // 2


class _Search:
    """One boundary under way."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary, self.label = boundary, boundary.label
        self.forecast = boundary.forecast()
        self.results: dict[int, bool] = {}
        self.gave_up = False

    def next_size(self) -> int | None:
        return None if self.gave_up else next_probe(self.forecast, self.boundary.largest, self.results)

    def result(self) -> BoundaryResult:
        return BoundaryResult(
            label=self.label,
            forecast=self.forecast,
            ran=max((n for n, ran in self.results.items() if ran), default=0),
            failed=min((n for n, ran in self.results.items() if not ran), default=None),
            finished=not self.gave_up and self.next_size() is None,
        )


class _Campaign:
    def __init__(
        self, plan: Plan, records: Records, budget_s: float, tell: Tell, profile: HardwareProfile | None
    ) -> None:
        self.plan, self.records, self.tell, self.profile = plan, records, tell, profile
        self.start = time.monotonic()
        self.deadline = self.start + budget_s
        self.searches = [_Search(boundary) for boundary in plan.boundaries]
        self.recent: deque[float] = deque(maxlen=5)
        """Seconds that the last cases took."""
        self.reports: list[tuple[Case, StepReport]] = []
        self.summary = Summary(suite=plan.suite)
        self.n_seen = 0
        self._unforecast = ""

    def run(self) -> Summary:
        s = self.summary
        for item in self.plan.left_out:
            kind = item.reason.split(":")[-1].strip() if item.reason.startswith("the same step") else item.reason
            s.left_out[kind] = s.left_out.get(kind, 0) + 1
        try:
            for case in sorted(self.plan.cases, key=self.records.has_failed):
                s.remain += self._take(case) == "late"
            under_way = self.searches
            while under_way:  # one probe each in turn
                under_way = [search for search in under_way if self._probe(search)]
        finally:
            self._finish()
        return s

    def _probe(self, search: _Search) -> bool:
        """One more step of a search; whether it may go on."""
        size = search.next_size()
        if size is None:
            return False
        outcome = self._take(search.boundary.case_at(size))
        if isinstance(outcome, StepReport):
            search.results[size] = outcome.fits is not False
            return True
        search.gave_up = True
        return False

    def _take(self, case: Case) -> StepReport | str:
        """The report of ``case``, from the records or measured now; ``"late"`` or ``"failed"`` when there is none."""
        self.n_seen += 1
        known = self.records.find(case)
        if known is not None:
            self.summary.recorded += 1
            self.reports.append((case, known))
            return known
        left_s = self.deadline - RESERVE_S - time.monotonic()
        if left_s < max(SHORTEST_S, float(np.median(self.recent)) if self.recent else 0.0):
            return "late"
        started = time.monotonic()
        try:
            report = measure(replace(case, time_limit_s=min(case.time_limit_s, left_s)))
        except (MeasureError, InputError) as error:
            if isinstance(error, TimeLimitError) and left_s < case.time_limit_s:
                self._say(case, "ended, the budget is used up; it runs again next time")
                return "late"
            self.summary.failed += 1
            self.records.add_failure(case, str(error))
            self._say(case, f"failed: {str(error).splitlines()[0]}")
            return "failed"
        self.recent.append(time.monotonic() - started)
        self.records.add(report)
        self.summary.measured += 1
        self.summary.out_of_memory += report.fits is False
        self.reports.append((case, report))
        self._say(case, f"{_told(report, self._forecast(report))}, took {self.recent[-1]:.1f} s")
        return report

    def _say(self, case: Case, what: str) -> None:
        spent = time.monotonic() - self.start
        total = f"/{len(self.plan.cases)}" if self.plan.cases else ""
        self.tell(f"[{spent:.0f} s, {self.n_seen}{total}] {case.label}: {what}")

    def _forecast(self, report: StepReport) -> StepReport | None:
        """The forecast for a record; the reason is counted when there is none."""
        gpu = self.profile.gpu.name if self.profile and self.profile.gpu else None
        fitting = self.profile if gpu == (report.job.get("cluster") or {}).get("gpu", {}).get("name") else None
        try:
            return predict_for(report, fitting)
        except InputError as error:
            self._unforecast = str(error)
            return None

    def _finish(self) -> None:
        s, errors = self.summary, []
        for case, report in self.reports:
            forecast = self._forecast(report)
            if forecast is None:
                s.unforecast[self._unforecast] = s.unforecast.get(self._unforecast, 0) + 1
                continue
            if None not in (forecast.fits, report.fits) and forecast.fits != report.fits:
                s.wrong_verdicts.append(case.label)
            if forecast.peak_allocated_bytes is not None and report.peak_allocated_bytes:
                errors.append((forecast.peak_allocated_bytes / report.peak_allocated_bytes - 1, case.label))
        if errors:
            worst, label = max(errors, key=lambda error: abs(error[0]))
            median = float(np.median([abs(error) for error, _ in errors]))
            s.peak_error = {"n": len(errors), "median": median, "worst": worst, "worst_case": label}
        s.boundaries = [search.result() for search in self.searches]
        s.remain += sum(not b.finished for b in s.boundaries)
        s.seconds = round(time.monotonic() - self.start, 1)
        try:
            write_atomically(self.records.path.with_name("summary.json"), asdict(s))
        except OSError as error:
            self.tell(f"the summary cannot be written: {error.strerror or error}")


def _told(report: StepReport, forecast: StepReport | None) -> str:
    """One measured case in a few words, with its forecast."""
    if report.peak_allocated_bytes is None and report.fits is False:
        expected = {True: "forecast to fit", False: "as forecast", None: ""}[forecast.fits if forecast else None]
        return f"out of memory{f' ({expected})' if expected else ''}"
    words = []
    if report.peak_allocated_bytes is not None:
        error = ""
        if forecast is not None and forecast.peak_allocated_bytes is not None:
            error = f" (forecast {forecast.peak_allocated_bytes / report.peak_allocated_bytes - 1:+.2%})"
        words.append(f"peak {format_bytes(report.peak_allocated_bytes)}{error}")
    if report.step_s is not None:
        words.append(f"{format_seconds(report.step_s)} a step")
    return ", ".join(words) or "ran"


def run_campaign(
    plan: Plan, folder: Path, budget_s: float, tell: Tell, profile: HardwareProfile | None = None
) -> Summary:
    """Run as much of ``plan`` as ``budget_s`` seconds allow, in its order, skipping what ``folder`` has recorded.

    Each case runs in processes of its own with its time limit; running out of memory is a result. ``profile`` is used for
    forecasts of its own GPU. Raises ``InputError`` when ``folder`` cannot be used.
    """
    if not budget_s > 0:
        raise InputError(f"budget_s is {budget_s!r}; allowed: seconds > 0")
    records = Records(folder, tell)
    try:
        return _Campaign(plan, records, budget_s, tell, profile).run()
    finally:
        records.close()


def summary_lines(summary: Summary) -> Iterator[str]:
    """The summary for people."""
    s = summary
    yield (
        f"{s.suite}: {s.measured} measured ({s.out_of_memory} out of memory), {s.recorded} recorded before, "
        f"{s.failed} failed, {s.remain} remain, {sum(s.left_out.values())} left out, in {s.seconds:.0f} s"
    )
    for reason, n in sorted(s.left_out.items(), key=lambda item: -item[1])[:5]:
        yield f"  left out {n}: {reason}"
    if s.peak_error:
        e = s.peak_error
        yield (
            f"  forecast of the peak over {e['n']} records: median error {e['median']:.2%}, worst {e['worst']:+.2%} "
            f"({e['worst_case']})"
        )
    for label in s.wrong_verdicts:
        yield f"  wrong verdict: {label}"
    for b in s.boundaries:
        edge = f"ran up to {b.ran}, out of memory at {b.failed}" if b.failed else f"ran up to {b.ran}"
        yield f"  {b.label}: {edge}, forecast {b.forecast}{'' if b.finished else ' (not finished)'}"
    for reason, n in s.unforecast.items():
        yield f"  no forecast for {n}: {reason}"
