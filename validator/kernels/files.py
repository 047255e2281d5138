"""Records of kernels as files: see ``validator.store.format``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from validator.kernels.report import KernelReport
from validator.store.format import Format

KERNELS: Format[KernelReport] = Format(
    record=KernelReport, from_plain=KernelReport.from_dict, to_plain=KernelReport.to_dict,
    as_json=("shape", "provenance"),
    strangers={"job_key": "it is a record of a step, not of a kernel; 'python -m validator import' reads those"},
)  # fmt: skip

kernel_to_json = KERNELS.to_json
kernel_from_json = KERNELS.from_json
KERNELS_ENDING = "kernels.jsonl"
"""Of the names of JSON-lines files with records of kernels."""


def export_kernels(reports: Sequence[KernelReport], path: str | Path) -> None:
    """``Format.write`` of ``reports``."""
    KERNELS.write(reports, path)


def import_kernels(path: str | Path) -> list[KernelReport]:
    """``Format.read`` of kernel records."""
    return KERNELS.read(path)


def kernel_files(path: Path) -> list[Path]:
    """Files with records of kernels at ``path``: itself, or those in the folder."""
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [file for file in found if file.name.endswith(KERNELS_ENDING)]
