"""Cases with ``reference``: measured beside plain PyTorch, and failed when they differ from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from runtime.reference import TOLERANCES, Tolerance
from tests.validator.test_campaign import make_report
from validator.campaign import Records
from validator.measure import runner, worker
from validator.measure.case import Case
from validator.measure.runner import MeasureError


def test_a_record_without_the_reference_does_not_stand_for_one_with(make_job, tmp_path):
    records = Records(tmp_path, lambda _: None)
    case = Case(job=make_job(), backend="cpu")
    records.add(make_report(case))
    assert records.find(case) is not None and records.find(replace(case, reference=True)) is None
    records.add(make_report(case, parity={"loss": 0.0, "params": 0.0}))
    assert records.find(replace(case, reference=True)) is not None
    records.close()


def test_a_case_that_differs_from_the_reference_fails_in_one_sentence(make_job, tmp_path, monkeypatch):
    case = Case(job=make_job(), backend="cpu", steps=1, warmup=0, reference=True, metered=False)
    report = worker.run_case(case, {}, lambda *_: None)
    assert report is not None and max(report["parity"].values()) <= 1e-7
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(loss=-1.0, params=0.0))
    with pytest.raises(
        worker.ParityError, match=r"^loss differs from plain PyTorch by .* relative; allowed with fp32"
    ) as caught:
        worker.run_case(case, {}, lambda *_: None)
    failure = {"rank": 0, "time": 1.0, "kind": worker._kind(caught.value), "type": "ParityError", "message": str(caught.value),
               "traceback": "", "provenance": {}}  # fmt: skip
    (tmp_path / "report.json.failure0").write_text(json.dumps(failure))
    with pytest.raises(MeasureError, match=r"\[cpu\]: loss differs from plain PyTorch") as told:
        runner._result(case, 1, tmp_path / "report.json", tmp_path / "log", 0)
    assert "\n" not in str(told.value)
