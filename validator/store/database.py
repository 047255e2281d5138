"""``Store``: the records of measured (and predicted) steps and of kernels, in one SQLite file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.report import StepReport
from validator.kernels.files import kernel_from_json, kernel_to_json
from validator.kernels.report import KernelReport
from validator.store.records import report_from_json, report_to_json

APPLICATION_ID = 0x5A43_5354
"""Marks the SQLite file as ours ("ZCST")."""
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE records (id INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE, added_utc TEXT NOT NULL,"
        " job_key TEXT NOT NULL, origin TEXT NOT NULL, rank INTEGER NOT NULL, model TEXT, report TEXT NOT NULL)",
        "CREATE INDEX records_by_job ON records (job_key, origin)",
    ),
    (
        "CREATE TABLE kernels (id INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE, added_utc TEXT NOT NULL,"
        " key TEXT NOT NULL, kernel TEXT NOT NULL, device TEXT NOT NULL, implementation TEXT NOT NULL, report TEXT NOT NULL)",
        "CREATE INDEX kernels_by_key ON kernels (key)",
    ),
)
"""Statements that lead from version i to i + 1; ``PRAGMA user_version`` holds the version of a file."""
_BUSY_S = 30.0


def default_path() -> Path:
    """``$ZEROCAST_HOME/records.db``, or ``~/.zerocast/records.db``."""
    home = os.environ.get("ZEROCAST_HOME")
    return (Path(home) if home else Path.home() / ".zerocast") / "records.db"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One stored report."""

    id: int
    added_utc: str
    """ISO 8601."""
    report: StepReport


class Store:
    """Reports in an SQLite file (write-ahead log, every commit synced), made when first written to.

    Every call opens a connection of its own and one short transaction, so that any number of programs and threads may
    read and write at once. Raises ``InputError``, with nothing written, when the file is corrupt, of a newer version,
    not a store, or in a place that cannot be written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path).expanduser() if path is not None else default_path()

    def add(self, report: StepReport) -> bool:
        """Stores ``report``; ``False`` when exactly this one is there already."""
        return self.add_many([report]) == 1

    def add_many(self, reports: Iterable[StepReport]) -> int:
        """Stores all ``reports`` or, when one is bad, none. Returns how many were new."""
        return self._add("records", [_row(report) for report in reports])

    def add_kernels(self, reports: Iterable[KernelReport]) -> int:
        """As ``add_many``, for records of kernels."""
        return self._add("kernels", [_kernel_row(report) for report in reports])

    def _add(self, table: str, rows: list[dict[str, Any]]) -> int:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._connection(write=True) as db:
            before = db.total_changes
            for row in rows:
                row = {**row, "digest": _digest(row["report"]), "added_utc": now}
                places = ", ".join(f":{name}" for name in row)
                db.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(row)}) VALUES ({places})", row)
            return db.total_changes - before

    def kernels(
        self, *, kernel: str | None = None, device: str | None = None, implementation: str | None = None,
        limit: int | None = None,
    ) -> list[KernelReport]:  # fmt: skip
        """Stored records of kernels that match every given filter, oldest first; ``limit`` keeps the newest ones."""
        rows = self._select("kernels", {"kernel": kernel, "device": device, "implementation": implementation}, limit)
        return [kernel_from_json(self._intact("kernel record", row[0], *row[2:])) for row in rows]

    def records(
        self,
        *,
        job_key: str | None = None,
        origin: str | None = None,
        model: str | None = None,
        limit: int | None = None,
    ) -> list[Record]:
        """Stored records that match every given filter, oldest first; ``limit`` keeps the newest ones."""
        rows = self._select("records", {"job_key": job_key, "origin": origin, "model": model}, limit)
        return [
            Record(id=i, added_utc=added, report=report_from_json(self._intact("record", i, *rest)))
            for i, added, *rest in rows
        ]

    def _select(self, table: str, filters: dict[str, str | None], limit: int | None) -> list[tuple[Any, ...]]:
        """Id, date, digest and text of the rows that match, oldest first."""
        if not self._exists():
            return []
        wanted = {name: value for name, value in filters.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in wanted) or "1"
        query = f"SELECT id, added_utc, digest, report FROM {table} WHERE {where} ORDER BY id DESC LIMIT ?"
        with self._connection() as db:
            rows = db.execute(query, (*wanted.values(), -1 if limit is None else limit)).fetchall()
        return rows[::-1]

    def reports(
        self,
        *,
        job_key: str | None = None,
        origin: str | None = None,
        model: str | None = None,
        limit: int | None = None,
    ) -> list[StepReport]:
        """The reports of ``records`` with the same filters."""
        return [record.report for record in self.records(job_key=job_key, origin=origin, model=model, limit=limit)]

    def has(self, job_key: str, origin: str, *, rank: int | None = None) -> bool:
        """Whether a report of this job and origin (and rank, when given) is stored."""
        if not self._exists():
            return False
        with self._connection() as db:
            query = "SELECT 1 FROM records WHERE job_key = ? AND origin = ? AND (? IS NULL OR rank = ?) LIMIT 1"
            return db.execute(query, (job_key, origin, rank, rank)).fetchone() is not None

    def delete(self, ids: Iterable[int]) -> int:
        """Removes records by id; returns how many there were."""
        if not self._exists():
            return 0
        with self._connection(write=True) as db:
            before = db.total_changes
            db.executemany("DELETE FROM records WHERE id = ?", [(i,) for i in ids])
            return db.total_changes - before

    def count(self) -> int:
        """Number of stored records."""
        if not self._exists():
            return 0
        with self._connection() as db:
            return int(db.execute("SELECT count(*) FROM records").fetchone()[0])

    def _exists(self) -> bool:
        """Whether there is anything to read: a file that was never written to holds no records."""
        try:
            return self.path.stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise InputError(f"store {str(self.path)!r} cannot be read: {error.strerror}") from None

    def _intact(self, what: str, record_id: int, digest: str, text: str) -> str:
        if not isinstance(text, str) or _digest(text) != digest:
            raise InputError(
                f"{what} {record_id} of store {str(self.path)!r} is damaged: its text does not match its checksum"
            )
        return text

    @contextlib.contextmanager
    def _connection(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection to a file of the current version inside one transaction."""
        name = str(self.path)
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(self._open(write)) as db:
                self._prepare(db, write)
                with db:  # commits, or rolls back when left by an exception
                    if write:
                        db.execute("BEGIN IMMEDIATE")
                    yield db
        except sqlite3.Error as error:
            raise InputError(f"store {name!r} {_reason(error)}") from error
        except OSError as error:
            raise InputError(f"store {name!r} cannot be written: {error.strerror}") from error

    def _open(self, write: bool) -> sqlite3.Connection:
        """A connection in autocommit mode; to read, a file in a place without write permission is taken as it is."""
        if write:
            return sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
        if self.path.is_dir():
            raise InputError(f"store {str(self.path)!r} is a folder; allowed: a file")
        writable = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        log_is_empty = not self.path.with_name(self.path.name + "-wal").exists()
        mode = "mode=rw" if writable else "mode=ro&immutable=1" if log_is_empty else "mode=ro"
        return sqlite3.connect(
            f"{self.path.resolve().as_uri()}?{mode}", uri=True, timeout=_BUSY_S, isolation_level=None
        )

    def _prepare(self, db: sqlite3.Connection, write: bool) -> None:
        """Checks whose file and which version it is; brings an older (or new) one up to date."""
        newest = len(MIGRATIONS)
        if self._version(db) == newest:
            db.execute("PRAGMA synchronous = FULL")
            return
        if not write and not os.access(self.path, os.W_OK):
            raise InputError(
                f"store {str(self.path)!r} is of an older version and cannot be written to bring it up to date"
            )
        _write_ahead(db)
        db.execute("PRAGMA synchronous = FULL")
        with db:
            db.execute("BEGIN IMMEDIATE")
            for statements in MIGRATIONS[self._version(db) :]:  # looked up again: another program may have been faster
                for statement in statements:
                    db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {newest}")

    def _version(self, db: sqlite3.Connection) -> int:
        """Version of the file, 0 for an empty one. Raises ``InputError`` for a stranger's file or a newer version."""
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        if owner != APPLICATION_ID and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise InputError(
                f"store {str(self.path)!r} is an SQLite file of another program; allowed: a Zerocast record store"
            )
        if version > len(MIGRATIONS):
            raise InputError(
                f"store {str(self.path)!r} is of version {version}, written by a newer Zerocast; allowed: at most {len(MIGRATIONS)}"
            )
        return version


def _row(report: StepReport) -> dict[str, Any]:
    model = report.job.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return {
        "job_key": report.job_key, "origin": report.origin, "rank": report.rank, "model": name,
        "report": report_to_json(report),
    }  # fmt: skip


def _kernel_row(report: KernelReport) -> dict[str, Any]:
    return {
        "key": report.key, "kernel": report.kernel, "device": report.device, "implementation": report.implementation,
        "report": kernel_to_json(report),
    }  # fmt: skip


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switches a new file to the write-ahead log; SQLite's busy timeout does not cover this, hence the retries."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _reason(error: sqlite3.Error) -> str:
    """What ``error`` means for the user, to follow the name of the store."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return f"is in use by another program for more than {_BUSY_S:g} s"
    if "full" in text:
        return f"cannot be written: {text}, nothing of this was stored"
    if isinstance(error, sqlite3.OperationalError):
        return f"cannot be opened or written: {text}"
    return f"is corrupt or no SQLite file ({text}); move it away, or name another one"
