"""Records that the gate reads: of steps, and of kernels (in files whose name ends with ``kernels.jsonl``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from estimator.report import StepReport
from validator.kernels.files import KERNELS_ENDING, import_kernels
from validator.kernels.report import KernelReport
from validator.store.database import Store
from validator.store.records import import_reports


def read_records(path: Path) -> Sequence[StepReport | KernelReport]:
    """The reports in a file, oldest first. Raises ``InputError`` with the line that is damaged."""
    return import_kernels(path) if path.name.endswith(KERNELS_ENDING) else import_reports(path)


def read_store(store: Store) -> Sequence[StepReport | KernelReport]:
    """The reports in a store, oldest first, steps before kernels."""
    return [*store.reports(), *store.kernels()]
