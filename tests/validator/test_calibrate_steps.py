"""Small jobs that calibration trains: what is read from their steps, and what forecasts make of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import exp, log, prod
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from estimator import catalog  # noqa: E402
from estimator.errors import InputError  # noqa: E402
from estimator.job import Job  # noqa: E402
from estimator.job.cluster import Gpu  # noqa: E402
from estimator.job.options import JobOptions, build_job  # noqa: E402
from estimator.ops.operator import Op  # noqa: E402
from estimator.predict import predict  # noqa: E402
from estimator.time.interval import conformal  # noqa: E402
from estimator.time.operators import OperatorTimer  # noqa: E402
from estimator.time.profile import HardwareProfile  # noqa: E402
from estimator.time.profile_file import load_profile, profile_from_dict, profile_to_dict, save_profile  # noqa: E402
from estimator.time.stack import LONE, Stack  # noqa: E402
from runtime import session  # noqa: E402
from runtime.session import Measurement, SessionOptions  # noqa: E402
from validator.calibrate import steps, worker  # noqa: E402
from validator.calibrate.build import build_profile  # noqa: E402
from validator.calibrate.describe import describe  # noqa: E402
from validator.calibrate.steps import CPU_JOBS, CUDA_JOBS, FEWEST, PARTS, Forecasts, jobs_of, with_steps  # noqa: E402
from validator.calibrate.tasks import Task, task_of, tasks_for  # noqa: E402
from validator.calibrate.worker import Round  # noqa: E402
from validator.suites import load_suite, suite_names  # noqa: E402

RECORDS = Path(__file__).resolve().parents[2] / "validator" / "records"
TRUTH = Stack(matmul=0.9, memory=0.7, attention=0.8, issue_s=4e-5)


@pytest.fixture(scope="module")
def curves() -> HardwareProfile:
    """Of a real processor, as before steps were measured."""
    return replace(load_profile(next(RECORDS.glob("cpu_*.profile.json"))), steps=(), stacks=())


def trained(
    curves: HardwareProfile, stack: Stack, names: tuple[str, ...] = tuple(CPU_JOBS)
) -> dict[str, dict[str, Any]]:
    """Results of jobs on one and on two processes, whose seconds are what ``stack`` makes of ``curves``."""
    done: dict[str, dict[str, Any]] = {}
    for name in names:
        for workers in (1, 2):
            small = CPU_JOBS[name]
            seconds = Forecasts(small.job(workers, curves.gpu, curves.host), curves).of(stack)
            parts = {part: seconds[part] for part in PARTS}
            done[Task("step", name, small.dtype).key(workers)] = result(seconds["step"], parts)
    return done


def result(step_s: float, parts: Mapping[str, float]) -> dict[str, Any]:
    return {"work": 1.0, "seconds": [step_s] * 3, "parts": dict(parts)}


@pytest.fixture(scope="module")
def profile(curves: HardwareProfile) -> HardwareProfile:
    return with_steps(curves, trained(curves, TRUTH))


def job(profile: HardwareProfile, **options: Any):  # type: ignore[no-untyped-def]
    given = {"model": "gpt-30m", "gpu": "cpu", "gpus": 2, "seq_len": 128, "dtype": "fp32", **options}
    return build_job(JobOptions(**given), local_gpu=profile.gpu, local_host=profile.host)


def test_what_was_put_in_comes_out(profile: HardwareProfile) -> None:
    for name in ("matmul", "memory", "issue_s"):
        for point in profile.stacks:
            assert point.constants[name] == pytest.approx(getattr(TRUTH, name), rel=0.05), name
    assert {p.name for p in profile.steps} == set(CPU_JOBS) and {p.workers for p in profile.steps} == {1, 2}
    errors = [log(p.forecast_s / p.seconds) for p in profile.steps]
    assert max(map(abs, errors)) < 0.05, "each is forecast from what the others tell"


def test_forecasts_of_other_jobs_follow(curves: HardwareProfile, profile: HardwareProfile) -> None:
    for options in ({}, {"model": "llama-30m", "zero": 3, "offload": "optimizer", "micro_batch": 2}):
        other = job(profile, **options)
        truth, lone = Forecasts(other, curves).of(TRUTH), predict(other, curves)
        forecast = predict(other, profile)
        assert forecast.step_s == pytest.approx(truth["step"], rel=0.02)
        assert lone.step_s is not None and forecast.step_s is not None and lone.step_s < 0.97 * forecast.step_s
        assert forecast.time_parts_s["forward"] == pytest.approx(truth["forward"], rel=0.03)


def test_the_interval_is_of_the_steps(profile: HardwareProfile) -> None:
    forecast = predict(job(profile), profile)
    width = conformal([log(p.forecast_s / p.seconds) for p in profile.steps if p.part == "step"])
    assert forecast.step_s is not None
    assert forecast.step_low_s == pytest.approx(forecast.step_s * exp(-width))
    assert forecast.step_high_s == pytest.approx(forecast.step_s * exp(width))
    assert any("constants of 16 small jobs trained on this machine" in note for note in forecast.notes)


def test_without_steps_all_is_as_before_and_said(curves: HardwareProfile) -> None:
    assert with_steps(curves, {}) is curves
    forecast = predict(job(curves), curves)
    lone = Forecasts(job(curves), curves).of(LONE)
    assert forecast.step_s == pytest.approx(lone["step"])
    assert any("has no measured steps" in note for note in forecast.notes)
    assert not any(line.startswith("steps of") for line in describe(curves))


def test_each_number_of_processes_has_its_own(curves: HardwareProfile) -> None:
    """Threads of one process wait for each other where two processes do not."""
    slow = Stack(matmul=0.75)
    done = {
        key: value
        for stack, workers in ((slow, 1), (TRUTH, 2))
        for key, value in trained(curves, stack).items()
        if task_of(key)[0] == workers
    }
    profile = with_steps(curves, done)
    for workers, truth in ((1, slow), (2, TRUTH)):
        other = job(profile, gpus=workers)
        assert predict(other, profile).step_s == pytest.approx(Forecasts(other, curves).of(truth)["step"], rel=0.02)


def test_few_jobs_tell_nothing(curves: HardwareProfile) -> None:
    few = with_steps(curves, trained(curves, TRUTH, ("gpt",)))
    assert FEWEST > 2 and len({(p.name, p.workers) for p in few.steps}) == 2 and not few.stacks
    forecast = predict(job(few), few)
    assert forecast.step_s == pytest.approx(predict(job(curves), curves).step_s)
    assert any("has too few measured steps" in note for note in forecast.notes)
    assert any("each forecast from kernels alone" in line for line in describe(few))


def test_what_failed_or_cannot_be_forecast_takes_no_part(curves: HardwareProfile, profile: HardwareProfile) -> None:
    done = trained(curves, TRUTH)
    first = next(iter(done))
    done[first] = {"skipped": "the machine caught fire"}
    done[Task("matmul", "nt", "fp32", (1, 1, 1)).key(1)] = {"work": 2.0, "seconds": [1.0]}
    left = with_steps(curves, done)
    assert len({(p.name, p.workers) for p in left.steps}) == len(CPU_JOBS) * 2 - 1
    kinds = ("matmul", "attention", "bandwidth")
    in_fp32: dict[str, Any] = {kind: tuple(p for p in getattr(curves, kind) if p.dtype != "bf16") for kind in kinds}
    no_bf16 = replace(curves, **in_fp32)
    left = with_steps(no_bf16, trained(curves, TRUTH, ("gpt", "llama bf16")))
    assert {p.name for p in left.steps} == {"gpt"}


def test_small_parts_are_left_out(curves: HardwareProfile) -> None:
    done = {Task("step", "gpt", "fp32").key(1): result(1.0, {"forward": 0.5, "backward": 0.47, "optimizer": 0.03})}
    assert {p.part for p in with_steps(curves, done).steps} == {"forward", "backward", "step"}


def test_steps_survive_their_file(profile: HardwareProfile, tmp_path: Path) -> None:
    again = load_profile(save_profile(profile, tmp_path / "p.json"))
    assert again.steps == profile.steps and again.stacks == profile.stacks
    assert predict(job(again), again).step_s == predict(job(profile), profile).step_s
    lines = describe(again)
    assert any(line.startswith("steps of 16 small jobs, each forecast from the others: off by") for line in lines)
    assert any(line.startswith("training beside lone kernels, 2 at once: matmul 0.") for line in lines)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stacks": [{"workers": 1, "constants": {"matmull": 0.9}}]}, "stacks: constant is 'matmull'"),
        ({"steps": [{"name": "gpt", "part": "step", "seconds": 0.0, "forecast_s": 1.0}]}, "seconds is 0.0; allowed: a number > 0"),
        ({"steps": [{"name": "gpt", "part": "step", "seconds": 1.0}]}, "has no 'forecast_s'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(profile: HardwareProfile, change: dict[str, Any], sentence: str) -> None:
    data = json.loads(json.dumps(profile_to_dict(profile))) | change
    with pytest.raises(InputError) as caught:
        profile_from_dict(data)
    assert sentence in str(caught.value)


def test_jobs_are_planned_where_they_can_run() -> None:
    def names(device: str, workers: int, dtypes: tuple[str, ...] = ("fp32", "bf16"), **more: Any) -> list[str]:
        return [t.name for t in tasks_for(device, workers, dtypes, "full", **more) if t.kind == "step"]  # type: ignore[arg-type]

    assert names("cpu", 1) == names("cpu", 2) == list(CPU_JOBS)
    assert names("cpu", 4, steps=False) == []
    assert names("cuda", 1) == list(CUDA_JOBS) and names("cuda", 2) == []
    assert names("cpu", 1, ("fp32",)) == [name for name, small in CPU_JOBS.items() if small.dtype == "fp32"]
    mixed = [t.kind for t in tasks_for("cpu", 1, ("fp32",), "full") if not t.essential]
    assert "step" in mixed[: len(mixed) // 3], "a spent budget leaves some"


def test_jobs_are_like_those_of_no_suite() -> None:
    ours = {(s.width, s.seq_len) for device in ("cpu", "cuda") for s in jobs_of(device).values()}
    theirs = set()
    for name in suite_names():
        for combination in load_suite(name).combinations if "kernels" not in name else ():
            model = catalog.model(combination["model"]) if combination.get("model") in catalog.model_names() else None
            theirs |= {(model.d_model, combination.get("seq_len"))} if model is not None else set()
    assert theirs and not ours & theirs


def test_every_job_of_a_gpu_fits_one_of_80_gb() -> None:
    gpu = catalog.gpu("h100-sxm")
    for name, small in CUDA_JOBS.items():
        assert predict(small.job(1, gpu, None)).fits, name


def test_layouts_of_products_are_told_apart(curves: HardwareProfile) -> None:
    assert curves.gpu is not None
    plain = [p for p in curves.matmul if p.workers == 1 and p.layout == "nt" and p.dtype == "fp32"]
    slow = [
        p._replace(layout=layout, flops_per_s=p.flops_per_s / by)
        for p in plain
        for layout, by in (("nn", 2), ("tn", 4))
    ]
    timer = OperatorTimer(curves.gpu, replace(curves, matmul=(*plain, *slow)))
    p = plain[0]
    seconds = [
        timer._measured(Op(name, "matmul", False, "fp32", 2.0 * p.m * p.n * p.k, 1, (1, p.m, p.n, p.k)))
        for name in ("linear", "linear_dgrad", "linear_wgrad")
    ]
    assert [round(s / seconds[0], 6) for s in seconds] == [1.0, 2.0, 4.0]


def test_constants_are_fields_of_the_stack(profile: HardwareProfile) -> None:
    assert [p.workers for p in profile.stacks] == [1, 2]
    assert all(p.constants.keys() == asdict(LONE).keys() for p in profile.stacks)


def round_of(device: str, gpu: Gpu | None = None) -> Round:
    return Round(1, 1, device, "", [], 0.0, 0.0, None, gpu)


def test_a_worker_trains_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MEASURED_STEPS", 2)
    monkeypatch.setattr(steps, "WARMUP_STEPS", 1)
    monkeypatch.setitem(CPU_JOBS, "narrow", CPU_JOBS["narrow"]._replace(layers=1))
    found, lost = worker._train(Task("step", "narrow", "fp32"), round_of("cpu"), 0)
    assert not lost and len(found["seconds"]) == 2
    assert (
        sum(found["parts"].values()) <= max(found["seconds"])
        and found["parts"]["backward"] > found["parts"]["optimizer"] > 0
    )


def test_on_a_gpu_it_trains_the_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run_session(job: Job, device: str, options: SessionOptions, *, rank: int) -> Measurement:
        seen.append((job.cluster.gpu.name, job.cluster.n_gpus, job.strategy.kernels_off, device, options.track_memory))
        return Measurement(step_seconds=(1.0, 2.0), part_seconds={"forward": 0.5})

    monkeypatch.setattr(session, "run_session", run_session)
    monkeypatch.setattr(worker, "_recover", lambda device: True)
    found, lost = worker._train(Task("step", "llama long", "bf16"), round_of("cuda", catalog.gpu("h200")), 0)
    assert found == {"work": 1.0, "seconds": [1.0, 2.0], "parts": {"forward": 0.5}} and not lost
    assert seen == [("h200", 1, (), "cuda", False)]


def test_a_job_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_session(*args: Any, **more: Any) -> Measurement:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(session, "run_session", run_session)
    found, lost = worker._train(Task("step", "gpt", "fp32"), round_of("cpu"), 0)
    assert found == {"skipped": "CUDA out of memory. Tried to allocate 2.00 GiB"} and not lost


def test_a_gpus_jobs_tell_its_constants() -> None:
    """Curves of one rate everywhere, and steps that take what ``truth`` makes of them; the narrow job waits for the host."""
    gpu, truth = catalog.gpu("h200"), Stack(matmul=0.85, memory=0.8, issue_s=2e-5)
    done: dict[str, dict[str, Any]] = {}
    rates = {"matmul": 6e14, "attention": 4e14, "bandwidth": 3e12, "copy": 5e10}
    for task in tasks_for("cuda", 1, ("bf16", "fp32"), "full"):
        if task.kind in rates:
            work = (
                2.0 * prod(task.sizes) if task.kind == "matmul" else 1e12 if task.kind == "attention" else task.sizes[0]
            )
            done[task.key(1)] = {"work": work, "seconds": [work / rates[task.kind] + 2e-6] * 3}
    for name, seconds in (("op", 3e-6), ("autograd_op", 4e-6), ("adam", 1e-9), ("memory", 1e-11)):
        done[Task("host", name, "fp32").key(1)] = {"work": 1.0, "seconds": [seconds] * 3}
    plain = build_profile(done, 16, gpu)
    for name, small in CUDA_JOBS.items():
        parts = Forecasts(small.job(1, gpu, plain.host), plain).of(truth)
        done[Task("step", name, small.dtype).key(1)] = result(parts["step"], parts)
    profile = with_steps(plain, done)
    assert {p.name for p in profile.steps} == set(CUDA_JOBS)
    for name in ("matmul", "memory", "issue_s"):
        assert profile.stacks[0].constants[name] == pytest.approx(getattr(truth, name), rel=0.1), name
    other = build_job(JobOptions(model="llama-3.2-1b", gpu="h200", gpus=1, zero=0, seq_len=2048))
    expected = Forecasts(other, plain).of(truth)["step"]
    forecast = predict(other, profile)
    assert forecast.step_s == pytest.approx(expected, rel=0.02)
    assert any("constants of 8 small jobs trained on this machine" in note for note in forecast.notes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_calibration_trains_them_and_goes_on_where_it_was(tmp_path: Path) -> None:
    from validator.calibrate import calibrate

    out = tmp_path / "cpu.json"

    class Enough(Exception):
        pass

    seen: list[str] = []

    def until_a_job(what: str, done: int, planned: int) -> None:
        seen.append(what)
        if what.startswith("step"):
            raise Enough

    with pytest.raises(Enough):
        calibrate("cpu", 60, out, until_a_job, workers=(1, 2))
    again: list[str] = []
    made = calibrate("cpu", 60, out, lambda what, *_: again.append(what), workers=(1, 2))
    assert seen[-1] not in again, "what was trained is kept"
    assert len({(p.name, p.workers) for p in made.steps}) >= FEWEST and made.stacks
    forecast = predict(job(made), load_profile(out))
    assert any("small jobs trained on this machine" in note for note in forecast.notes)
