"""Where cases with an optimizer in files have them: named by the machine, one folder per case, gone afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from estimator.errors import InputError
from estimator.job import Job
from validator import campaign
from validator.__main__ import main
from validator.measure import runner
from validator.measure.case import Case, case_to_dict, needs_files, read_case, write_case
from validator.measure.runner import MeasureError, measure
from validator.suites import Place, Suite, expand, load_suite


def in_files(job: Job) -> Job:
    return replace(job, strategy=replace(job.strategy, offload="optimizer:nvme"))


def test_a_case_takes_the_machines_folder(make_job, tmp_path):
    """A suite names none; without one such jobs are left out, ``fake`` ones need none."""
    settings = {"gpu": "h200", "model": "gpt-30m", "seq_len": 64, "gpus": 1, "zero": 0, "offload": "optimizer:nvme"}
    combinations = tuple({**settings, "backend": backend} for backend in ("cuda", "fake"))
    suite = Suite(name="s", about="", combinations=combinations)
    plan = expand(suite, Place(nvme_folder="disk"))
    assert {(c.backend, c.nvme_folder) for c in plan.cases} == {("cuda", "disk"), ("fake", None)}
    plan = expand(suite, Place())
    assert [c.backend for c in plan.cases] == ["fake"]
    assert "nvme_folder is not given" in plan.left_out[0].reason


def test_the_offload_suite_has_files_and_inputs_that_travel():
    plan = expand(load_suite("offload"), Place(gpu_here="h200", nvme_folder="disk"))
    jobs = [c.job.strategy for c in plan.cases]
    assert sum(s.offload_nvme for s in jobs) >= 8 and sum(s.activation_offload for s in jobs) == 4
    assert all((c.nvme_folder == "disk") == c.job.strategy.offload_nvme for c in plan.cases)


def test_a_case_file_may_leave_the_folder_to_the_machine(make_job, tmp_path):
    case = Case(job=in_files(make_job()), backend="cpu", nvme_folder="named")
    write_case(case, tmp_path / "named.json")
    (tmp_path / "open.json").write_text(json.dumps({**case_to_dict(case), "nvme_folder": None}))
    assert read_case(tmp_path / "named.json", "here").nvme_folder == "named"
    assert read_case(tmp_path / "open.json", "here").nvme_folder == "here"
    with pytest.raises(InputError, match="nvme_folder is not given"):
        read_case(tmp_path / "open.json")
    other = Case(job=make_job(), backend="cpu")
    write_case(other, tmp_path / "other.json")
    assert read_case(tmp_path / "other.json", "here") == other  # which needs none
    assert needs_files(case.job, "cpu") and not needs_files(case.job, "fake") and not needs_files(other.job, "cpu")


def test_the_campaigns_folder_is_in_its_output_unless_named(tmp_path, capsys, monkeypatch):
    seen: list[Any] = []

    def expanded(suite, place):
        seen.append(place.nvme_folder)
        return expand(suite, place)

    monkeypatch.setattr("validator.__main__.expand", expanded)
    monkeypatch.setattr(campaign, "measure", lambda case: pytest.fail("nothing is to run"))
    text = 'about = "t"\nbackend = "fake"\ngpu = "h200"\nmodel = "gpt-30m"\nseq_len = 64\ngpus = 1\nzero = 0\n'
    (tmp_path / "s.toml").write_text(text)
    command = ["campaign", "--suite", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(command) == main([*command, "--nvme-folder", "/disk"]) == 0
    assert seen == [str(tmp_path / "out" / "nvme"), "/disk"]


def test_files_are_made_while_it_is_measured_and_gone_afterwards(make_job, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    case = Case(job=in_files(make_job()), backend="cpu", steps=1, warmup=0, time_limit_s=120, nvme_folder=str(folder))
    report = measure(case)
    assert report.copy_bytes is not None and report.copy_bytes["nvme_write"] > 0
    assert report.copy_bytes["nvme_read"] == report.copy_bytes["nvme_write"]
    assert folder.is_dir() and not list(folder.iterdir())


def test_nothing_is_left_of_processes_that_are_killed(make_job, tmp_path, monkeypatch):
    """The worker of this case cannot tidy up: it is ended while its files are there."""
    seen: list[str] = []

    def stuck(case: Case, process: Any, *_: Any) -> int:
        given = json.loads(Path(process.args[process.args.index("--case") + 1]).read_text())["nvme_folder"]
        Path(given, "states.0").write_bytes(b"x")
        seen.append(given)
        raise MeasureError("ran past its limit")

    monkeypatch.setattr(runner, "_wait", stuck)
    case = Case(job=in_files(make_job()), backend="cpu", nvme_folder=str(tmp_path))
    with pytest.raises(MeasureError):
        measure(case)
    assert Path(seen[0]).parent == tmp_path and not list(tmp_path.iterdir())


def test_a_place_without_room_for_a_folder_is_refused(make_job, tmp_path):
    (tmp_path / "file").write_text("")
    case = Case(job=in_files(make_job()), backend="cpu", nvme_folder=str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match=r"nvme_folder is .*where no folder can be made: Not a directory"):
        measure(case)
