"""The store loses nothing: not to a second writer, not to a kill, not to a stranger's file."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from estimator.errors import InputError
from validator.store import database as store_module
from validator.store.database import Store, default_path

WRITER = """
import sys
from estimator.report import StepReport
from validator.store.database import Store
store, name, count = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for i in range(count):
    store.add(StepReport(origin="cpu", job_key=f"{name}-{i}", step_s=float(i)))
    print(i, flush=True)
"""


def start_writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE, text=True
    )


def test_reports_come_back_equal_and_in_order(tmp_path, make_job, make_report):
    store = Store(tmp_path / "deep" / "records.db")
    reports = [make_report(make_job(micro_batch=n)) for n in (1, 2, 3)]
    assert [store.add(r) for r in reports] == [True, True, True]
    assert store.reports() == reports
    assert store.reports(limit=2) == reports[1:]
    assert store.reports(job_key=reports[1].job_key, origin="cpu", model="tiny") == [reports[1]]
    assert store.reports(origin="cuda") == []


def test_the_same_report_is_stored_once(tmp_path, make_report):
    store = Store(tmp_path / "records.db")
    assert store.add(make_report()) and not store.add(make_report())
    assert store.add_many([make_report(), make_report(step_s=0.5)]) == 1
    assert store.count() == 2


def test_has_looks_at_origin_and_rank(tmp_path, make_report):
    store, report = Store(tmp_path / "records.db"), make_report(origin="fake", rank=3)
    assert not store.has(report.job_key, "fake")
    store.add(report)
    assert store.has(report.job_key, "fake") and store.has(report.job_key, "fake", rank=3)
    assert not store.has(report.job_key, "fake", rank=2) and not store.has(report.job_key, "cpu")


def test_delete_removes_only_what_is_named(tmp_path, make_report):
    store = Store(tmp_path / "records.db")
    store.add_many(make_report(step_s=s) for s in (0.1, 0.2, 0.3))
    first, _, last = store.records()
    assert store.delete([first.id, last.id, 999]) == 2
    assert [r.step_s for r in store.reports()] == [0.2]


def test_one_bad_report_stores_none_of_the_batch(tmp_path, make_report):
    store = Store(tmp_path / "records.db")
    with pytest.raises(InputError, match="cannot be recorded"):
        store.add_many([make_report(), make_report(step_s=float("nan"))])
    assert store.count() == 0


def test_reading_makes_no_file(tmp_path):
    store = Store(tmp_path / "none" / "records.db")
    assert store.reports() == [] and store.count() == 0 and store.delete([1]) == 0 and not store.has("x", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_at_once_lose_nothing(tmp_path):
    path = tmp_path / "records.db"
    writers = [start_writer(path, name, 60) for name in ("a", "b")]
    assert [w.communicate(timeout=50)[0].count("\n") for w in writers] == [60, 60]
    assert [w.returncode for w in writers] == [0, 0]
    keys = [r.job_key for r in Store(path).reports()]
    assert sorted(keys) == sorted(f"{name}-{i}" for name in "ab" for i in range(60))


def test_a_killed_writer_keeps_every_finished_record(tmp_path):
    path = tmp_path / "records.db"
    writer = start_writer(path, "a", 1_000_000)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(25)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().splitlines()]
    writer.wait()
    keys = [r.job_key for r in Store(path).reports()]
    assert keys[: len(told)] == [f"a-{i}" for i in told]
    assert len(keys) <= len(told) + 1  # at most the one that was committed but not yet told
    assert Store(path).add_many([]) == 0


@pytest.mark.parametrize(
    "content", [b"this is not a database, it is a diary of many words\n" * 40, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_corrupt_file_is_refused_and_left_alone(tmp_path, make_report, content):
    path = tmp_path / "records.db"
    path.write_bytes(content)
    for act in (lambda: Store(path).add(make_report()), lambda: Store(path).reports(), lambda: Store(path).delete([1])):
        with pytest.raises(InputError, match="corrupt or no SQLite file"):
            act()
    assert path.read_bytes() == content


def test_a_flipped_byte_in_a_record_is_noticed(tmp_path, make_report):
    path = tmp_path / "records.db"
    Store(path).add(make_report(peak_where="backward of blocks.1"))
    content = path.read_bytes()
    assert content.count(b"backward of blocks.1") == 1
    path.write_bytes(content.replace(b"backward of blocks.1", b"backward of blocks.7"))
    with pytest.raises(InputError, match=r"record 1 .*damaged"):
        Store(path).reports()


def test_a_newer_store_is_refused_and_left_alone(tmp_path, make_report):
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    for act in (lambda: Store(path).reports(), lambda: Store(path).add(make_report(step_s=9.0))):
        with pytest.raises(InputError, match=r"version 99.*newer Zerocast"):
            act()
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(tmp_path, make_report):
    path = tmp_path / "photos.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE photos (id)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="another program"):
        Store(path).add(make_report())
    assert path.read_bytes() == before


def test_an_older_store_is_brought_up_to_date_with_its_records(tmp_path, make_report, monkeypatch):
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    newer = (*store_module.MIGRATIONS, ("ALTER TABLE records ADD COLUMN remark TEXT",))
    monkeypatch.setattr(store_module, "MIGRATIONS", newer)
    assert Store(path).reports() == [make_report()]
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (len(newer),)
    assert db.execute("SELECT remark FROM records").fetchall() == [(None,)]
    db.close()


def test_a_failing_migration_changes_nothing(tmp_path, make_report, monkeypatch):
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    bad = (*store_module.MIGRATIONS, ("ALTER TABLE records ADD COLUMN remark TEXT", "this is no SQL"))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", bad)
        with pytest.raises(InputError):
            Store(path).reports()
    assert Store(path).reports() == [make_report()]
    db = sqlite3.connect(path)
    assert "remark" not in [column[1] for column in db.execute("PRAGMA table_info(records)")]
    db.close()


def test_places_that_cannot_be_written(tmp_path, make_report):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "records.db", tmp_path):
        with pytest.raises(InputError, match="cannot be"):
            Store(path).add(make_report())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_without_write_permission_can_be_read(tmp_path, make_report):
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert Store(path).reports() == [make_report()]
        with pytest.raises(InputError, match="cannot be"):
            Store(path).add(make_report(step_s=1.0))
    finally:
        tmp_path.chmod(0o755)


def test_a_store_that_stays_locked_is_told_in_one_sentence(tmp_path, make_report, monkeypatch):
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    monkeypatch.setattr(store_module, "_BUSY_S", 0.2)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    with pytest.raises(InputError, match="in use by another program"):
        Store(path).add(make_report(step_s=1.0))
    assert time.monotonic() - start < 5
    assert Store(path).reports() == [make_report()]  # readers do not wait for the writer
    blocker.close()


def test_default_path_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROCAST_HOME", str(tmp_path))
    assert default_path() == tmp_path / "records.db"
    monkeypatch.delenv("ZEROCAST_HOME")
    assert default_path() == Path.home() / ".zerocast" / "records.db"
