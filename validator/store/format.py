"""``Format``: records of one kind as files: JSON lines (one record per line), CSV and Parquet (one row per record)."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from estimator.errors import InputError, invalid, unknown_choice

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Format(Generic[R]):
    """How one kind of record, a frozen dataclass, lies in files."""

    record: type[R]
    from_plain: Callable[[dict[str, Any]], R]
    """From plain data to the record. Raises ``InputError``."""
    to_plain: Callable[[R], dict[str, Any]]
    as_json: tuple[str, ...]
    """Fields that a table holds as JSON text; a field of numbers by name becomes one column per name."""
    strangers: Mapping[str, str]
    """Fields that only other kinds of record have, with the sentence for who reads those here."""

    @cached_property
    def hints(self) -> dict[str, Any]:
        """Type of every field."""
        return get_type_hints(self.record)

    def to_json(self, record: R) -> str:
        """One line of JSON with sorted keys: equal records give equal text."""
        data = self.to_plain(record)
        try:
            return json.dumps(data, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            what = data.get("job_key") or data.get("kernel")
            raise InputError(f"the record of {what} cannot be recorded: {error}") from None

    def from_json(self, text: str) -> R:
        """Inverse of ``to_json``. Raises ``InputError`` when ``text`` is no JSON or no such record."""
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise InputError(f"it is not JSON ({error})") from None
        if not isinstance(data, dict):
            raise InputError(f"it is a {type(data).__name__}; allowed: one JSON object")
        return self.from_dict(data)

    def from_dict(self, data: dict[str, Any]) -> R:
        """The record of plain ``data``, every value's type checked."""
        for name, value in data.items():
            if name in self.strangers:
                raise InputError(self.strangers[name])
            if name in self.hints and not _is_a(value, self.hints[name]):
                raise invalid(f"record field {name}", value, str(self.hints[name]).replace("typing.", ""))
        return self.from_plain(data)

    def write(self, records: Sequence[R], path: str | Path) -> None:
        """Writes ``records`` in the format that the name ends with: ``.jsonl``, ``.csv`` or ``.parquet``.

        The file appears in one piece or not at all. Raises ``InputError`` for another ending, a place that cannot be
        written, or Parquet without pyarrow.
        """
        target = Path(path)
        writer = _choose(
            target, {".jsonl": self._write_jsonl, ".csv": self._write_csv, ".parquet": self._write_parquet}
        )
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            writer(records, part)
            os.replace(part, target)
        except OSError as error:
            raise InputError(f"records file {str(path)!r} cannot be written: {error.strerror or error}") from None
        finally:
            part.unlink(missing_ok=True) if part.parent.is_dir() else None

    def read(self, path: str | Path) -> list[R]:
        """The records in a file that ``write`` wrote.

        Raises ``InputError`` with the line (or row) number when one is truncated, damaged or no such record.
        """
        source = Path(path)
        reader = _choose(source, {".jsonl": self._read_jsonl, ".csv": self._read_csv, ".parquet": self._read_parquet})
        try:
            return list(reader(source))
        except OSError as error:
            raise InputError(f"records file {str(path)!r} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"records file {str(path)!r} is not text in UTF-8: {error.reason} at byte {error.start}"
            ) from None

    def _write_jsonl(self, records: Iterable[R], path: Path) -> None:
        path.write_text("".join(self.to_json(record) + "\n" for record in records), encoding="utf-8")

    def _read_jsonl(self, path: Path) -> list[R]:
        records = []
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    records.append(self.from_json(line))
                except InputError as error:
                    cut = " (the file seems truncated)" if not line.endswith("\n") else ""
                    raise InputError(f"records file {str(path)!r}, line {number}{cut}: {error}") from None
        return records

    def _flatten(self, record: R) -> dict[str, Any]:
        """One row: scalars as they are, ``field.name`` for numbers by name, JSON text for the rest; ``None`` left out."""
        row: dict[str, Any] = {}
        for name, value in json.loads(self.to_json(record)).items():
            if name in self.as_json:
                row[name] = json.dumps(value, sort_keys=True)
            elif isinstance(value, dict):
                row.update({f"{name}.{key}": number for key, number in value.items()})
            elif value is not None:
                row[name] = value
        return row

    def _unflatten(self, row: dict[str, Any]) -> R:
        """Inverse of ``_flatten``."""
        data: dict[str, Any] = {}
        for column, value in row.items():
            if value is None:
                continue
            name, _, key = column.partition(".")
            if name in self.as_json:
                try:
                    data[name] = json.loads(value, parse_constant=_refuse_constant)
                except (TypeError, ValueError) as error:
                    raise InputError(f"column {name} is not JSON ({error})") from None
            elif key:
                data.setdefault(name, {})[key] = value
            else:
                data[name] = value
        return self.from_dict(data)

    def _table(self, records: Sequence[R]) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns in the order of the record's fields, and one row per record."""
        rows = [self._flatten(record) for record in records]
        order = {f.name: place for place, f in enumerate(fields(self.record))}  # type: ignore[arg-type]
        columns = sorted({column for row in rows for column in row}, key=lambda c: (order[c.partition(".")[0]], c))
        return columns, rows

    def _write_csv(self, records: Sequence[R], path: Path) -> None:
        columns, rows = self._table(records)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def _read_csv(self, path: Path) -> list[R]:
        records = []
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, strict=True, restkey="", restval="\0missing")
            try:
                for row in rows:
                    if "" in row or "\0missing" in row.values():
                        raise InputError("it has another number of cells than the heading has columns")
                    records.append(
                        self._unflatten({column: self._from_text(column, text) for column, text in row.items()})
                    )
            except InputError as error:
                raise InputError(f"records file {str(path)!r}, line {rows.line_num}: {error}") from None
            except csv.Error as error:  # raised before the reader counts the line
                raise InputError(f"records file {str(path)!r}, line {rows.line_num + 1}: {error}") from None
        return records

    def _from_text(self, column: str, text: str) -> Any:
        """A CSV cell with the type that its column has in the record; an empty cell is ``None``."""
        name, _, key = column.partition(".")
        hint = self.hints.get(name)
        if hint is None or name in self.as_json:
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

    def _write_parquet(self, records: Sequence[R], path: Path) -> None:
        arrow, parquet = _pyarrow()
        columns, rows = self._table(records)
        parquet.write_table(arrow.table({column: [row.get(column) for row in rows] for column in columns}), path)

    def _read_parquet(self, path: Path) -> list[R]:
        arrow, parquet = _pyarrow()
        try:
            rows = parquet.read_table(path).to_pylist()
        except arrow.ArrowInvalid as error:
            raise InputError(f"records file {str(path)!r} is no Parquet file: {error}") from None
        records = []
        for number, row in enumerate(rows, start=1):
            try:
                records.append(self._unflatten(row))
            except InputError as error:
                raise InputError(f"records file {str(path)!r}, row {number}: {error}") from None
        return records


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


def _choose(path: Path, by_suffix: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if path.suffix not in by_suffix:
        raise unknown_choice("the ending of the records file", path.suffix, by_suffix)
    return by_suffix[path.suffix]


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "Parquet files need pyarrow, which is not installed; allowed without it: .csv, .jsonl"
        ) from None
