"""Reports of steps as files: see ``validator.store.format``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from estimator.report import StepReport
from validator.store.format import Format

STEPS: Format[StepReport] = Format(
    record=StepReport, from_plain=StepReport.from_dict, to_plain=StepReport.to_dict,
    as_json=("job", "phase_category_bytes", "provenance", "notes"),
    strangers={"kernel": "it is a record of a kernel, not of a step; 'python -m validator import --kernels' reads those"},
)  # fmt: skip

report_to_json = STEPS.to_json
report_from_json = STEPS.from_json
report_from_dict = STEPS.from_dict


def export_reports(reports: Sequence[StepReport], path: str | Path) -> None:
    """``Format.write`` of ``reports``."""
    STEPS.write(reports, path)


def import_reports(path: str | Path) -> list[StepReport]:
    """``Format.read`` of reports."""
    return STEPS.read(path)
