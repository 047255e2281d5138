"""Forecasts for recorded runs, each with the profile that describes its machine, and their comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.report import StepReport
from estimator.time.profile import HardwareProfile
from validator.compare.join import Comparison, Pair, compare_pairs, predict_for
from validator.compare.rows import gpu_name

Source = tuple[Sequence[StepReport], Sequence[HardwareProfile]]
"""Measured reports, and the calibrated profiles of the machines that they are of."""


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
    return compare_sources([(measured, profiles)])


def compare_sources(sources: Sequence[Source]) -> Compared:
    """The same for several machines' records: each is forecast with the profiles of its own source."""
    pairs: list[Pair] = []
    predicted: dict[str, StepReport] = {}
    refused: dict[str, str] = {}
    for measured, profiles in sources:
        here: dict[str, StepReport] = {}
        for report in measured:
            key = report.job_key
            if key not in here:
                try:
                    here[key] = predict_for(report, profile_of(gpu_name(report), profiles))
                except InputError as error:
                    refused[key] = str(error)
                    continue
            pairs.append((here[key], report))
        predicted.update(here)
    return Compared(comparison=compare_pairs(pairs, unpredicted=refused), predicted=predicted, refused=refused)


def profile_of(gpu_name: str, profiles: Iterable[HardwareProfile]) -> HardwareProfile | None:
    """The last of ``profiles`` that was measured on ``gpu_name``."""
    return next((p for p in reversed(list(profiles)) if p.gpu is not None and p.gpu.name == gpu_name), None)
