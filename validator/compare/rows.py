"""Terms: what a prediction and a measurement of one job both know, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.job.files import job_from_dict
from estimator.report import StepReport
from validator.measure.case import job_label

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
    def size(self) -> float:
        """Absolute error; infinite where it is undefined."""
        return float("inf") if self.error is None else abs(self.error)

    @property
    def must_be_exact(self) -> bool:
        return self.term.partition(".")[0] in EXACT_TERMS


def label_of(report: StepReport) -> str:
    """The report's case in a few words; its key when it carries no job that can be read."""
    try:
        return job_label(job_from_dict(report.job)) if report.job else report.job_key
    except InputError:
        return report.job_key


def gpu_name(report: StepReport) -> str:
    """Name of the GPU in the report's job; empty when it carries none."""
    cluster = report.job.get("cluster")
    gpu = cluster.get("gpu") if isinstance(cluster, dict) else None
    return str(gpu.get("name", "")) if isinstance(gpu, dict) else str(gpu or "")


def rows_of(prediction: StepReport, measurement: StepReport) -> Iterator[Row]:
    """Every term that both reports know and mean alike."""
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
    """(term, predicted, measured). A fake rank pins nothing: it has no GPU to pin for."""
    alone = without_network(measurement)
    for name in SCALAR_TERMS:
        predicted, measured = getattr(prediction, name), getattr(measurement, name)
        unlike = (alone and name == "step_s") or (measurement.origin == "fake" and name == "pinned_bytes")
        if predicted is not None and measured is not None and not unlike:
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


def without_network(measurement: StepReport) -> bool:
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
