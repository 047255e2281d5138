"""Kernel records in the store and in files; old stores, two writers at once, a full disk."""

from __future__ import annotations

import json
import resource
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from estimator.errors import InputError
from validator.__main__ import main
from validator.kernels.files import export_kernels, import_kernels, kernel_from_json, kernel_to_json
from validator.kernels.report import KernelReport
from validator.store.database import APPLICATION_ID, Store, _digest
from validator.store.records import export_reports, import_reports, report_to_json

VERSION_1 = (
    "CREATE TABLE records (id INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE, added_utc TEXT NOT NULL,"
    " job_key TEXT NOT NULL, origin TEXT NOT NULL, rank INTEGER NOT NULL, model TEXT, report TEXT NOT NULL)",
    "CREATE INDEX records_by_job ON records (job_key, origin)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    "PRAGMA user_version = 1",
)
"""How the first version made its files."""

KERNEL = KernelReport(
    kernel="rms_norm", backward=True, device="cuda", dtype="bf16", shape=(8192, 4096), bytes=200, counted_bytes=201, flops=7,
    seconds=0.5, low_s=0.4, high_s=0.75, spread_s=0.1, repeats=9, copy_bytes_per_s=500.0,
    provenance={"gpu": {"name": "NVIDIA H200"}, "date_utc": "2025-01-01T00:00:00+00:00"},
)  # fmt: skip


def version_1_store(path: Path, *texts: str) -> None:
    db = sqlite3.connect(path)
    for statement in VERSION_1:
        db.execute(statement)
    for text in texts:
        row = (_digest(text), "2025-01-01T00:00:00+00:00", json.loads(text)["job_key"], "cpu", 0, "tiny", text)
        db.execute(
            "INSERT INTO records (digest, added_utc, job_key, origin, rank, model, report) VALUES (?, ?, ?, ?, ?, ?, ?)",
            row,
        )
    db.commit()
    db.close()


def test_what_follows_from_a_record():
    assert KERNEL.bytes_per_s == 400.0 and KERNEL.of_copy == 0.8
    assert KERNEL.device_name == "NVIDIA H200"
    assert replace(KERNEL, seconds=9.0, provenance={}).key == KERNEL.key != replace(KERNEL, backward=False).key
    assert KernelReport.from_dict(KERNEL.to_dict()) == KERNEL


def test_kernels_come_back_and_filters_hold(tmp_path, make_report):
    store = Store(tmp_path / "records.db")
    assert store.kernels() == [] and not store.path.exists()
    torch, cuda = KERNEL, replace(KERNEL, implementation="cuda", seconds=0.25)
    assert store.add_kernels([torch, cuda, torch]) == 2 and store.add_kernels([torch]) == 0
    store.add(make_report())
    assert store.kernels() == [torch, cuda] and store.kernels(limit=1) == [cuda]
    assert store.kernels(kernel="rms_norm", device="cuda", implementation="cuda") == [cuda]
    assert store.kernels(kernel="copy") == [] and store.count() == 1


def test_a_version_1_store_keeps_its_records_and_takes_kernels(tmp_path, make_report):
    path = tmp_path / "records.db"
    version_1_store(path, report_to_json(make_report()))
    assert Store(path).reports() == [make_report()]
    assert Store(path).add_kernels([KERNEL]) == 1
    assert Store(path).kernels() == [KERNEL] and Store(path).reports() == [make_report()]
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    db.close()


def test_a_flipped_byte_in_a_kernel_record_is_noticed(tmp_path):
    path = tmp_path / "records.db"
    Store(path).add_kernels([KERNEL])
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"seconds": 0.5', b'"seconds": 0.4'))
    with pytest.raises(InputError, match=r"kernel record 1 .*damaged"):
        Store(path).kernels()


WRITER = """
import sys
from dataclasses import replace
from estimator.report import StepReport
from validator.kernels.report import KernelReport
from validator.store.database import Store
store, kernels = Store(sys.argv[1]), sys.argv[2] == "kernels"
for i in range(int(sys.argv[3])):
    if kernels:
        store.add_kernels([KernelReport(kernel="copy", shape=(i, 1), bytes=1, seconds=1.0, copy_bytes_per_s=1.0)])
    else:
        store.add(StepReport(origin="cpu", job_key=str(i), step_s=float(i)))
"""


def test_two_writers_bring_an_old_store_up_to_date_and_lose_nothing(tmp_path, make_report):
    path = tmp_path / "records.db"
    version_1_store(path, report_to_json(make_report()))
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, what, "40"]) for what in ("kernels", "steps")]
    assert [w.wait(50) for w in writers] == [0, 0]
    assert sorted(k.shape[0] for k in Store(path).kernels()) == list(range(40))
    assert Store(path).count() == 41


def test_a_full_disk_is_one_sentence_and_loses_nothing_before(tmp_path, monkeypatch, make_report):
    """SQLite as on a full disk: its file may not grow any further."""
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    opened = Store._open

    def nearly_full(self, write):
        db = opened(self, write)
        db.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size where that is more
        return db

    monkeypatch.setattr(Store, "_open", nearly_full)
    kept = 0
    with pytest.raises(InputError, match=r"store .* cannot be written: database or disk is full") as caught:
        for i in range(200):
            kept += Store(path).add_kernels([replace(KERNEL, shape=(i, 1))])
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert len(Store(path).kernels()) == kept and Store(path).reports() == [make_report()]
    assert Store(path).add_kernels([KERNEL]) == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from estimator.errors import InputError
from validator.store.journal import append_line
path, limit = Path(sys.argv[1]), int(sys.argv[2])
append_line(path, "first")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    append_line(path, "x" * 100)
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on the size of files here")
@pytest.mark.parametrize("limit", [6, 50])
def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half_behind(tmp_path, limit):
    path = tmp_path / "records.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "records.jsonl' cannot be written" in done.stdout and done.stdout.count("\n") == 1
    assert path.read_text() == "first\n"


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_round_trip(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"kernels.{suffix}"
    reports = [KERNEL, replace(KERNEL, backward=False, seconds=0.1 + 0.2, shape=(3,), provenance={})]
    export_kernels(reports, path)
    assert import_kernels(path) == reports
    export_kernels([], path)
    assert import_kernels(path) == []


def test_files_of_kernels_and_of_steps_are_not_confused(tmp_path, make_report):
    export_kernels([KERNEL], tmp_path / "kernels.jsonl")
    export_reports([make_report()], tmp_path / "records.jsonl")
    with pytest.raises(InputError, match=r"kernels.jsonl', line 1: it is a record of a kernel, not of a step"):
        import_reports(tmp_path / "kernels.jsonl")
    with pytest.raises(InputError, match=r"records.jsonl', line 1: it is a record of a step, not of a kernel"):
        import_kernels(tmp_path / "records.jsonl")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"seconds": 0.0}, "seconds is 0.0; allowed: a number > 0"), ({"bytes": 1.5}, "bytes"), ({"dtyp": "fp32"}, "did you mean 'dtype'"),
     ({"shape": [1, "x"]}, "shape"), ({"device": "tpu"}, "device")],
)  # fmt: skip
def test_a_bad_record_is_refused(change, complaint):
    data = {**json.loads(kernel_to_json(KERNEL)), **change}
    with pytest.raises(InputError, match=complaint):
        kernel_from_json(json.dumps(data))


def test_a_truncated_record_is_told_with_its_line(tmp_path):
    path = tmp_path / "kernels.jsonl"
    export_kernels([KERNEL, KERNEL], path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"line 2 \(the file seems truncated\)"):
        import_kernels(path)


def test_the_command_line_moves_kernels_in_and_out(tmp_path, capsys):
    export_kernels([KERNEL], tmp_path / "in.kernels.jsonl")
    store = ["--store", str(tmp_path / "r.db")]
    assert main(["import", *store, "--records", str(tmp_path / "in.kernels.jsonl")]) == 2
    assert "import --kernels' reads those" in capsys.readouterr().err
    assert main(["import", *store, "--kernels", "--records", str(tmp_path / "in.kernels.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) == {"read": 1, "new": 1}
    assert main(["export", *store, "--kernels", "--out", str(tmp_path / "out.csv")]) == 0
    capsys.readouterr()
    assert import_kernels(tmp_path / "out.csv") == [KERNEL]
    assert main(["compare", *store]) == 0
    compared = json.loads(capsys.readouterr().out)["kernels"]
    assert compared["n"] == 1 and compared["of_copy"] == {"rms_norm backward": 0.8}
    (row,) = compared["rows"]
    assert row["error"] == pytest.approx(row["forecast_s"] / 0.5 - 1) and row["device_name"] == "NVIDIA H200"
    assert main(["compare", "--records", str(tmp_path / "in.kernels.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["rows"] == [row]
