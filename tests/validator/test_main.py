"""``python -m validator``: exit codes, one sentence per mistake, JSON on stdout."""

from __future__ import annotations

import json

import pytest

from validator.__main__ import main
from validator.measure import runner
from validator.measure.case import Case, write_case
from validator.measure.runner import MeasureError, Progress
from validator.store.database import Store
from validator.store.records import export_reports, import_reports


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on a store of this test; returns exit status, parsed stdout and stderr."""

    def call(command, *words):
        status = main([command, "--store", str(tmp_path / "records.db"), *map(str, words)])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return call


def test_import_export(run, tmp_path, make_report):
    export_reports([make_report(), make_report(step_s=1.0)], tmp_path / "in.jsonl")
    assert run("import", "--records", tmp_path / "in.jsonl") == (0, {"read": 2, "new": 2}, "")
    assert run("import", "--records", tmp_path / "in.jsonl") == (0, {"read": 2, "new": 0}, "")
    assert run("export", "--out", tmp_path / "out.csv") == (0, {"written": 2}, "")
    assert import_reports(tmp_path / "out.csv") == Store(tmp_path / "records.db").reports()


def test_measure_records_and_tells(run, tmp_path, make_job, make_report, monkeypatch):
    def measure(case, tell):
        if case.job.workload.micro_batch_size == 2:
            raise MeasureError("it crashed")
        tell(Progress(case=case, stage="step", step=1, step_s=0.25))
        return make_report(case.job)

    monkeypatch.setattr(runner, "measure", measure)
    files = [tmp_path / f"{n}.json" for n in (1, 2)]
    for n, file in enumerate(files, start=1):
        write_case(Case(job=make_job(micro_batch=n), backend="cpu"), file)
    status, outcomes, err = run("measure", "--case", *files)
    assert status == 1 and [o["status"] for o in outcomes] == ["measured", "failed"]
    assert outcomes[0]["report"]["step_s"] == 0.25 and outcomes[1]["error"] == "it crashed"
    assert "[1/2]" in err and "250 ms" in err and "failed it crashed" in err
    status, outcomes, _ = run("measure", "--case", files[0])
    assert status == 0 and outcomes[0]["status"] == "recorded"


def test_an_interrupt_is_told(run, tmp_path, make_job, monkeypatch):
    def interrupt(case, tell):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure", interrupt)
    write_case(Case(job=make_job(), backend="cpu"), tmp_path / "case.json")
    status, out, err = run("measure", "--case", tmp_path / "case.json")
    assert (status, out) == (130, None) and "interrupted" in err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["measure", "--case", "absent.json"], "case file 'absent.json' cannot be read"),
        (["import", "--records", "absent.jsonl"], "records file 'absent.jsonl' cannot be read"),
        (["compare"], "no measured report"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, tmp_path, words, complaint):
    status, out, err = run(*words)
    assert (status, out) == (2, None) and complaint in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_compare_predicts_and_joins(run, tmp_path, make_report):
    Store(tmp_path / "records.db").add(make_report(collective_bytes={}))
    status, comparison, _ = run("compare")
    assert status == 0 and comparison["unpredicted"] == []
    assert {row["term"] for row in comparison["rows"]} >= {"peak_allocated_bytes", "category_peak_bytes.params"}
