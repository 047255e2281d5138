"""Campaigns: within the budget, resumable however they ended, one rank of many on one device."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.predict import predict
from tests.validator.fake_nvml import FakeNvml
from validator import campaign
from validator.__main__ import main
from validator.campaign import Records, next_probe, run_campaign, summary_lines
from validator.devices import gpu_name
from validator.measure import runner, worker
from validator.measure.case import Case
from validator.measure.device_memory import DeviceMeter
from validator.measure.report import RankResult, build_report
from validator.measure.runner import MeasureError, TimeLimitError, measure
from validator.store.records import import_reports
from validator.suites import Boundary, LeftOut, Place, Plan

# ---- cuda-virtual and cuda ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_gpus", "zero"), [(1, 0), (4, 2), (64, 3)])
def test_one_process_plays_one_rank_with_real_arithmetic(make_job, monkeypatch, n_gpus, zero):
    """The code of ``cuda-virtual``, on the CPU: everything but the device."""
    monkeypatch.setattr(worker, "VIRTUAL_DEVICE", "cpu")
    job = make_job(n_gpus=n_gpus, zero=zero)
    case = Case(job=job, backend="cuda-virtual", rank=n_gpus - 1, steps=2, warmup=1)
    seen: list[int] = []
    report = worker.run_case(case, {"cores": 2}, lambda number, _: seen.append(number))
    assert report is not None and seen == [0, 1, 2]
    assert (report["origin"], report["rank"]) == ("cuda-virtual", n_gpus - 1)
    assert report["step_s"] > 0 and report["provenance"]["processes"] == 1
    assert all(3 < loss < 6 for loss in report["provenance"]["losses"])
    forecast = predict(job)
    assert report["collective_bytes"] == forecast.collective_bytes
    for category in ("params", "grads", "optimizer_state", "gathered_params"):
        assert report["category_peak_bytes"].get(category, 0) == forecast.category_peak_bytes.get(category, 0)
    notes = " ".join(report["notes"])
    if n_gpus == 1:
        assert report["fits"] is True and report["tokens_per_s"] > 0 and "network" not in notes
    else:
        assert f"rank {n_gpus - 1} of {n_gpus}; there is no network" in notes
        assert report["fits"] is report["tokens_per_s"] is report["mfu"] is None


def test_cuda_virtual_without_a_gpu_is_refused_in_one_sentence(make_job):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"backend is 'cuda-virtual'.*has 0 GPU\(s\).*allowed without a GPU") as caught:
        measure(Case(job=make_job(n_gpus=64, zero=3), backend="cuda-virtual", rank=3, time_limit_s=60))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["cuda", "cuda-virtual"])
def test_the_allocators_peak_is_that_of_the_timed_steps(make_job, monkeypatch, backend):
    """With torch's device calls replaced: what is called on a GPU, and when."""
    import torch

    import runtime.session as session

    live, calls, used = [0], [], [100]
    nvml = FakeNvml({"GPU-x": 50})
    meter = DeviceMeter(nvml)  # others take 50 bytes
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(("set_device", index)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: live.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: live[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * live[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (300, 1000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: nvml.used.update({"GPU-x": 50 + used[0]}))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * live[0])
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"reserved_bytes.all.peak": 80, "num_ooms": 0})
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"active_bytes.peak": 5, "allocated_bytes.peak": 8})
    monkeypatch.setattr(torch.cuda, "reset_peak_host_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")

    def run_session(job, device, options, *, rank, on_step):
        calls.append(("device", device))
        for number, peak in enumerate((900, 500, 40, 30)):  # start-up, then steady
            live[0] = max(live[0], peak)
            nvml.used["GPU-x"] = 50 + 100 + 2 * live[0] + 7  # others, context, allocator, kernels loaded since
            on_step(number, 0.5)
        live[0] = 700  # the metered step
        history = {
            "category_bytes_at_peak": {"params": 30, "workspace": 5, "fragmentation": 9},
            "category_peak_bytes": {"workspace": 6},
        }
        return session.Measurement(
            peak_allocated_bytes=35, step_seconds=(0.5, 0.5), category_bytes_at_peak={"params": 35},
            category_peak_bytes={"params": 35, "workspace": 1}, attribution=history,
        )  # fmt: skip

    monkeypatch.setattr(session, "run_session", run_session)
    case = Case(job=make_job(), backend=backend, steps=2, warmup=2)
    report = worker.run_case(case, {}, lambda *_: None, meter)
    assert report is not None and calls == [("set_device", 0), ("device", "cuda")]
    assert (report["peak_allocated_bytes"], report["peak_reserved_bytes"]) == (40, 80)
    assert (report["device_used_bytes"], report["capacity_bytes"]) == (100 + 80 + 7, 1000)
    assert report["category_bytes_at_peak"] == {"params": 30, "workspace": 5, "fragmentation": 9, "cuda_context": 100}
    assert report["category_peak_bytes"] == {"params": 35, "workspace": 6, "cuda_context": 100}
    origin = report["provenance"]
    assert origin["metered_peak_bytes"] == 35 and report["fits"] is True
    assert origin["allocator"] == {"backend": "native", "peak_reserved_bytes": 80, "num_ooms": 0}
    assert origin["pinned"] == {"peak_active_bytes": 5, "peak_held_bytes": 8}
    memory = origin["device_memory"]
    assert (memory["source"], memory["others_bytes"], memory["libraries_bytes"]) == ("nvml-device", 50, 7)
    assert any("less what was taken before" in note for note in report["notes"])


def test_a_played_rank_that_runs_out_of_memory_is_a_result(make_job, tmp_path):
    case = Case(job=make_job(n_gpus=8), backend="cuda-virtual", rank=5)
    failure = {"rank": 0, "time": 1.0, "kind": "out_of_memory", "type": "OutOfMemoryError", "message": "CUDA out of memory.",
               "traceback": "", "provenance": {"gpu": {"memory_bytes": 77}}}  # fmt: skip
    out = tmp_path / "report.json"
    (tmp_path / "report.json.failure0").write_text(json.dumps(failure))
    report = runner._result(case, 1, out, tmp_path / "log", 0)
    assert (report.origin, report.rank, report.fits, report.capacity_bytes) == ("cuda-virtual", 5, False, 77)
    assert "rank 5 ran out of memory before the first step was over" in str(report.explanation)
    (tmp_path / "report.json.progress").write_text("[0, 0.5]\n[1, 0.5]\n")
    assert "after 2 step(s)" in str(runner._result(case, 1, out, tmp_path / "log", 0).explanation)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"backend": "cuda", "warmup": 0}, "warmup is 0.*at least 1"),
        ({"backend": "cuda-virtual", "rank": 8}, "rank is 8"),
        ({"backend": "fake", "metered": False}, "metered is False; allowed: true"),
        ({"metered": 1}, "metered is 1"),
        ({"reference": 1}, "reference is 1; allowed: true or false"),
        ({"backend": "fake", "reference": True}, "reference is True; allowed: false with backend 'fake'"),
        ({"backend": "cuda-virtual", "reference": True}, "which plays one rank alone"),
    ],
)
def test_bad_cases(make_job, change, complaint):
    with pytest.raises(InputError, match=complaint):
        Case(**{"job": make_job(n_gpus=8), "backend": "cpu", **change})


def test_without_metering_the_other_numbers_are_still_there(make_job, monkeypatch):
    monkeypatch.setattr(worker, "VIRTUAL_DEVICE", "cpu")
    case = Case(job=make_job(), backend="cuda-virtual", steps=1, warmup=1, metered=False)
    report = worker.run_case(case, {}, lambda *_: None)
    assert report is not None and report["step_s"] > 0 and report["category_peak_bytes"] == {}
    assert report["peak_allocated_bytes"] is None  # a CPU has no allocator to ask


# ---- campaigns ------------------------------------------------------------------------------------------------------


def make_report(case: Case, **changes):
    """A report of ``case`` as ``build_report`` makes it from a session that measured 1,000 bytes."""
    session = {"step_seconds": (), "part_seconds": {}, "losses": (), "peak_phase": "forward", "peak_where": "embed",
               "host_bytes": 0, "pinned_bytes": 0, "peak_allocated_bytes": 1000, "category_bytes_at_peak": {},
               "category_peak_bytes": {}, "phase_peak_bytes": {}, "phase_category_bytes": {}, "collective_bytes": {},
               "collective_calls": {}, "copy_bytes": {}, "copy_seconds": {}, "device_step_seconds": (), "attribution": {},
               "parity": {}, "skipped_steps": 0}  # fmt: skip
    return replace(build_report(case, [RankResult(rank=case.rank, session=session)], {}), **changes)


@pytest.fixture
def plan(make_job):
    cases = [Case(job=make_job(n_gpus=4, micro_batch=n), backend="fake", rank=n % 3) for n in (1, 2, 3, 4)]
    return Plan(suite="s", cases=tuple(cases), left_out=(LeftOut(settings={"zero": 9}, reason="zero is 9"),))


@pytest.fixture
def measured(monkeypatch):
    """Replaces ``measure``; returns the list of cases that were run."""
    ran: list[Case] = []

    def quick(case, on_progress=None):
        ran.append(case)
        return make_report(case)

    monkeypatch.setattr(campaign, "measure", quick)
    return ran


def run(plan, folder, budget_s=60.0):
    lines: list[str] = []
    return run_campaign(plan, folder, budget_s, lines.append), lines


def test_a_campaign_records_and_skips(plan, measured, tmp_path):
    summary, lines = run(plan, tmp_path)
    assert (summary.measured, summary.recorded, summary.remain, summary.failed) == (4, 0, 0, 0)
    assert summary.left_out == {"zero is 9": 1} and len(lines) == 4 and "peak 1000 B (forecast +" in lines[0]
    assert summary.peak_error is not None and summary.peak_error["n"] == 4
    expected = [predict(c.job).peak_allocated_bytes / 1000 - 1 for c in plan.cases]
    assert summary.peak_error["worst"] == max(expected, key=abs)
    assert [r.job_key for r in import_reports(tmp_path / "records.jsonl")] == [c.job.key for c in plan.cases]
    again, lines = run(plan, tmp_path)
    assert (again.measured, again.recorded, len(measured), lines) == (0, 4, 4, [])
    assert json.loads((tmp_path / "summary.json").read_text())["recorded"] == 4
    assert "0 measured (0 out of memory), 4 recorded before" in next(summary_lines(again))
    other_rank = replace(plan.cases[0], rank=3)
    assert run(replace(plan, cases=(other_rank,)), tmp_path)[0].measured == 1


def test_failures_are_told_and_tried_again(plan, monkeypatch, tmp_path):
    def measure(case):
        if case.rank == 2:
            raise MeasureError("it crashed\nlong story")
        return make_report(case, fits=False, peak_allocated_bytes=None)

    monkeypatch.setattr(campaign, "measure", measure)
    summary, lines = run(plan, tmp_path)
    assert (summary.measured, summary.out_of_memory, summary.failed) == (3, 3, 1)
    assert sum(line.endswith("failed: it crashed") for line in lines) == 1
    assert "out of memory (forecast to fit)" in lines[0] and len(summary.wrong_verdicts) == 3
    failure = json.loads((tmp_path / "failures.jsonl").read_text())
    assert failure["error"].endswith("long story") and failure["case"]["rank"] == 2
    tried: list[Case] = []
    monkeypatch.setattr(campaign, "measure", lambda case: tried.append(case) or make_report(case))
    (tmp_path / "records.jsonl").unlink()
    assert run(plan, tmp_path)[0].measured == 4
    assert [case.rank for case in tried] == [1, 0, 1, 2]  # what failed before comes last
    (tmp_path / "failures.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match=r"failures.jsonl' is damaged"):
        run(plan, tmp_path)


def test_the_budget_holds(plan, monkeypatch, tmp_path):
    limits: list[float] = []

    def measure(case):
        limits.append(case.time_limit_s)
        time.sleep(0.25)
        return make_report(case)

    monkeypatch.setattr(campaign, "measure", measure)
    monkeypatch.setattr(campaign, "RESERVE_S", 0.0)
    monkeypatch.setattr(campaign, "SHORTEST_S", 0.1)
    start = time.monotonic()
    summary, _ = run(plan, tmp_path, budget_s=0.7)
    assert time.monotonic() - start < 1.0
    assert (summary.measured, summary.remain, summary.failed) == (2, 2, 0)  # a third would not end in time
    assert all(limit <= 0.7 for limit in limits)
    summary, _ = run(plan, tmp_path, budget_s=5)
    assert (summary.measured, summary.recorded, summary.remain) == (2, 2, 0)

    def too_slow(case):
        raise TimeLimitError("ran past its limit")

    monkeypatch.setattr(campaign, "measure", too_slow)
    summary, lines = run(plan, tmp_path / "slow", budget_s=5)
    assert (summary.failed, summary.remain) == (0, 4) and "budget is used up" in lines[0]
    summary, _ = run(replace(plan, cases=(replace(plan.cases[0], time_limit_s=1),)), tmp_path / "slow", budget_s=60)
    assert (summary.failed, summary.remain) == (1, 0)
    with pytest.raises(InputError, match="budget_s is 0"):
        run(plan, tmp_path, budget_s=0)


def test_a_killed_campaign_goes_on(plan, measured, tmp_path):
    script = f"""
import pickle, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from validator import campaign
from test_campaign import make_report
plan, ran = pickle.load(open(sys.argv[1], "rb")), []
def measure(case):
    ran.append(case)
    if len(ran) == 3:
        print("third", flush=True)
        time.sleep(60)
    return make_report(case)
campaign.measure = measure
campaign.run_campaign(plan, campaign.Path(sys.argv[2]), 60.0, lambda line: None)
"""
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "plan"), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "third"
    with pytest.raises(InputError, match="another campaign is running"):
        run(plan, tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    summary, _ = run(plan, tmp_path / "out")
    assert (summary.recorded, summary.measured) == (2, 2)
    assert [case.job for case in measured] == [case.job for case in plan.cases[2:]]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_truncated_last_line_is_cut_off_and_its_case_runs_again(plan, measured, tmp_path, kept):
    run(plan, tmp_path)
    path = tmp_path / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:kept])
    summary, said = run(plan, tmp_path)
    assert (summary.recorded, summary.measured) == (3, 1) and "the last line is not finished" in said[0]
    assert len(import_reports(path)) == 4


def test_a_damaged_line_is_told_with_its_number(plan, measured, tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"records.jsonl', line 1: record has no field 'origin'"):
        run(plan, tmp_path)
    assert measured == []


def test_a_folder_that_cannot_be_written_is_one_sentence(plan, measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"campaign folder .*file.* cannot be used"):
        run(plan, tmp_path / "file")
    if Path("/dev/full").exists():
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "records.jsonl").symlink_to("/dev/full")
        records = Records.__new__(Records)
        records.path, records._known = tmp_path / "full" / "records.jsonl", {}
        with pytest.raises(InputError, match=r"records.jsonl' cannot be written: No space left on device"):
            records.add(make_report(plan.cases[0]))
        assert records.find(plan.cases[0]) is None


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_the_search_finds_the_largest_that_runs(forecast, truth, largest):
    results: dict[int, bool] = {}
    while (size := next_probe(forecast, largest, results)) is not None:
        assert 1 <= size <= largest and size not in results
        results[size] = size <= truth
        assert len(results) <= 20
    ran = max((n for n, ok in results.items() if ok), default=0)
    truth = min(truth, largest)
    assert truth - truth // 64 <= ran <= truth
    if forecast == truth > 0:
        assert len(results) <= 6


def test_boundaries_are_searched_and_resumed(monkeypatch, tmp_path):
    settings = {"backend": "fake", "gpu": "rtx-4090", "model": "gpt2", "seq_len": 1024, "gpus": 1, "zero": 0}
    boundary = Boundary(settings=settings, place=Place(), largest=64)
    forecast, ran = boundary.forecast(), []

    def measure(case):
        ran.append(case.job.workload.micro_batch_size)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return make_report(case, fits=None if ran[-1] <= forecast - 3 else False)

    monkeypatch.setattr(campaign, "measure", measure)
    both = Plan(suite="s", boundaries=(boundary,))
    with pytest.raises(KeyboardInterrupt):
        run(both, tmp_path)
    summary, _ = run(both, tmp_path)
    (result,) = summary.boundaries
    assert (result.forecast, result.ran, result.failed, result.finished) == (forecast, forecast - 3, forecast - 2, True)
    assert (
        summary.recorded == 2 and ran[0] == forecast and len(set(ran)) == len(ran) - 1
    )  # only the interrupted one again
    assert any(f"out of memory at {forecast - 2}, forecast {forecast}" in line for line in summary_lines(summary))


# ---- the command ----------------------------------------------------------------------------------------------------

TINY = 'about = "t"\nbackend = "fake"\ngpu = "h200"\nmodel = "gpt-30m"\nseq_len = 64\ngpus = 512\nzero = [0, 3]\nrank = 511\n'


def test_a_campaign_from_the_command_line(tmp_path, capsys):
    """Real cases in processes of their own; the rest of the budget is too short for anything the second time."""
    (tmp_path / "tiny.toml").write_text(TINY)
    command = ["campaign", "--suite", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), "--budget-s", "90"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["measured"], summary["remain"]) == (2, 0) and abs(summary["peak_error"]["worst"]) < 1e-3
    assert "tiny: 2 measured" in err and "zero3" in err
    assert {r.rank for r in import_reports(tmp_path / "out" / "records.jsonl")} == {511}


def test_a_gpu_suite_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("validator.__main__.device_here", lambda: None)
    assert main(["campaign", "--suite", "memory", "--out", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "suite 'memory' needs a GPU and torch can use none here" in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert main(["campaign", "--suite", "smoke", "--gpu", "h200", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed["cases"]) > 50 and not (tmp_path / "x").exists()


def test_a_mixed_suite_without_a_gpu_runs_what_it_can(plan, tmp_path, capsys, monkeypatch):
    """What needs a GPU is left out with its reason, be it named or "here"."""
    ran = []
    monkeypatch.setattr("validator.__main__.device_here", lambda: None)
    monkeypatch.setattr(campaign, "measure", lambda case: ran.append(case) or make_report(case))
    both = 'model = "gpt-30m"\nseq_len = 64\ngpus = 1\nzero = 0\n'
    for gpu in ("h200", "here"):
        both += f'[[matrix]]\nbackend = ["cuda", "fake"]\ngpu = "{gpu}"\n'
    (tmp_path / "both.toml").write_text(both)
    command = ["campaign", "--suite", str(tmp_path / "both.toml"), "--out", str(tmp_path / "x"), "--budget-s", "60"]
    assert main(command) == 0 and [case.backend for case in ran] == ["fake"]
    summary = json.loads(capsys.readouterr().out)
    reasons = summary["left_out"]
    assert sum(reasons.values()) == 3 and reasons["it needs a GPU, and torch can use none here"] == 1
    assert main([*command, "--gpu", "h200"]) == 0 and len(ran) == 1  # recorded


@pytest.mark.parametrize(
    ("suite", "complaint"),
    [
        (TINY.replace("h200", "h2000"), "has no case that can run: gpu is 'h2000'"),
        (
            TINY.replace('"fake"', '"cuda"').replace("511", "0"),
            "has gpu 'h200'; allowed with 'cuda': 'a100-80' or 'here'",
        ),
    ],
)
def test_what_cannot_run_here_is_refused(tmp_path, capsys, monkeypatch, suite, complaint):
    monkeypatch.setattr("validator.__main__.device_here", lambda: "NVIDIA A100-SXM4-80GB")
    (tmp_path / "s.toml").write_text(suite)
    assert (
        main(["campaign", "--suite", str(tmp_path / "s.toml"), "--out", str(tmp_path / "x"), "--gpu", "a100-80"]) == 2
    )
    assert complaint in capsys.readouterr().err


def test_the_gpu_of_this_machine():
    assert gpu_name("NVIDIA H200", None) == gpu_name(None, "H200") == gpu_name("NVIDIA H200", "h200") == "h200"
    assert gpu_name(None, None) is None
    assert gpu_name("Voodoo 5", "h200") == "h200"
    with pytest.raises(InputError, match="gpu is 'a100-80'; allowed: 'h200'"):
        gpu_name("NVIDIA H200", "a100-80")
    with pytest.raises(InputError, match="the GPU of this machine is 'Voodoo 5'"):
        gpu_name("Voodoo 5", None)
