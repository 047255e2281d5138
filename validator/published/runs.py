"""A table of published runs: one row each, empty where nothing was published."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from estimator.errors import InputError

NEEDED = ("run_id", "source", "gpu", "n_gpus")
"""Columns without which a table is not one of runs."""


@dataclass(frozen=True)
class PublishedRun:
    """One row. Fields are asked for by the column's name; what is empty is ``None``, never zero."""

    values: dict[str, str]

    @property
    def run_id(self) -> str:
        return self.values["run_id"]

    def text(self, column: str) -> str | None:
        return self.values.get(column, "").strip() or None

    def number(self, column: str) -> float | None:
        """Raises ``InputError`` where the column holds something else."""
        text = self.text(column)
        if text is None:
            return None
        try:
            return float(text)
        except ValueError:
            raise InputError(f"{column} is {text!r}; allowed: a number, or nothing") from None

    def whole(self, column: str) -> int:
        """A number that the run cannot be understood without. Raises ``InputError`` where it is missing or not whole."""
        value = self.number(column)
        if value is None:
            raise InputError(f"{column} was not published")
        if value != int(value):
            raise InputError(f"{column} is {value}; allowed: a whole number")
        return int(value)

    def whole_or(self, column: str, default: int) -> int:
        return default if self.text(column) is None else self.whole(column)

    def flag(self, column: str) -> bool | None:
        value = self.number(column)
        return None if value is None else bool(value)


def read_runs(path: Path) -> list[PublishedRun]:
    """The rows of the CSV at ``path``. Raises ``InputError`` when it cannot be read as one."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            missing = [name for name in NEEDED if name not in columns]
            if missing:
                raise InputError(
                    f"{path} has no column {missing[0]!r}; allowed: a CSV with the columns of published runs"
                )
            return [PublishedRun({k: v or "" for k, v in row.items() if k is not None}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"runs is {str(path)!r}, which cannot be read: {reason}") from None
