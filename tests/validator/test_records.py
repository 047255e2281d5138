"""Reports survive the way through a file, and damage is told with its line."""

from __future__ import annotations

import importlib
import json

import pytest

from estimator.errors import InputError
from estimator.report import StepReport
from validator.store.records import export_reports, import_reports, report_from_json, report_to_json


@pytest.fixture
def reports(make_job, make_report):
    bare = StepReport(origin="fake", job_key="0123456789abcdef", rank=7)
    misfit = make_report(make_job(micro_batch=2), fits=False, explanation='rank 1 ran out of memory, after "x"\nline 2')
    return [make_report(), bare, misfit, make_report(step_s=0.1 + 0.2, collective_bytes={"reduce_scatter": 1 << 60})]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_round_trip(tmp_path, reports, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"records.{suffix}"
    export_reports(reports, path)
    assert import_reports(path) == reports
    export_reports([], path)
    assert import_reports(path) == []
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_csv_has_a_column_per_category(tmp_path, reports):
    path = tmp_path / "records.csv"
    export_reports(reports, path)
    heading = path.read_text().splitlines()[0].split(",")
    assert {"step_s", "category_peak_bytes.params", "time_parts_s.backward", "collective_bytes.reduce_scatter"} <= set(
        heading
    )
    assert heading[:3] == ["origin", "job_key", "job"]


def test_a_truncated_line_is_told_with_its_number(tmp_path, reports):
    path = tmp_path / "records.jsonl"
    export_reports(reports, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"line 4 \(the file seems truncated\): it is not JSON"):
        import_reports(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"origin": "cpu", "job_key": "k", "step_sec": 1}', "step_s"),
        ('{"origin": "cpu"}', "job_key"),
        ('{"origin": "gpu", "job_key": "k"}', "origin"),
        ('{"origin": "cpu", "job_key": "k", "step_s": "fast"}', "step_s"),
        ('{"origin": "cpu", "job_key": "k", "step_s": NaN}', "NaN"),
        ('{"origin": "cpu", "job_key": "k", "rank": true}', "rank"),
        ('{"origin": "cpu", "job_key": "k", "category_peak_bytes": {"params": 1.5}}', "category_peak_bytes"),
        ("[1, 2]", "one JSON object"),
        ("hello", "not JSON"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path, reports, line, complaint):
    path = tmp_path / "records.jsonl"
    path.write_text(report_to_json(reports[0]) + "\n\n" + line + "\n" + report_to_json(reports[1]) + "\n")
    with pytest.raises(InputError, match=f"line 3: .*{complaint}"):
        import_reports(path)


def test_a_bad_csv_row_is_told_with_its_line(tmp_path, reports):
    path = tmp_path / "records.csv"
    export_reports(reports[:1], path)
    heading, row = path.read_text().splitlines()
    damage = {
        row.replace("0.25", "quick"): "step_s",
        row + ",1": "cells",
        "cpu,key": "cells",
        row[:-5]: "unexpected end",
    }
    for bad, complaint in damage.items():
        path.write_text(heading + "\n" + bad + "\n")
        with pytest.raises(InputError, match=f"line 2: .*{complaint}"):
            import_reports(path)


def test_files_that_cannot_be_used(tmp_path, reports):
    with pytest.raises(InputError, match=r"'\.json'.*did you mean '\.jsonl'"):
        export_reports(reports, tmp_path / "records.json")
    with pytest.raises(InputError, match="cannot be read"):
        import_reports(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be written"):
        export_reports(reports, tmp_path / "absent" / "records.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"origin": "\xe9"}\n')
    with pytest.raises(InputError, match="UTF-8"):
        import_reports(tmp_path / "latin.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["latin.jsonl"]


def test_a_failed_export_keeps_the_earlier_file(tmp_path, reports, make_report):
    path = tmp_path / "records.jsonl"
    export_reports(reports, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot be recorded"):
        export_reports([*reports, make_report(provenance={"x": object()})], path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_parquet_without_pyarrow(tmp_path, reports, monkeypatch):
    real = importlib.import_module

    def without_pyarrow(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_pyarrow)
    with pytest.raises(InputError, match="need pyarrow"):
        export_reports(reports, tmp_path / "records.parquet")


def test_json_is_one_sorted_line(reports):
    text = report_to_json(reports[2])
    assert "\n" not in text and list(json.loads(text)) == sorted(json.loads(text))
    assert report_from_json(text) == reports[2]
