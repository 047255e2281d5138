"""Holds predictions against measurements: a join on the job key, term by term."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from estimator.errors import InputError
from estimator.job.files import job_from_dict
from estimator.report import StepReport
from validator.case import job_label

SCALAR_TERMS = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "host_bytes",
    "pinned_bytes",
    "step_s",
    "tokens_per_s",
)
NAMED_TERMS = (
    "category_peak_bytes",
    "phase_peak_bytes",
    "time_parts_s",
    "collective_bytes",
    "collective_calls",
    "copy_bytes",
)
EXACT_TERMS = ("collective_bytes",)
"""Terms of integer arithmetic that both floors share: any difference is a bug."""
OUTSIDE_ALLOCATOR = ("cuda_context", "comm_buffers", "fragmentation")
"""Categories that a measurement of live tensors cannot see."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One term of one case. Bytes, seconds, tokens per second or a count, as the term's name says."""

    case: str
    job_key: str
    origin: str
    """Where the measurement comes from."""
    term: str
    """Field of ``StepReport``, with ``.name`` for one of its named numbers, e.g. ``"category_peak_bytes.params"``."""
    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        """``predicted / measured - 1``; ``None`` when the measurement is 0 and the prediction is not."""
        if self.measured:
            return self.predicted / self.measured - 1
        return None if self.predicted else 0.0

    @property
    def must_be_exact(self) -> bool:
        return self.term.partition(".")[0] in EXACT_TERMS


@dataclass(frozen=True, kw_only=True)
class TermSummary:
    """Errors of one term over all cases, as fractions."""

    term: str
    n: int
    """Rows with an error."""
    n_undefined: int
    """Rows where 0 was measured and something predicted."""
    median: float | None
    """Of the absolute error, like ``p90`` and ``worst``."""
    p90: float | None
    worst: float | None
    bias: float | None
    """Mean signed error: above 0 when predictions are too high."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """One case's error in peak memory or step time and the part that causes most of it."""

    case: str
    job_key: str
    origin: str
    total: str
    """``"peak_allocated_bytes"`` or ``"step_s"``."""
    error: float
    """Of the total, as a fraction."""
    term: str | None
    """The part with the largest difference; ``None`` when no part was measured."""
    difference: float | None
    """Predicted minus measured of that part, in bytes or seconds."""


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
    summaries: tuple[TermSummary, ...]
    blames: tuple[Blame, ...]
    """Largest absolute error first."""
    verdicts: tuple[Verdict, ...]
    step_rank_correlation: dict[str, float | None]
    """Spearman's rank correlation of step seconds over the cases of each origin; ``None`` below two different ones."""
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
    pairs = [(by_key[m.job_key], m) for m in measured if m.job_key in by_key]
    rows = tuple(row for prediction, measurement in pairs for row in _rows(prediction, measurement))
    blames = [blame for prediction, measurement in pairs for blame in _blames(prediction, measurement)]
    measured_keys = {m.job_key for m in measured}
    return Comparison(
        rows=rows,
        summaries=summarise(rows),
        blames=tuple(sorted(blames, key=lambda blame: -abs(blame.error))),
        verdicts=tuple(
            Verdict(case=label_of(m), job_key=m.job_key, origin=m.origin, predicted=p.fits, measured=m.fits)
            for p, m in pairs
            if p.fits is not None and m.fits is not None
        ),
        step_rank_correlation=_rank_correlations(rows),
        unpredicted=tuple(dict.fromkeys(m.job_key for m in measured if m.job_key not in by_key)),
        unmeasured=tuple(key for key in by_key if key not in measured_keys),
    )


def predict_for(report: StepReport, profile: Any = None) -> StepReport:
    """The prediction for the job of a measured ``report``. Raises ``InputError`` when the report carries no job."""
    if not report.job:
        raise InputError(f"the record of job {report.job_key} does not hold its job, so it cannot be predicted again")
    from estimator.predict import predict

    return predict(job_from_dict(report.job), profile=profile)


def label_of(report: StepReport) -> str:
    """The report's case in a few words; its key when it carries no job that can be read."""
    try:
        return job_label(job_from_dict(report.job)) if report.job else report.job_key
    except InputError:
        return report.job_key


def summarise(rows: Sequence[Row]) -> tuple[TermSummary, ...]:
    """Error distribution of each term, in the order in which terms first appear."""
    by_term: dict[str, list[float | None]] = defaultdict(list)
    for row in rows:
        by_term[row.term].append(row.error)
    return tuple(_summary(term, errors) for term, errors in by_term.items())


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation with average ranks for ties; ``None`` when a side holds fewer than two values."""
    if len(x) != len(y):
        raise ValueError(f"spearman needs as many x as y, not {len(x)} and {len(y)}")
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Rank of each value from 1; equal values share the average of theirs."""
    _, group, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group])


def _rank_correlations(rows: Sequence[Row]) -> dict[str, float | None]:
    by_origin: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.term == "step_s":
            by_origin[row.origin].append(row)
    return {
        origin: spearman([r.predicted for r in group], [r.measured for r in group])
        for origin, group in by_origin.items()
    }


def _rows(prediction: StepReport, measurement: StepReport) -> Iterator[Row]:
    label = label_of(measurement)
    for term, predicted, measured in _terms(prediction, measurement):
        yield Row(
            case=label,
            job_key=measurement.job_key,
            origin=measurement.origin,
            term=term,
            predicted=predicted,
            measured=measured,
        )


def _terms(prediction: StepReport, measurement: StepReport) -> Iterator[tuple[str, float, float]]:
    """(term, predicted, measured) for whatever both reports know and mean alike."""
    alone = _without_network(measurement)
    for name in SCALAR_TERMS:
        predicted, measured = getattr(prediction, name), getattr(measurement, name)
        if predicted is not None and measured is not None and not (alone and name == "step_s"):
            yield name, predicted, measured
    for name in NAMED_TERMS:
        predicted_by_key, measured_by_key = getattr(prediction, name), getattr(measurement, name)
        if not _is_known(name, prediction) or not _is_known(name, measurement):
            continue
        for key in dict.fromkeys((*measured_by_key, *predicted_by_key)):
            in_both = key in measured_by_key and key in predicted_by_key
            if alone and name == "time_parts_s" and key.startswith("exposed"):
                continue
            if in_both or _absent_means_zero(name, key):
                yield f"{name}.{key}", predicted_by_key.get(key, 0), measured_by_key.get(key, 0)


def _without_network(measurement: StepReport) -> bool:
    """A virtual rank's step has no communication in it, a forecast's has."""
    return measurement.origin == "cuda-virtual" and bool(measurement.collective_bytes)


def _is_known(name: str, report: StepReport) -> bool:
    """An empty table of bytes moved says "nothing moved", unless the step never ran; any other empty one "not known"."""
    if name in ("collective_bytes", "collective_calls", "copy_bytes"):
        return report.peak_allocated_bytes is not None or report.step_s is not None or bool(getattr(report, name))
    return bool(getattr(report, name))


def _absent_means_zero(name: str, key: str) -> bool:
    """Whether a table without ``key`` says 0; phases are taken only where both sides have them."""
    return name != "phase_peak_bytes" and not (name == "category_peak_bytes" and key in OUTSIDE_ALLOCATOR)


def _summary(term: str, errors: Sequence[float | None]) -> TermSummary:
    known = np.array([e for e in errors if e is not None], dtype=np.float64)
    size = np.abs(known)
    some = known.size > 0
    return TermSummary(
        term=term,
        n=int(known.size),
        n_undefined=len(errors) - int(known.size),
        median=float(np.median(size)) if some else None,
        p90=float(np.percentile(size, 90)) if some else None,
        worst=float(size.max()) if some else None,
        bias=float(known.mean()) if some else None,
    )


def _blames(prediction: StepReport, measurement: StepReport) -> Iterator[Blame]:
    """The part to blame for the error of the peak (parts that add up to it) and of the step."""
    for total, parts in (("peak_allocated_bytes", "category_bytes_at_peak"), ("step_s", "time_parts_s")):
        predicted, measured = getattr(prediction, total), getattr(measurement, total)
        if predicted is None or not measured or (total == "step_s" and _without_network(measurement)):
            continue
        there, here = getattr(prediction, parts), getattr(measurement, parts)
        differences = {key: there.get(key, 0) - here.get(key, 0) for key in {**there, **here}} if there and here else {}
        term = max(differences, key=lambda key: abs(differences[key]), default=None)
        yield Blame(
            case=label_of(measurement),
            job_key=measurement.job_key,
            origin=measurement.origin,
            total=total,
            error=predicted / measured - 1,
            term=f"{parts}.{term}" if term is not None else None,
            difference=differences[term] if term is not None else None,
        )
