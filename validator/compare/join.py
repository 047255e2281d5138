"""``compare``: a join of predictions and measurements on the job key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from estimator.errors import InputError
from estimator.job.files import job_from_dict
from estimator.report import StepReport
from validator.compare.blame import Blame, blames_of
from validator.compare.errors import TermSummary, settings_of, spearman, summarise
from validator.compare.rows import Row, label_of, rows_of, without_network

Pair = tuple[StepReport, StepReport]
"""A prediction and a measurement of the same job."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a case fits, said and seen."""

    case: str
    job_key: str
    origin: str
    predicted: bool
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Predicted beside measured. Pure data; tables are drawn above this floor."""

    rows: tuple[Row, ...]
    settings: dict[str, dict[str, str]]
    """Job key -> the job's group under each of ``GROUPINGS`` but the backend, which a row knows itself."""
    summaries: tuple[TermSummary, ...]
    blames: tuple[Blame, ...]
    """Bytes on the wire that differ, then the largest absolute error first."""
    verdicts: tuple[Verdict, ...]
    step_rank_correlation: dict[str, float | None]
    """Spearman's rank correlation of step seconds over the cases of each origin (of each origin and GPU, where there are
    several GPUs); ``None`` below two different ones."""
    step_in_interval: dict[str, tuple[int, int]]
    """Origin -> steps measured within the interval of their forecast, and steps measured that have one."""
    unpredicted: tuple[str, ...]
    """Keys of measured jobs without a prediction."""
    unmeasured: tuple[str, ...]
    """Keys of predicted jobs without a measurement."""

    @property
    def inexact(self) -> tuple[Row, ...]:
        """Rows that must be exact and are not."""
        return tuple(row for row in self.rows if row.must_be_exact and row.predicted != row.measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, each row with its error."""
        data = asdict(self)
        data["rows"] = [{**asdict(row), "error": row.error} for row in self.rows]
        data["inexact"] = [asdict(row) for row in self.inexact]
        return data


def compare(predicted: Sequence[StepReport], measured: Sequence[StepReport]) -> Comparison:
    """Joins ``predicted`` and ``measured`` on the job key, every term that both know.

    Several measurements of a job are compared one by one; of several predictions the last counts.
    """
    by_key = {report.job_key: report for report in predicted}
    measured_keys = {m.job_key for m in measured}
    return compare_pairs(
        [(by_key[m.job_key], m) for m in measured if m.job_key in by_key],
        unpredicted=(m.job_key for m in measured if m.job_key not in by_key),
        unmeasured=(key for key in by_key if key not in measured_keys),
    )


def compare_pairs(pairs: Sequence[Pair], unpredicted: Iterable[str] = (), unmeasured: Iterable[str] = ()) -> Comparison:
    """Compares each prediction with its measurement: for records of several machines, each with forecasts of its own."""
    rows = tuple(row for prediction, measurement in pairs for row in rows_of(prediction, measurement))
    blames = [blame for prediction, measurement in pairs for blame in blames_of(prediction, measurement)]
    settings = {
        m.job_key: {name: value for name, value in settings_of(m).items() if name != "backend"} for _, m in pairs
    }
    return Comparison(
        rows=rows,
        settings=settings,
        summaries=summarise(rows),
        blames=tuple(sorted(blames, key=lambda blame: blame.place)),
        verdicts=tuple(
            Verdict(case=label_of(m), job_key=m.job_key, origin=m.origin, predicted=p.fits, measured=m.fits)
            for p, m in pairs
            if p.fits is not None and m.fits is not None
        ),
        step_rank_correlation=_rank_correlations(rows, settings),
        step_in_interval=_in_interval(pairs),
        unpredicted=tuple(dict.fromkeys(unpredicted)),
        unmeasured=tuple(dict.fromkeys(unmeasured)),
    )


def predict_for(report: StepReport, profile: Any = None) -> StepReport:
    """The prediction for the job of a measured ``report``: of what ran on a GPU with its allocator simulated, whose bytes are then those
    that torch counts, and of a virtual rank without the network's buffers. Raises ``InputError`` when the report carries no job."""
    if not report.job:
        raise InputError(f"the record of job {report.job_key} does not hold its job, so it cannot be predicted again")
    from estimator.memory.allocator_settings import AllocatorSettings
    from estimator.predict import predict

    on_gpu = report.origin in ("cuda", "cuda-virtual")
    allocator = AllocatorSettings() if on_gpu else None
    predicted = predict(job_from_dict(report.job), profile=profile, rank=report.rank, allocator=allocator)
    if predicted.allocator_bytes is not None:
        predicted = replace(predicted, peak_allocated_bytes=predicted.allocator_bytes)
    at_peak = dict(predicted.category_bytes_at_peak)
    if report.origin == "cuda-virtual" and (absent := at_peak.pop("comm_buffers", 0)):
        used = (predicted.device_used_bytes or absent) - absent
        predicted = replace(predicted, device_used_bytes=used, category_bytes_at_peak=at_peak)
    return predicted


def _rank_correlations(rows: Sequence[Row], settings: Mapping[str, Mapping[str, str]]) -> dict[str, float | None]:
    by_place: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.term == "step_s":
            by_place[row.origin, settings[row.job_key]["gpu"]].append(row)
    several = len(by_place) > len({origin for origin, _ in by_place})
    return {
        f"{origin} on {gpu}" if several else origin: spearman([r.predicted for r in group], [r.measured for r in group])
        for (origin, gpu), group in by_place.items()
    }


def _in_interval(pairs: Sequence[Pair]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for p, m in pairs:
        if m.step_s is None or p.step_low_s is None or p.step_high_s is None or without_network(m):
            continue
        inside, n = found.get(m.origin, (0, 0))
        found[m.origin] = inside + (p.step_low_s <= m.step_s <= p.step_high_s), n + 1
    return found
