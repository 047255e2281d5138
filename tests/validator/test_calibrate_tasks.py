"""Single tasks of ``calibrate``: what is planned, how it is prepared and timed, what is skipped, what a profile says."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from estimator.errors import InputError  # noqa: E402
from estimator.time.profile_file import load_profile, save_profile  # noqa: E402
from estimator.units import GIB, MIB  # noqa: E402
from runtime import functional  # noqa: E402
from validator.calibrate import files, host, measure, products, sizes, worker  # noqa: E402
from validator.calibrate.build import build_profile, left_out  # noqa: E402
from validator.calibrate.describe import describe  # noqa: E402
from validator.calibrate.partial import Partial  # noqa: E402
from validator.calibrate.prepared import Prepared, Skip  # noqa: E402
from validator.calibrate.room import fitted, needed_bytes  # noqa: E402
from validator.calibrate.tasks import Task, task_of, tasks_for  # noqa: E402
from validator.kernels.table import KERNELS  # noqa: E402


def all_tasks(device: str, effort: str = "full") -> list[Task]:
    dtypes = ("bf16", "fp16", "fp32")
    return tasks_for(device, 1, dtypes, effort, cores=6, files=True)  # type: ignore[arg-type]


# ---- what is planned ----------------------------------------------------------------------------------------------


def test_a_gpu_is_measured_in_everything_that_a_step_does() -> None:
    tasks = all_tasks("cuda")
    matmul = [t for t in tasks if t.kind == "matmul"]
    assert {t.dtype for t in matmul} == {"bf16", "fp16", "fp32", "tf32", "fp8"}
    assert {t.name for t in matmul} == {"nt", "nn", "tn"}
    assert any(min(t.sizes) <= 64 for t in matmul) and any(t.sizes[1] % 8 for t in matmul), "skinny and odd shapes"
    attention = [t for t in tasks if t.kind == "attention"]
    assert len({t.sizes[0] for t in attention}) >= 6 and len({t.sizes[3] for t in attention}) >= 4
    assert {t.sizes[1] // t.sizes[2] for t in attention} >= {1, 4, 8}, "grouped key/value heads"
    kernels = {(t.name, t.backward) for t in tasks if t.kind == "bandwidth"}
    asked = {(k.name, k.backward) for k in KERNELS if k.name not in sizes.UNUSED_KERNELS}
    assert kernels == asked, "every kernel of the table that a forecast asks for"
    on_cpu = {(t.name, t.backward) for t in all_tasks("cpu") if t.kind == "bandwidth"}
    assert asked - on_cpu == {("sgd", False)}, "a CPU's steps are forecast by the rate of fused Adam"
    copies = {(t.name, t.pinned) for t in tasks if t.kind == "copy"}
    ways = {(name, pinned) for name in ("h2d", "d2h", "both") for pinned in (True, False)}
    assert copies == ways | {("d2d", True)}
    assert {t.sizes[0] for t in tasks if t.kind == "optimizer"} == {1, 2, 4, 6}
    assert {t.name for t in tasks if t.kind == "overhead"} == {"launch", "kernel", "cached_alloc", "segment_alloc"}
    assert {t.name for t in tasks if t.kind == "file"} == {"read", "write", "checksum", "commit"}
    assert len({t.sizes[:2] for t in tasks if t.kind == "file"}) >= 9, "block sizes x queues"
    assert not [t for t in tasks if t.kind == "collective"]
    both = tasks_for("cuda", 2, ("bf16",), "full")
    assert {t.kind for t in both} == {"collective"} and len({t.name for t in both}) == 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("effort", ["quick", "full"])
def test_every_dtype_has_its_indispensable_points_first(device: str, effort: str) -> None:
    tasks = all_tasks(device, effort)
    flags = [t.essential for t in tasks]
    assert flags == sorted(flags, reverse=True)
    assert len({t.key(1) for t in tasks}) == len(tasks)
    essential = [t for t in tasks if t.essential]
    for kind in ("matmul", "attention", "bandwidth"):
        assert {t.dtype for t in essential if t.kind == kind} >= {"bf16", "fp16", "fp32"}, kind
    assert {t.name for t in essential if t.kind == "host"} >= {"op", "autograd_op", "adam"}
    for task in tasks:
        assert task_of(task.key(3)) == (3, task._replace(essential=False))


# ---- preparing and timing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_layouts_are_the_products_of_training(layout: str) -> None:
    prepared = products.prepare_matmul(Task("matmul", layout, "fp32", (6, 10, 4)), "cpu")
    assert prepared.work == 2 * 6 * 10 * 4
    out = prepared.call()
    assert out.shape == (6, 10)
    torch.testing.assert_close(out, torch.full((6, 10), 4 * 0.01 * 0.01))


def test_fp8_multiplies_and_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("matmul", "nt", "fp8", (32, 48, 64))
    with pytest.raises(Skip, match="a CPU has no fp8 products"):
        products.prepare_matmul(task, "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(Skip, match=r"fp8 needs compute capability 8\.9, this GPU has 8\.0"):
        products.prepare_matmul(task, "cuda")
    monkeypatch.setattr(products, "_require_capability", lambda *_: None)
    out = products.prepare_matmul(task, "cpu").call()  # this torch multiplies fp8 on CPUs too
    assert out.shape == (32, 48) and out.dtype == torch.bfloat16
    with pytest.raises(Skip, match="multiples of 16"):
        products.prepare_matmul(task._replace(sizes=(32, 48, 60)), "cpu")


@pytest.mark.parametrize("backward", [False, True])
def test_attention_is_the_runtimes(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q: Any, k: Any, v: Any) -> Any:
        seen.append((tuple(q.shape), tuple(k.shape)))
        return real(q, k, v)

    real = functional.attention
    monkeypatch.setattr(functional, "attention", spy)
    name = "backward" if backward else "forward"
    prepared = measure.prepare(Task("attention", name, "bf16", (1024, 8, 2, 32), backward), "cpu")
    prepared.call()
    assert set(seen) == {((2, 1024, 8, 32), (2, 1024, 2, 32))}
    assert prepared.work == (2.5 if backward else 1) * 4 * 2 * 8 * 32 * 1024 * 1025 / 2


def test_the_offloaded_step_runs_on_its_threads_and_gives_them_back() -> None:
    threads = torch.get_num_threads()
    prepared = measure.prepare(Task("optimizer", "step", "bf16", (1, 1 << 16)), "cpu")
    assert torch.get_num_threads() == 1 and prepared.work == 1 << 16
    prepared.call()
    assert prepared.after is not None
    prepared.after()
    assert torch.get_num_threads() == threads


class FakeGpu:
    """A stream whose clock goes on by what is queued: ``call`` takes ``call_s``, holding it takes what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call_s: float) -> None:
        self.now = 0.0
        self.call_s = call_s
        self.calls = 0
        self.held = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.hold)

    def hold(self, cycles: int) -> None:
        self.held += 1
        self.now += cycles / 1e9

    def call(self) -> None:
        self.calls += 1
        self.now += self.call_s


def test_short_kernels_are_timed_many_in_a_row_behind_a_held_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, call_s=3e-6)
    seconds = measure.time_task(Prepared(gpu.call, 1.0), "cuda", 0.01, int)
    assert 3 <= len(seconds) <= 25
    assert seconds == pytest.approx([3e-6] * len(seconds)), "device seconds of one call, the hold not among them"
    assert gpu.held == len(seconds) + 2, "for the two that are not timed as well"
    assert gpu.calls >= 50 * len(seconds)


def test_what_a_call_uses_up_is_made_again_before_the_stream_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, call_s=3e-6)
    made: list[int] = []
    seconds = measure.time_task(Prepared(gpu.call, 1.0, before=lambda: made.append(1)), "cuda", 0.001, int)
    assert seconds == pytest.approx([3e-6] * len(seconds)) and len(seconds) >= 3
    assert len(made) == gpu.calls, "once for every call, timed or not"


def test_host_timed_tasks_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, call_s=3e-6)
    assert measure.time_task(Prepared(gpu.call, 1.0, on_host=True), "cuda", 0.01, int)
    assert gpu.held == 0


# ---- whatever goes wrong ------------------------------------------------------------------------------------------


def round_of(device: str, folder: Path | None = None) -> worker.Round:
    return worker.Round(1, 1, device, "", [], 0.0, 0.0, folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_every_kind_of_gpu_task_gets_as_far_as_cuda_and_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.gc, "collect", lambda: 0)  # thirty of them take long
    one_each = {(t.kind, t.name, t.dtype in ("tf32", "fp8"), t.pinned): t for t in all_tasks("cuda", "quick")}
    on_gpu = [t for t in one_each.values() if t.kind not in ("file", "optimizer") and t.name not in ("adam", "memory")]
    assert len(on_gpu) >= 20
    for task in on_gpu:
        result, lost = worker._measure(task, round_of("cuda"), "cuda", 0.004, int, 80 * GIB)
        assert set(result) == {"skipped"} and lost, task
        said = result["skipped"].lower()
        assert "cuda" in said or "nvidia" in said or "accelerator" in said, (task, said)


def test_an_error_of_one_task_is_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    after = []

    def burst() -> None:
        raise RuntimeError("kernel burst into flames over Dresden\nand more lines")

    monkeypatch.setattr(measure, "prepare", lambda *_: Prepared(burst, 1.0, after=lambda: after.append(1)))
    result, lost = worker._measure(Task("matmul", "nt", "fp32", (8, 8, 8)), round_of("cpu"), "cpu", 0.004, int, GIB)
    assert result == {"skipped": "kernel burst into flames over Dresden"} and not lost
    assert after == [1], "what preparing changed is put back"


def test_memory_that_runs_out_is_tried_again_once_caches_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def prepare(*_: Any) -> Prepared:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return Prepared(lambda: None, 5.0)

    monkeypatch.setattr(measure, "prepare", prepare)
    task = Task("matmul", "nt", "fp32", (8, 8, 8))
    result, _ = worker._measure(task, round_of("cpu"), "cpu", 0.004, int, GIB)
    assert len(tries) == 2 and result["work"] == 5.0 and result["seconds"]
    tries[:] = [1, 1]
    monkeypatch.setattr(
        measure, "prepare", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    )
    result, _ = worker._measure(task, round_of("cpu"), "cpu", 0.004, int, GIB)
    assert result == {"skipped": "CUDA out of memory. Tried"}


def test_sizes_shrink_until_they_fit() -> None:
    copy = Task("copy", "h2d", "fp32", (512 * MIB,))
    assert fitted(copy, 80 * GIB) == copy
    assert fitted(copy, 600 * MIB) == copy._replace(sizes=(256 * MIB,))  # 2 x 256 MiB of 0.9 x 600
    assert fitted(copy, 1000) is None
    product = fitted(Task("matmul", "nt", "bf16", (8192, 28672, 8192)), GIB)
    assert product is not None and product.sizes[0] == 8192 and product.sizes[1] < 28672
    for task in all_tasks("cuda"):
        smaller = fitted(task, GIB)
        assert smaller is None or needed_bytes(smaller) <= 0.9 * GIB


def test_a_smaller_size_is_what_the_profile_says(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("bandwidth", "add", "fp32", (3 << 30,))
    result, _ = worker._measure(task, round_of("cpu"), "cpu", 0.3, int, 64 * MIB)
    assert result["sizes"] == [12 << 20]  # 3 GiB halved eight times: 3 x 12 MiB of 0.9 x 64
    assert result["work"] == pytest.approx(12 << 20, rel=0.01)
    profile = build_profile({**results(), task.key(1): result}, 2, None)
    assert any(p.bytes == int(result["work"]) for p in profile.bandwidth)
    assert "1 points were taken at smaller sizes" in profile.notes[0]


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_file_is_kept() -> Any:
    yield
    files._scratch.cache_clear()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
@pytest.mark.parametrize("way", ["read", "write", "checksum"])
def test_files_are_read_and_written_directly(way: str, tmp_path: Path) -> None:
    task = Task("file", way, "fp32", (64 << 10, 2, 1 << 20))
    try:
        prepared = measure.prepare(task, "cpu", tmp_path)
    except Skip as reason:
        pytest.skip(str(reason))
    prepared.call()
    prepared.call()
    assert prepared.work == 256 * (64 << 10) and prepared.on_host
    assert list(tmp_path.iterdir()) == [], "the file has no name: nothing is left of it"
    assert prepared.after is not None
    prepared.after()


def test_a_version_is_committed_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "file_system", lambda folder: "ext4")
    prepared = measure.prepare(Task("file", "commit", "fp32", (64 << 10, 1, 1 << 20)), "cpu", tmp_path)
    assert prepared.work == 1 and prepared.on_host and prepared.before is not None and prepared.after is not None
    for number in range(3):
        prepared.before()
        prepared.call()
        (folder,) = tmp_path.iterdir()
        versions = json.loads((folder / "commit.json").read_text().split("\n", 1)[1])["versions"]
        assert versions[-1]["number"] == number and len(versions[-1]["checksums"][0]) == 8 * files._COMMIT_BLOCKS
    prepared.after()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files, "file_system", lambda folder: "tmpfs")
    with pytest.raises(Skip, match="on tmpfs, which is memory"):
        measure.prepare(Task("file", "commit", "fp32", (64 << 10, 1, 1 << 20)), "cpu", tmp_path)


def test_a_file_system_that_refuses_direct_access_is_skipped_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = []

    def refuse(path: Any, flags: int, mode: int = 0) -> int:
        flags_seen.append(flags)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "O_DIRECT", 1 << 14, raising=False)
    monkeypatch.setattr(files, "file_system", lambda folder: "vfat")
    monkeypatch.setattr(os, "open", refuse)
    task = Task("file", "read", "fp32", (4096, 1, 1 << 20))
    result, _ = worker._measure(task, round_of("cpu", tmp_path), "cpu", 0.01, int, GIB)
    assert result == {"skipped": f"the file system (vfat) of {str(tmp_path)!r} refuses direct access: Invalid argument"}
    assert flags_seen[0] & os.O_DIRECT


def test_memory_is_no_disk_and_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "file_system", lambda folder: "tmpfs")
    with pytest.raises(Skip, match="on tmpfs, which is memory"):
        files._scratch(tmp_path, 4096)
    monkeypatch.setattr(files, "file_system", lambda folder: "ext4")
    with pytest.raises(Skip, match=r"free, the file needs 1024\.00 TiB"):
        files._scratch(tmp_path, 1 << 50)


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nvme is .*allowed: a folder that exists"):
        files.require_folder(tmp_path / "none")
    assert files.require_folder(tmp_path) == tmp_path
    if sys.platform.startswith("linux"):
        assert files.file_system(Path("/proc")) == "proc"


# ---- the profile --------------------------------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    """One result of each kind, with numbers that are easy to check: two seconds a call, three repeats."""
    found = {}
    for task, work in (
        (Task("matmul", "nt", "fp32", (4, 5, 6)), 240.0),
        (Task("matmul", "tn", "bf16", (4, 5, 6)), 240.0),
        (Task("attention", "forward", "fp32", (128, 8, 2, 64)), 100.0),
        (Task("bandwidth", "swiglu", "fp32", (4096,), True), 4000.0),
        (Task("copy", "h2d", "fp32", (4096,)), 4096.0),
        (Task("copy", "both", "fp32", (4096,), pinned=False), 4096.0),
        (Task("host", "adam", "fp32"), 1000.0),
        (Task("host", "op", "fp32"), 100.0),
        (Task("host", "autograd_op", "fp32"), 100.0),
        (Task("optimizer", "step", "bf16", (2, 64)), 64.0),
        (Task("file", "read", "fp32", (4096, 4, 1 << 20)), 8192.0),
        (Task("file", "checksum", "fp32", (4096, 1, 1 << 20)), 4096.0),
        (Task("file", "commit", "fp32", (4096, 1, 1 << 20)), 1.0),
        (Task("overhead", "segment_alloc", "fp32", (MIB,)), 1.0),
        (Task("overhead", "launch", "fp32", (0,)), 400.0),
    ):
        found[task.key(1)] = {"work": work, "seconds": [1.0, 2.0, 3.0]}
    return found


def test_points_of_a_profile(tmp_path: Path) -> None:
    profile = build_profile(results(), 2, None, skipped={"files": "x"})
    assert [(p.layout, p.dtype, p.m, p.n, p.k, p.flops_per_s) for p in profile.matmul] == [
        ("nt", "fp32", 4, 5, 6, 120.0), ("tn", "bf16", 4, 5, 6, 120.0),
    ]  # fmt: skip
    assert profile.attention[0][:5] == ("fp32", "forward", 128, 64, 50.0)
    assert (profile.attention[0].n_heads, profile.attention[0].n_kv_heads) == (8, 2)
    assert profile.bandwidth[0][:5] == ("gated_activation", "fp32", 4000, 2000.0, True)
    assert [p[:4] for p in profile.copies] == [("h2d", 4096, 2048.0, True), ("both", 4096, 2048.0, False)]
    assert profile.host_points[0].adam_elements_per_s == 500.0
    assert profile.optimizer_steps[0][:3] == (2, "bf16", 32.0)
    assert [p[:4] for p in profile.files] == [("read", 4096, 4, 4096.0), ("checksum", 4096, 1, 2048.0)]
    assert [p[:3] for p in profile.overheads] == [("commit", 2.0, 0), ("segment_alloc", 2.0, MIB), ("launch", 0.005, 0)]
    assert profile.files[0].spread == 0.5 and profile.spread["file"] == 0.5
    assert profile.versions["torch"] == torch.__version__
    save_profile(profile, tmp_path / "p.json")
    again = load_profile(tmp_path / "p.json")
    for kind in ("matmul", "attention", "copies", "optimizer_steps", "files", "overheads"):
        assert getattr(again, kind) == getattr(profile, kind)
    assert dict(again.skipped) == {"files": "x"}
    text = "\n".join(describe(again))
    for words in (
        "4.1 kB/s in blocks of 4.00 KiB, 4 at once",
        "copies, both at once: up to 2.05 kB/s",
        "not measured: files: x",
    ):
        assert words in text, text


def test_a_gpus_host_has_its_own_memory() -> None:
    from estimator import catalog

    gpu = catalog.gpu("h100-sxm")
    with pytest.raises(InputError, match="host's memory"):
        build_profile(results(), 2, gpu)
    memory = {Task("host", "memory", "fp32").key(1): {"work": 1e9, "seconds": [0.1, 0.1, 0.1]}}
    profile = build_profile({**results(), **memory}, 2, gpu)
    assert profile.host is not None and profile.host.memory_bytes_per_s == pytest.approx(1e10)


def test_what_was_not_measured_is_said_once() -> None:
    fp8 = [Task("matmul", "nt", "fp8", (16 * i, 16, 16)).key(1) for i in range(1, 4)]
    late = Task("copy", "h2d", "fp32", (4096,)).key(1)
    done = {key: {"skipped": "fp8 needs compute capability 8.9, this GPU has 8.0"} for key in fp8}
    assert left_out([*fp8, late], done, 240.0, "cuda", 1, False) == {
        "matmul nt 16x16x16 fp8 and 2 more of matmul fp8": "fp8 needs compute capability 8.9, this GPU has 8.0",
        "copy: 1 of 1 points": "the budget of 240 s was spent",
        "files": "no folder was given to read and write in",
        "collectives": "this machine has one GPU",
    }


def test_missing_indispensables_say_why() -> None:
    only = {Task("matmul", "nt", "fp32", (4, 5, 6)).key(1): {"work": 1.0, "seconds": [1.0]}}
    with pytest.raises(InputError, match=r"no usable attention, .*\(attention: it burst\)"):
        build_profile(only, 2, None, skipped={"attention": "it burst"})


# ---- going on -----------------------------------------------------------------------------------------------------


def test_points_of_another_torch_are_dropped_and_named(tmp_path: Path) -> None:
    here = {"torch": "2.13.0", "gpu": "h100-sxm"}
    first = Partial(tmp_path / "p.json", here)
    first.add("key", {"skipped": "x"})
    first.save()
    same = Partial(tmp_path / "p.json", here)
    assert same.done == {"key": {"skipped": "x"}} and same.notes == ()
    other = Partial(tmp_path / "p.json", {"torch": "2.11.0", "gpu": "h100-sxm"})
    assert other.done == {}
    assert other.notes == (
        "1 points of an interrupted calibration were dropped: torch '2.13.0' instead of '2.11.0'",
    )  # fmt: skip
    assert Partial(tmp_path / "p.json", {"torch": "2.13.0", "gpu": "h200"}).done == {}
    (tmp_path / "p.json.partial").write_text(json.dumps({"format": "else", "machine": {}, "done": {}}))
    with pytest.raises(InputError, match="not a calibration in progress"):
        Partial(tmp_path / "p.json", here)


def test_launches_stay_below_what_a_driver_queues() -> None:
    assert host._LAUNCHES < 1000


def test_collectives_are_called_as_torch_has_them() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        for name in sizes.COLLECTIVES:
            prepared = measure.prepare(Task("collective", name, "bf16", (4096,)), "cpu")
            prepared.call()
            assert prepared.work == 4096
    finally:
        dist.destroy_process_group()
