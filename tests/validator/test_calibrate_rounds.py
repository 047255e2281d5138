"""Rounds of a calibration on GPUs, with the processes that would measure replaced: order, deaths, the profile they make."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from estimator import catalog  # noqa: E402
from estimator.errors import InputError  # noqa: E402
from estimator.job.options import JobOptions, build_job  # noqa: E402
from estimator.predict import predict  # noqa: E402
from estimator.time.profile_file import load_profile  # noqa: E402
from validator import calibrate as package  # noqa: E402
from validator.calibrate import calibrate, describe  # noqa: E402
from validator.calibrate.partial import Partial  # noqa: E402
from validator.calibrate.tasks import Task  # noqa: E402
from validator.calibrate.worker import CONTEXT_LOST, Round  # noqa: E402

Outcome = Callable[[Task], dict | int]


def result_of(task: Task) -> dict:
    """A result whose rate is 1 G per second."""
    return {"work": 1e6, "seconds": [1e-3] * 3}


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Round]]:
    """Replaces processes by ``outcome``: a task's result, or the exit code of the process that it kills."""

    def install(n_gpus: int, outcome: Outcome = result_of) -> list[Round]:
        seen: list[Round] = []

        def run_processes(this: Round, partial: Partial, tell: Callable[[str], None]) -> int | None:
            seen.append(this)
            for task in this.tasks:
                result = outcome(task)
                if result == CONTEXT_LOST:  # the worker says so before it ends
                    partial.add(task.key(this.workers), {"skipped": "an illegal memory access was encountered"})
                if isinstance(result, int):
                    return result
                partial.add(task.key(this.workers), result)
                tell(task.key(this.workers))
            return None

        monkeypatch.setattr(package, "_require_cuda", lambda gpu: n_gpus)
        monkeypatch.setattr(package, "_run_processes", run_processes)
        return seen

    return install


def test_one_gpu(processes: Callable[..., list[Round]], tmp_path: Path) -> None:
    rounds = processes(1)
    started = time.monotonic()
    profile = calibrate("cuda", out=tmp_path / "p.json", gpu=catalog.gpu("h100-sxm"))
    assert [r.workers for r in rounds] == [1]
    assert rounds[0].deadline == pytest.approx(started + 240, abs=5), "four minutes, the start included"
    assert {p.dtype for p in profile.matmul} == {"bf16", "fp16", "fp32", "tf32", "fp8"}
    assert {p.direction for p in profile.copies} == {"h2d", "d2h", "both", "d2d"}
    assert profile.skipped == {
        "files": "no folder was given to read and write in",
        "collectives": "this machine has one GPU",
    }
    again = load_profile(tmp_path / "p.json")
    forecast = predict(build_job(JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=8)), again)
    assert forecast.step_s is not None and forecast.step_s > 0
    text = "\n".join(describe(again))
    assert "copies, host to device: pinned 1 GB/s, pageable 1 GB/s" in text
    assert "copies, within the device: up to 1 GB/s" in text


def test_several_gpus_get_rounds_of_collectives(processes: Callable[..., list[Round]]) -> None:
    rounds = processes(4)
    started = time.monotonic()
    profile = calibrate("cuda", 200.0, gpu=catalog.gpu("h100-sxm"))
    assert [r.workers for r in rounds] == [1, 2, 4]
    assert [r.deadline - started for r in rounds] == pytest.approx([150, 175, 200], abs=5)
    assert {t.kind for r in rounds[1:] for t in r.tasks} == {"collective"}
    assert {p.group_size for p in profile.collectives} == {2, 4}
    assert {p.op for p in profile.collectives} == {
        "all_gather",
        "reduce_scatter",
        "all_reduce",
        "all_to_all",
        "send_recv",
    }
    with pytest.raises(InputError, match=r"workers is \(1, 8\); allowed: 1 and up to 4, the number of GPUs"):
        calibrate("cuda", gpu=catalog.gpu("h100-sxm"), workers=(1, 8))


def test_a_task_that_ruins_the_gpus_context_is_left_out_and_new_processes_go_on(
    processes: Callable[..., list[Round]],
) -> None:
    rounds = processes(1, lambda task: CONTEXT_LOST if task.name == "tn" and task.sizes[2] == 8192 else result_of(task))
    profile = calibrate("cuda", gpu=catalog.gpu("h100-sxm"), dtypes=("bf16",))
    assert [r.workers for r in rounds] == [1, 1]
    assert len(rounds[1].tasks) < len(rounds[0].tasks)
    assert profile.skipped["matmul tn 1024x1024x8192 bf16"] == "an illegal memory access was encountered"
    assert {p.layout for p in profile.matmul} == {"nt", "nn", "tn"}


def test_processes_that_always_die_end_it(processes: Callable[..., list[Round]]) -> None:
    rounds = processes(1, lambda task: -11)
    with pytest.raises(RuntimeError, match="ended 6 times, the last with exit code -11"):
        calibrate("cuda", gpu=catalog.gpu("h100-sxm"))
    assert len(rounds) == 6


def test_no_attention_kernel_is_said_where_it_is_missed(processes: Callable[..., list[Round]]) -> None:
    reason = "FlashAttention only supports Ampere GPUs or newer."
    processes(1, lambda task: {"skipped": reason} if task.kind == "attention" else result_of(task))
    with pytest.raises(InputError, match=f"no usable attention.*{reason}"):
        calibrate("cuda", gpu=catalog.gpu("v100-32"))
