"""Forecasts for recorded runs, each with the profile that describes its machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dashboard.profiles import profile_of
from estimator.errors import InputError
from estimator.report import StepReport
from validator.compare import Comparison, compare, predict_for

if TYPE_CHECKING:
    from estimator.time.profile import HardwareProfile


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Recorded runs held against their forecasts."""

    comparison: Comparison
    predicted: dict[str, StepReport]
    """By job key."""
    refused: dict[str, str]
    """Reason by job key, where no forecast could be made."""


def compare_records(measured: Sequence[StepReport], profiles: Sequence[HardwareProfile]) -> Compared:
    """Forecasts every job in ``measured``, with the profile of its GPU where ``profiles`` has one, and compares."""
    predicted: dict[str, StepReport] = {}
    refused: dict[str, str] = {}
    for report in measured:
        if report.job_key in predicted or report.job_key in refused:
            continue
        try:
            predicted[report.job_key] = predict_for(report, profile_of(gpu_name(report), profiles))
        except InputError as error:
            refused[report.job_key] = str(error)
    return Compared(comparison=compare(list(predicted.values()), measured), predicted=predicted, refused=refused)


def gpu_name(report: StepReport) -> str:
    """Name of the GPU in the report's job; empty when it carries none."""
    cluster = report.job.get("cluster")
    gpu = cluster.get("gpu") if isinstance(cluster, dict) else None
    return str(gpu.get("name", "")) if isinstance(gpu, dict) else str(gpu or "")
