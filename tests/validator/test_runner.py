"""Each case in processes of its own: limits hold, failures are told, nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from estimator.errors import InputError
from estimator.report import CATEGORIES, PHASES, TIME_PARTS
from estimator.sharding.units import count_params, model_units
from validator.measure import runner
from validator.measure.case import Case, available_cores, case_from_dict, case_to_dict, read_case, write_case
from validator.measure.report import RankResult, build_report, interquartile_range
from validator.measure.runner import MeasureError, Progress, measure, measure_many
from validator.measure.worker import is_out_of_memory
from validator.store.database import Store

HERE = Path(__file__).parent


@pytest.fixture
def odd_worker(monkeypatch, tmp_path):
    """Replaces the worker by one whose runtime behaves as told; its command line carries ``tmp_path``."""

    def use(what: str) -> None:
        monkeypatch.setattr(runner, "WORKER", "odd_worker")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))))
        monkeypatch.setenv("ODD_WORKER", what)

    return use


def still_running(tmp_path: Path, patience_s: float = 0) -> list[list[str]]:
    """Command lines of running workers and launchers of this test, after ``patience_s`` for them to end."""
    deadline = time.monotonic() + patience_s
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if (
                    "odd_worker" in line
                    and str(tmp_path) in " ".join(line)
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(line)
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.05)


def test_a_case_survives_json(tmp_path, make_job):
    case = Case(job=make_job(n_gpus=4, zero=2), backend="fake", rank=3, steps=5, warmup=0, time_limit_s=1.5, seed=7)
    assert case_from_dict(case_to_dict(case)) == case
    write_case(case, tmp_path / "case.json")
    assert read_case(tmp_path / "case.json") == case


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"backend": "cdua"}, "backend is 'cdua'.*did you mean 'cuda'"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"time_limit_s": float("inf")}, "time_limit_s is inf"),
        ({"rank": 4}, "rank is 4.*0 to 3"),
        ({"rank": 1, "backend": "cpu"}, "rank is 1.*every rank"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes is 0"),
        ({"stps": 1}, "'stps'.*did you mean 'steps'"),
        ({"job": 3}, "job is 3"),
    ],
)
def test_a_bad_case_is_refused(make_job, change, complaint):
    data = {**case_to_dict(Case(job=make_job(n_gpus=4), backend="fake")), **change}
    with pytest.raises(InputError, match=complaint):
        case_from_dict(data)


def test_a_bad_case_file_is_refused(tmp_path):
    for content, complaint in (("{", "not JSON"), ("[]", "one JSON object"), ('{"backend": "cpu"}', "no field 'job'")):
        (tmp_path / "case.json").write_text(content)
        with pytest.raises(InputError, match=complaint):
            read_case(tmp_path / "case.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_case(tmp_path / "absent.json")


def test_threads_share_the_cores(make_job):
    assert Case(job=make_job(), backend="cpu").threads_per_process == available_cores()
    assert Case(job=make_job(n_gpus=64), backend="cpu").threads_per_process == max(1, available_cores() // 64)
    assert Case(job=make_job(n_gpus=64), backend="fake").n_processes == 1


def test_two_ranks_give_one_report(odd_worker, tmp_path, make_job):
    odd_worker("work")
    seen: list[Progress] = []
    report = measure(
        Case(job=make_job(n_gpus=2, micro_batch=3), backend="cpu", steps=4, warmup=0, time_limit_s=60), seen.append
    )
    assert (report.origin, report.fits, report.rank) == ("cpu", True, 1)
    assert (report.peak_allocated_bytes, report.peak_where) == (101, "rank 1")  # the worst rank's
    assert report.provenance["rank_peak_bytes"] == {"0": 100, "1": 101}
    assert report.provenance["step_seconds"] == [2.0, 4.0, 6.0, 8.0]  # the slowest rank of each step
    assert (report.step_s, report.step_low_s, report.step_high_s, report.step_spread_s) == (5.0, 2.0, 8.0, 3.0)
    assert report.tokens_per_s == 3 * 2 * 16 / 5.0
    assert report.time_parts_s == {"forward": 0.5}
    assert report.provenance["torch_threads"] == max(1, available_cores() // 2)
    assert [(p.stage, p.step) for p in seen] == [
        ("start", 0),
        *(("step", i) for i in range(4)),
        ("done", 0),
    ]
    assert still_running(tmp_path, patience_s=8) == []


def test_a_tiny_model_is_really_trained(make_job, tmp_path):
    """The real runtime, end to end: two processes, then the same job's rank 1 without arithmetic."""
    job = make_job(n_gpus=2, micro_batch=2, zero=2)
    store = Store(tmp_path / "records.db")
    cases = [
        Case(job=job, backend="cpu", steps=3, warmup=1, time_limit_s=90),
        Case(job=job, backend="fake", rank=1, time_limit_s=90),
    ]
    outcomes = measure_many(cases, store)
    assert [o.status for o in outcomes] == ["measured", "measured"], [o.error for o in outcomes]
    real, fake = store.reports()
    assert [o.report for o in outcomes] == [real, fake]
    losses = real.provenance["losses"]
    assert len(losses) == 3 and all(3 < loss < 6 for loss in losses)  # an untrained model: about ln(64) = 4.16
    assert real.step_s is not None and 0 < real.step_s < 60 and len(real.provenance["step_seconds"]) == 3
    assert real.tokens_per_s == pytest.approx(4 * 16 / real.step_s)
    assert set(real.time_parts_s) <= set(TIME_PARTS) and sum(real.time_parts_s.values()) > 0
    assert real.peak_phase in PHASES and set(real.category_peak_bytes) <= set(CATEGORIES)
    n_params = count_params(model_units(job.model))
    assert real.category_peak_bytes["params"] == fake.category_peak_bytes["params"] >= n_params * 4
    assert real.collective_bytes == fake.collective_bytes and sum(real.collective_bytes.values()) >= 2 * n_params * 4
    assert fake.peak_allocated_bytes is not None and fake.step_s is None and fake.rank == 1


def test_a_fake_rank_of_many(odd_worker, tmp_path, make_job):
    odd_worker("work")
    report = measure(
        Case(job=make_job(n_gpus=512, zero=3, memory_bytes=1 << 30), backend="fake", rank=77, time_limit_s=60)
    )
    assert (report.origin, report.rank, report.peak_allocated_bytes) == ("fake", 77, 177)
    assert report.step_s is report.tokens_per_s is report.fits is None


def test_the_time_limit_ends_every_process(odd_worker, tmp_path, make_job):
    odd_worker("hang-on-rank-1")
    start = time.monotonic()
    with pytest.raises(MeasureError, match="ran past its limit of 6 s"):
        measure(Case(job=make_job(n_gpus=2), backend="cpu", time_limit_s=6))
    assert time.monotonic() - start < 12
    assert still_running(tmp_path) == []


def test_an_interrupt_ends_every_process(odd_worker, tmp_path, make_job):
    odd_worker("hang")
    seen: list[int] = []

    def interrupt(progress: Progress) -> None:
        if progress.stage == "step":
            seen.append(len(still_running(tmp_path)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Case(job=make_job(n_gpus=2), backend="cpu", time_limit_s=60), interrupt)
    assert seen[0] >= 2
    assert still_running(tmp_path) == []


def test_a_killed_measuring_program_leaves_no_orphans(odd_worker, make_job, tmp_path):
    odd_worker("hang")
    write_case(Case(job=make_job(n_gpus=2), backend="cpu", time_limit_s=60), tmp_path / "case.json")
    script = (
        "import sys; from validator.measure import runner; from validator.measure.case import read_case; runner.WORKER = 'odd_worker'\n"
        "runner.measure(read_case(sys.argv[1]), lambda p: print(p.stage, flush=True))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "case.json")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert [parent.stdout.readline().strip() for _ in range(2)] == ["start", "step"]
    assert len(still_running(tmp_path)) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert still_running(tmp_path, patience_s=8) == []


def test_a_crash_is_told_with_its_last_words(odd_worker, tmp_path, make_job):
    odd_worker("crash")
    with pytest.raises(MeasureError, match="rank 1 raised ArithmeticError: the flux capacitor is empty") as caught:
        measure(Case(job=make_job(n_gpus=2), backend="cpu", time_limit_s=60))
    assert "odd_worker.py" in str(caught.value)
    assert still_running(tmp_path) == []


def test_a_sudden_death_is_told(odd_worker, tmp_path, make_job):
    odd_worker("die")
    with pytest.raises(MeasureError, match=r"killed by SIGKILL(.|\n)*last gasp"):
        measure(Case(job=make_job(), backend="cpu", time_limit_s=60))


def test_the_sudden_death_of_one_rank_is_told(odd_worker, tmp_path, make_job):
    odd_worker("train-and-die")
    start = time.monotonic()
    with pytest.raises(MeasureError, match=r"crashed, rank 1 was killed by SIGKILL"):
        measure(Case(job=make_job(n_gpus=2), backend="cpu", time_limit_s=120))
    assert time.monotonic() - start < 60
    assert still_running(tmp_path) == []


def test_out_of_memory_is_a_result(odd_worker, tmp_path, make_job):
    odd_worker("out-of-memory")
    job = make_job(n_gpus=2)
    report = measure(Case(job=job, backend="cpu", time_limit_s=60, memory_limit_bytes=3 << 30))
    assert (report.fits, report.rank, report.job_key, report.origin) == (False, 1, job.key, "cpu")
    assert "out of memory" in str(report.explanation) and "1099511627776" in str(report.explanation)
    assert report.capacity_bytes == 3 << 30 and report.step_s is None and report.provenance["torch"]


def test_what_counts_as_out_of_memory():
    class OutOfMemoryError(RuntimeError):
        """torch's and CuPy's are called so."""

    assert is_out_of_memory(MemoryError()) and is_out_of_memory(OutOfMemoryError("CUDA"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


def test_cuda_without_a_gpu_is_refused(odd_worker, tmp_path, make_job):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    odd_worker("work")
    with pytest.raises(InputError, match=r"backend is 'cuda'.*has 0 GPU\(s\)"):
        measure(Case(job=make_job(), backend="cuda", time_limit_s=60))


def test_too_many_processes_are_refused(make_job):
    n = runner.MAX_PROCESSES_PER_CORE * available_cores() * 2
    with pytest.raises(InputError, match=f"'cpu' with {n} processes.*'fake'"):
        measure(Case(job=make_job(n_gpus=n), backend="cpu"))


def test_a_study_can_be_interrupted_and_goes_on(make_job, make_report, tmp_path, monkeypatch):
    cases = [Case(job=make_job(micro_batch=n), backend="cpu") for n in (1, 2, 3, 4)]
    store, ran = Store(tmp_path / "records.db"), []

    def fake_measure(case, on_progress):
        ran.append(case)
        on_progress(Progress(case=case, stage="start"))
        if len(ran) == 3:
            raise KeyboardInterrupt
        if case is cases[1]:
            raise MeasureError("it crashed")
        return make_report(case.job)

    monkeypatch.setattr(runner, "measure", fake_measure)
    with pytest.raises(KeyboardInterrupt):
        measure_many(cases, store)
    assert [r.job_key for r in store.reports()] == [cases[0].job.key]
    seen: list[Progress] = []
    outcomes = measure_many(cases, store, seen.append)
    assert [o.status for o in outcomes] == ["recorded", "failed", "measured", "measured"]
    assert outcomes[1].error == "it crashed"
    assert ran == [*cases[:3], *cases[1:]]  # the first case ran once
    assert [(p.index, p.stage) for p in seen] == [
        (0, "recorded"),
        (1, "start"),
        (1, "failed"),
        (2, "start"),
        (3, "start"),
    ]
    assert {p.n_cases for p in seen} == {4}
    assert store.count() == 3


def test_another_fake_rank_is_another_record(make_job, make_report, tmp_path, monkeypatch):
    job, store = make_job(n_gpus=4), Store(tmp_path / "records.db")
    monkeypatch.setattr(runner, "measure", lambda case, _: make_report(case.job, origin="fake", rank=case.rank))
    cases = [Case(job=job, backend="fake", rank=rank) for rank in (0, 3, 0)]
    assert [o.status for o in measure_many(cases, store)] == ["measured", "measured", "recorded"]


def test_live_bytes_above_the_capacity_do_not_fit(make_job):
    session = {
        "step_seconds": (), "part_seconds": {}, "losses": (), "skipped_steps": 0,
        "peak_allocated_bytes": 177, "peak_phase": "forward", "peak_where": "embed", "category_bytes_at_peak": {"params": 177},
        "category_peak_bytes": {"params": 177}, "phase_peak_bytes": {"forward": 177}, "phase_category_bytes": {"forward": {"params": 177}}, "host_bytes": 0, "pinned_bytes": 0,
        "collective_bytes": {}, "collective_calls": {}, "copy_bytes": {}, "copy_seconds": {}, "device_step_seconds": (),
        "attribution": {}, "parity": {},
    }  # fmt: skip
    result = RankResult(rank=0, session=session)
    report = build_report(Case(job=make_job(memory_bytes=150), backend="fake"), [result], {})
    assert report.fits is False and "177 B" in str(report.explanation) and "150 B" in str(report.explanation)
    assert build_report(Case(job=make_job(memory_bytes=177), backend="fake"), [result], {}).fits is None


def test_interquartile_range():
    assert interquartile_range([1.0]) is None
    assert interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
