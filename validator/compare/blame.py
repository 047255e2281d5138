"""Which part of a total is to blame for its error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from estimator.report import StepReport
from validator.compare.rows import OUTSIDE_ALLOCATOR, Row, label_of, rows_of, without_network

REST = "rest"
"""What the parts of a total leave over: bytes outside the metered categories, seconds outside the timed parts."""
_PARTS_OF = {"peak_allocated_bytes": "category_bytes_at_peak", "step_s": "time_parts_s"}
"""Total -> the parts that add up to it, up to ``REST``."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """One case's error in peak memory, step time or bytes on the wire, and the part that causes most of it."""

    case: str
    job_key: str
    origin: str
    total: str
    """``"peak_allocated_bytes"``, ``"step_s"``, or ``"collective_bytes"`` where these differ at all."""
    error: float | None
    """Of the total, as a fraction; ``None`` when 0 was measured and something predicted."""
    term: str | None
    """The part with the largest difference in the direction of the error, e.g. ``"category_bytes_at_peak.activations"``;
    ``None`` when no part was measured. ``.rest`` is what the parts leave over of their total."""
    difference: float | None
    """Predicted minus measured of that part, in bytes or seconds."""
    predicted_where: str | None = None
    """Peak memory: unit and pass at which the peak is forecast; likewise ``measured_where``."""
    measured_where: str | None = None

    @property
    def is_bug(self) -> bool:
        """Bytes on the wire are integer arithmetic that both floors share."""
        return self.total not in _PARTS_OF

    @property
    def place(self) -> tuple[bool, float]:
        """Sorts bugs before errors, and then the largest error first."""
        return not self.is_bug, -(float("inf") if self.error is None else abs(self.error))


def blames_of(prediction: StepReport, measurement: StepReport) -> Iterator[Blame]:
    """Blame for the peak, the step and, where they are not equal, the bytes on the wire."""
    for total, parts in _PARTS_OF.items():
        predicted, measured = getattr(prediction, total), getattr(measurement, total)
        if predicted is None or not measured or (total == "step_s" and without_network(measurement)):
            continue
        there, here = getattr(prediction, parts), getattr(measurement, parts)
        differences = (
            {key: there.get(key, 0) - here.get(key, 0) for key in {**there, **here} if key not in OUTSIDE_ALLOCATOR}
            if there and here
            else {}
        )
        if differences:
            differences[REST] = predicted - measured - sum(differences.values())
        yield _blame(measurement, total, parts, predicted / measured - 1, differences, prediction)
    wire = [row for row in rows_of(prediction, measurement) if row.must_be_exact]
    if any(row.predicted != row.measured for row in wire):
        yield _wire_blame(measurement, wire)


def _blame(
    measurement: StepReport, total: str, parts: str, error: float | None, differences: dict[str, float],
    prediction: StepReport | None = None,
) -> Blame:  # fmt: skip
    worst = _most(differences, error)
    is_memory = prediction is not None and total == "peak_allocated_bytes"
    return Blame(
        case=label_of(measurement),
        job_key=measurement.job_key,
        origin=measurement.origin,
        total=total,
        error=error,
        term=f"{parts}.{worst}" if worst is not None else None,
        difference=differences[worst] if worst is not None else None,
        predicted_where=_where(prediction) if is_memory and prediction else None,
        measured_where=_where(measurement) if is_memory else None,
    )


def _most(differences: dict[str, float], error: float | None) -> str | None:
    """The part that is most off, in the direction of the total: one that is too high makes no total too low."""
    sign = 0 if not error else 1 if error > 0 else -1
    return max(differences, key=lambda key: sign * differences[key] if sign else abs(differences[key]), default=None)


def _wire_blame(measurement: StepReport, rows: list[Row]) -> Blame:
    predicted, measured = sum(row.predicted for row in rows), sum(row.measured for row in rows)
    differences = {row.term.partition(".")[2]: row.predicted - row.measured for row in rows}
    error = predicted / measured - 1 if measured else None
    return _blame(measurement, "collective_bytes", "collective_bytes", error, differences)


def _where(report: StepReport) -> str | None:
    return report.peak_where or report.peak_phase
