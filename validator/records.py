"""Reports as files: JSON lines (one report per line), CSV and Parquet (one row per report)."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from estimator.errors import InputError, invalid, unknown_choice
from estimator.report import StepReport

_AS_JSON = ("job", "phase_category_bytes", "provenance", "notes")
"""Fields that a table holds as JSON text; a field of numbers by name becomes one column per name."""


def report_to_json(report: StepReport) -> str:
    """One line of JSON with sorted keys: equal reports give equal text."""
    try:
        return json.dumps(report.to_dict(), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the report of job {report.job_key} cannot be recorded: {error}") from None


def report_from_json(text: str) -> StepReport:
    """Inverse of ``report_to_json``. Raises ``InputError`` when ``text`` is no JSON or no report."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise InputError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"it is a {type(data).__name__}; allowed: one JSON object")
    return report_from_dict(data)


def report_from_dict(data: dict[str, Any]) -> StepReport:
    """``StepReport.from_dict`` with every value's type checked."""
    hints = _hints()
    for name, value in data.items():
        if name in hints and not _is_a(value, hints[name]):
            raise invalid(f"record field {name}", value, str(hints[name]).replace("typing.", ""))
    return StepReport.from_dict(data)


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    return get_type_hints(StepReport)


def _is_a(value: object, hint: Any) -> bool:
    """Whether JSON data ``value`` fits the type ``hint`` (JSON writes tuples as lists and may write 1.0 as 1)."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in get_args(hint)
    if origin in (UnionType, Union):
        return any(_is_a(value, option) for option in get_args(hint))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if origin is dict:
        key_hint, value_hint = get_args(hint)
        return isinstance(value, dict) and all(_is_a(k, key_hint) and _is_a(v, value_hint) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def export_reports(reports: Sequence[StepReport], path: str | Path) -> None:
    """Writes ``reports`` in the format that the name ends with: ``.jsonl``, ``.csv`` or ``.parquet``.

    The file appears in one piece or not at all. Raises ``InputError`` for another ending, a place that cannot be
    written, or Parquet without pyarrow.
    """
    target = Path(path)
    writer = _choose(target, {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet})
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        writer(reports, part)
        os.replace(part, target)
    except OSError as error:
        raise InputError(f"records file {str(path)!r} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None


def import_reports(path: str | Path) -> list[StepReport]:
    """The reports in a file that ``export_reports`` wrote.

    Raises ``InputError`` with the line (or row) number when one is truncated, damaged or no report.
    """
    source = Path(path)
    reader = _choose(source, {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet})
    try:
        return reader(source)
    except OSError as error:
        raise InputError(f"records file {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"records file {str(path)!r} is not text in UTF-8: {error.reason} at byte {error.start}"
        ) from None


def _choose(path: Path, by_suffix: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if path.suffix not in by_suffix:
        raise unknown_choice("the ending of the records file", path.suffix, by_suffix)
    return by_suffix[path.suffix]


def _write_jsonl(reports: Iterable[StepReport], path: Path) -> None:
    path.write_text("".join(report_to_json(report) + "\n" for report in reports), encoding="utf-8")


def _read_jsonl(path: Path) -> list[StepReport]:
    reports = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                reports.append(report_from_json(line))
            except InputError as error:
                cut = " (the file seems truncated)" if not line.endswith("\n") else ""
                raise InputError(f"records file {str(path)!r}, line {number}{cut}: {error}") from None
    return reports


def _flatten(report: StepReport) -> dict[str, Any]:
    """One row: scalars as they are, ``field.name`` for numbers by name, JSON text for the rest; ``None`` left out."""
    row: dict[str, Any] = {}
    for name, value in json.loads(report_to_json(report)).items():
        if name in _AS_JSON:
            row[name] = json.dumps(value, sort_keys=True)
        elif isinstance(value, dict):
            row.update({f"{name}.{key}": number for key, number in value.items()})
        elif value is not None:
            row[name] = value
    return row


def _unflatten(row: dict[str, Any]) -> StepReport:
    """Inverse of ``_flatten``."""
    data: dict[str, Any] = {}
    for column, value in row.items():
        if value is None:
            continue
        name, _, key = column.partition(".")
        if name in _AS_JSON:
            try:
                data[name] = json.loads(value, parse_constant=_refuse_constant)
            except (TypeError, ValueError) as error:
                raise InputError(f"column {name} is not JSON ({error})") from None
        elif key:
            data.setdefault(name, {})[key] = value
        else:
            data[name] = value
    return report_from_dict(data)


def _table(reports: Sequence[StepReport]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns in the order of ``StepReport``'s fields, and one row per report."""
    rows = [_flatten(report) for report in reports]
    order = {f.name: place for place, f in enumerate(fields(StepReport))}
    columns = sorted({column for row in rows for column in row}, key=lambda c: (order[c.partition(".")[0]], c))
    return columns, rows


def _write_csv(reports: Sequence[StepReport], path: Path) -> None:
    columns, rows = _table(reports)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _read_csv(path: Path) -> list[StepReport]:
    reports = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, strict=True, restkey="", restval="\0missing")
        try:
            for row in rows:
                if "" in row or "\0missing" in row.values():
                    raise InputError("it has another number of cells than the heading has columns")
                reports.append(_unflatten({column: _from_text(column, text) for column, text in row.items()}))
        except InputError as error:
            raise InputError(f"records file {str(path)!r}, line {rows.line_num}: {error}") from None
        except csv.Error as error:  # raised before the reader counts the line
            raise InputError(f"records file {str(path)!r}, line {rows.line_num + 1}: {error}") from None
    return reports


def _from_text(column: str, text: str) -> Any:
    """A CSV cell with the type that its column has in ``StepReport``; an empty cell is ``None``."""
    name, _, key = column.partition(".")
    hint = _hints().get(name)
    if hint is None or name in _AS_JSON:
        return text or None
    options = get_args(get_args(hint)[1] if key else hint) or (get_args(hint)[1] if key else hint,)
    if not text and (NoneType in options or key):
        return None
    for kind in (int, float):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                raise invalid(f"record field {column}", text, f"a number ({kind.__name__})") from None
    return text == "True" if bool in options and text in ("True", "False") else text


def _write_parquet(reports: Sequence[StepReport], path: Path) -> None:
    arrow, parquet = _pyarrow()
    columns, rows = _table(reports)
    parquet.write_table(arrow.table({column: [row.get(column) for row in rows] for column in columns}), path)


def _read_parquet(path: Path) -> list[StepReport]:
    arrow, parquet = _pyarrow()
    try:
        rows = parquet.read_table(path).to_pylist()
    except arrow.ArrowInvalid as error:
        raise InputError(f"records file {str(path)!r} is no Parquet file: {error}") from None
    reports = []
    for number, row in enumerate(rows, start=1):
        try:
            reports.append(_unflatten(row))
        except InputError as error:
            raise InputError(f"records file {str(path)!r}, row {number}: {error}") from None
    return reports


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "Parquet files need pyarrow, which is not installed; allowed without it: .csv, .jsonl"
        ) from None
