"""``calibrate`` on this machine: a short real measurement, its file, interruption and refusals."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from estimator.errors import InputError  # noqa: E402
from estimator.ops.operator import Op  # noqa: E402
from estimator.time.operators import OperatorTimer  # noqa: E402
from estimator.time.profile import HardwareProfile, profile_for  # noqa: E402
from estimator.time.profile_file import load_profile, profile_to_dict  # noqa: E402
from validator.calibrate import calibrate, describe  # noqa: E402

TREE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def profile(folder: Path) -> HardwareProfile:
    """One quick calibration of one and of two processes, written to ``folder/cpu.json``."""
    seen: list[tuple[str, int, int]] = []
    result = calibrate(
        "cpu", 3.0, folder / "cpu.json", lambda *a: seen.append(a), workers=(1, 2), effort="quick", nvme=folder
    )  # fmt: skip
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1)), "progress counts every point"
    assert all(done <= planned for _, done, planned in seen)
    return result


def test_it_measures_what_a_forecast_needs(profile: HardwareProfile) -> None:
    assert {(p.dtype, p.workers) for p in profile.matmul} == {(d, w) for d in ("fp32", "bf16") for w in (1, 2)}
    assert {p.direction for p in profile.attention} == {"forward", "backward"}
    assert {(p.op, p.group_size) for p in profile.collectives} >= {("all_gather", 2), ("all_reduce", 2)}
    assert {p.workers for p in profile.host_points} == {1, 2}
    assert profile.versions["torch"] == torch.__version__
    assert profile.gpu is not None and profile.gpu.arch == "cpu" and profile.gpu.memory_bytes > 1 << 28


def test_what_is_missing_is_said(profile: HardwareProfile) -> None:
    assert "tf32 and fp8 products, kernel launches, segments, copies both ways" in profile.skipped
    assert "files" not in profile.skipped, "a folder was given"
    lines = describe(profile)
    assert lines[0].startswith("cpu on ") and any(line.startswith("products: bf16 ") for line in lines)
    assert [line for line in lines if line.startswith("all_reduce of 2: ")]
    assert sum(line.startswith("not measured: ") for line in lines) == len(profile.skipped)


def test_its_file_is_the_profile_and_nothing_else_is_left(profile: HardwareProfile, folder: Path) -> None:
    assert profile_to_dict(load_profile(folder / "cpu.json")) == profile_to_dict(profile)
    assert [p.name for p in folder.iterdir()] == ["cpu.json"]
    assert not multiprocessing.active_children()


def test_forecasts_read_it(profile: HardwareProfile) -> None:
    assert profile.gpu is not None
    chosen, _ = profile_for(profile.gpu, profile)
    assert chosen is profile
    timer = OperatorTimer(profile.gpu, chosen, 1)

    def seconds(n: int) -> float:
        return timer.seconds(Op("mm", "matmul", False, "fp32", 2.0 * n**3, 12 * n * n, (1, n, n, n)))

    rates = [p.flops_per_s for p in profile.matmul if p.workers == 1 and p.dtype == "fp32"]
    assert 2.0 * 1024**3 / max(rates) <= seconds(1024) <= 2.0 * 1024**3 / min(rates)
    point = next(p for p in profile.matmul if p.workers == 1 and p.dtype == "fp32")
    again = timer.seconds(
        Op("mm", "matmul", False, "fp32", 2.0 * point.m * point.n * point.k, 0, (1, point.m, point.n, point.k))
    )
    assert again == pytest.approx(2.0 * point.m * point.n * point.k / point.flops_per_s)


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, planned: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    out = tmp_path / "cpu.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate("cpu", 1.0, out, interrupt, workers=(1,), effort="quick")
    assert not out.exists() and not multiprocessing.active_children()
    kept = json.loads((tmp_path / "cpu.json.partial").read_text())["done"]
    assert len(kept) == 4
    first: list[int] = []
    calibrate("cpu", 1.0, out, lambda what, done, planned: first.append(done), workers=(1,), effort="quick")
    assert first[0] == 5, "measured points are not measured again"
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.slow
def test_a_point_that_kills_its_process_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    def shoot(what: str, done: int, planned: int) -> None:
        if done == 6:
            multiprocessing.active_children()[0].kill()

    profile = calibrate("cpu", 1.0, tmp_path / "cpu.json", shoot, workers=(1,), effort="quick")
    killed = {what: why for what, why in profile.skipped.items() if "exit code" in why}
    assert list(killed.values()) == ["its process ended with exit code -9"]
    assert profile.host_points and profile.copies
    assert not multiprocessing.active_children()


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_calibration_goes_on_and_leaves_no_process_behind(tmp_path: Path) -> None:
    out, partial = tmp_path / "cpu.json", tmp_path / "cpu.json.partial"
    command = ["zerocast", "calibrate", "--workers", "1", "--effort", "quick", "--budget", "60", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(TREE), "ZEROCAST_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, "-m", *command, str(out)], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        until(partial.exists, 120)
        left_behind = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = json.loads(partial.read_text())
    assert kept["done"] and kept["machine"]["torch"] and not out.exists()
    assert left_behind, "a worker was at it"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left_behind), 60)
    first: list[int] = []
    profile = calibrate(
        "cpu", 1.0, out, lambda what, done, planned: first.append(done), workers=(1,), effort="quick"
    )  # fmt: skip
    assert first[0] == len(kept["done"]) + 1, "measured points are not measured again"
    assert profile.matmul and not partial.exists()


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_points_of_another_torch_are_not_mixed_in(tmp_path: Path) -> None:
    machine = {"device": "cpu", "torch": "1.0"}
    partial = {"format": "zerocast-calibration-partial", "machine": machine, "done": {"[]": {"skipped": "x"}}}
    (tmp_path / "cpu.json.partial").write_text(json.dumps(partial))
    profile = calibrate("cpu", 0.5, tmp_path / "cpu.json", workers=(1,), effort="quick")
    assert any("1 points of an interrupted calibration were dropped" in note for note in profile.notes)
    assert "torch '1.0' instead of" in " ".join(profile.notes)


def test_a_corrupt_partial_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpu.json.partial").write_text("{")
    with pytest.raises(InputError, match="not a calibration in progress"):
        calibrate("cpu", 1.0, tmp_path / "cpu.json", workers=(1,), effort="quick")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "tpu"}, "device"),
        ({"budget_s": 0}, "budget_s"),
        ({"dtypes": ("bf61",)}, "did you mean 'bf16'"),
        ({"workers": (0,)}, "workers"),
        ({"effort": "quik"}, "did you mean 'quick'"),
        ({"nvme": "/nowhere/at/all"}, "nvme is '/nowhere/at/all'"),
        ({"nccl_tests": ("/nowhere/at/all",)}, "cannot be read"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(InputError, match="sees no GPU"):
        calibrate("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the cuda path has not been run here")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    from estimator import catalog

    gpu = catalog.gpu("h200")
    profile = calibrate("cuda", 5.0, tmp_path / "gpu.json", effort="quick", gpu=gpu, dtypes=("bf16",))
    assert profile.matmul and profile.copies and profile.gpu == gpu
    assert profile.host is not None and profile.host.memory_bytes_per_s < gpu.memory_bytes_per_s
