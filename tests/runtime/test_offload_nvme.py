"""An optimizer in files trains bit by bit as one in host memory does, and goes on after whatever happened."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.plan.question import OFFLOADS
from estimator.predict import lay_out, memory_of, predict, traffic_of
from estimator.schedule.events import Copy, Wait
from estimator.schedule.nvme import IO_BLOCK_BYTES, IO_QUEUE, N_SLOTS, record_bytes
from estimator.sharding.layout import Group
from estimator.time.player import time_of
from estimator.time.profile import FilePoint, HardwareProfile, profile_for
from runtime.offload.states import NvmePlace
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.memory import MODELS, check
from tests.runtime.offload_worker import OffloadCase, make_engine, run, run_group, train
from tests.runtime.parity_worker import Outcome
from validator.measure.case import Case

pytestmark = pytest.mark.usefixtures("one_thread")


def in_files(**fields: object) -> Strategy:
    return Strategy(offload="optimizer:nvme", **{"bucket_bytes": 20_000, **fields})  # type: ignore[arg-type]


def on_host(case: OffloadCase) -> OffloadCase:
    """The same training with the optimizer in host memory."""
    return case._replace(strategy=replace(case.strategy, offload="optimizer"), nvme=None)


def assert_same(got: Outcome, want: Outcome) -> None:
    assert got.losses == want.losses
    assert all(torch.equal(got.params[name], want.params[name]) for name in want.params)


# ---- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "accumulation", "optimizer"),
    [("fp32", 1, "adamw"), ("bf16", 3, "adam"), ("fp16", 1, "adamw"), ("fp32", 2, "sgd")],
)
@pytest.mark.parametrize("bucket_bytes", [20_000, 1 << 30])
def test_one_process(dtype: str, accumulation: int, optimizer: str, bucket_bytes: int, tmp_path: Path) -> None:
    """With one group and with several, more than there are slots."""
    strategy = in_files(dtype=dtype, optimizer=optimizer, bucket_bytes=bucket_bytes)
    case = OffloadCase(strategy, 1, accumulation, NvmePlace(folder=tmp_path), steps=6)
    assert_same(run(case, 0), run(on_host(case), 0))


def test_two_processes_and_on_from_their_files(tmp_path: Path) -> None:
    """Three steps, then two more from the files: as five in one go. Ranks read no version that another lacks."""
    cases = [
        OffloadCase(
            in_files(zero_stage=stage, dtype=dtype), 2, 1, NvmePlace(folder=tmp_path / f"{stage}{dtype}"), steps=3
        )
        for stage, dtype in ((0, "fp32"), (1, "bf16"), (3, "fp32"))
    ]
    more = [c._replace(steps=2, nvme=replace(c.nvme, resume=True)) for c in cases]  # type: ignore[type-var]
    whole = [on_host(case._replace(steps=5)) for case in cases]
    outcomes = run_group([*cases, *more, *whole], tmp_path)
    for first, second, want in zip(outcomes[:3], outcomes[3:6], outcomes[6:], strict=True):
        assert first.losses + second.losses == want.losses
        assert all(torch.equal(second.params[name], want.params[name]) for name in want.params)


def test_looking_at_the_parameters_changes_nothing(tmp_path: Path) -> None:
    case = OffloadCase(in_files(dtype="bf16"), nvme=NvmePlace(folder=tmp_path), steps=4)
    engine = make_engine(case)
    initial = engine.full_parameters()
    losses = []
    for _ in range(4):
        losses += train(engine, case, 0, 1)
        params = engine.full_parameters()
    assert_same(Outcome(losses, params, {}, {}), run(on_host(case), 0))
    assert not torch.equal(initial["head.norm.weight"], params["head.norm.weight"])


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_folder_is_given_where_files_are_wanted_and_only_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nvme is not given; offload 'optimizer:nvme' needs a folder"):
        make_engine(OffloadCase(in_files()))
    with pytest.raises(
        InputError, match="nvme is given with offload 'optimizer'; allowed: only with offload 'optimizer:nvme'"
    ):
        make_engine(OffloadCase(Strategy(offload="optimizer"), nvme=NvmePlace(folder=tmp_path)))
    job = tiny.job(tiny.GPT, in_files(dtype="fp32"), arch="cpu")
    with pytest.raises(InputError, match="nvme_folder is not given"):
        run_session(job, "cpu", SessionOptions())
    with pytest.raises(InputError, match="where no folder can be made"):
        run_session(job, "cpu", SessionOptions(nvme_folder=str(tmp_path / "none")))
    with pytest.raises(InputError, match="nvme_folder is not given; offload 'optimizer:nvme'"):
        Case(job=job, backend="cpu")
    with pytest.raises(InputError, match=r"nvme_folder is '/x' .* allowed: only with offload 'optimizer:nvme'"):
        Case(job=replace(job, strategy=Strategy(dtype="fp32")), backend="cpu", nvme_folder="/x")
    assert Case(job=job, backend="cpu", nvme_folder="/x") and Case(job=job, backend="fake")


@pytest.mark.parametrize("field", [{"offload_fraction": 0.5}, {"delayed_update": True}])
def test_what_does_not_go_with_files(field: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(field))} is .* with offload 'optimizer:nvme'"):
        Strategy(offload="optimizer:nvme", **field)


def test_a_torn_file_stops_the_run(tmp_path: Path) -> None:
    case = OffloadCase(in_files(dtype="fp32"), nvme=NvmePlace(folder=tmp_path))
    engine = make_engine(case)
    train(engine, case, 0, 2)
    assert engine.nvme is not None and engine.nvme.files is not None and engine.nvme.files.version.number == 2  # type: ignore[union-attr]
    with (tmp_path / "rank0" / "states.0").open("r+b") as file:
        file.write(b"torn")
        file.flush()
        os.fsync(file.fileno())
    with pytest.raises(InputError, match=r"block 0 of record 0 of version 2 .* does not have the checksum"):
        train(engine, case, 0, 1)
    engine.close()


def test_a_disk_that_fills_up_stops_the_run_and_it_goes_on_where_there_is_room(tmp_path: Path) -> None:
    """A process that may not write beyond the first page of a file any more, from its third step on."""
    code = """
        import resource, sys
        from tests.runtime.test_offload_nvme import *
        torch.set_num_threads(1)
        case = OffloadCase(in_files(dtype="bf16"), nvme=NvmePlace(folder=Path(sys.argv[1])))
        engine = make_engine(case)
        train(engine, case, 0, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            train(engine, case, 0, 1)
        except InputError as error:
            print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "version 3 of" in done.stdout and "version 2 is whole" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    case = OffloadCase(in_files(dtype="bf16"), nvme=NvmePlace(folder=tmp_path, resume=True), steps=3)
    resumed, whole = run(case, 0), run(on_host(case._replace(steps=5)), 0)
    assert resumed.losses == whole.losses[2:]
    assert all(torch.equal(resumed.params[name], whole.params[name]) for name in whole.params)


# ---- bytes --------------------------------------------------------------------------------------------------------


def test_a_record_is_masters_and_states_in_whole_pages() -> None:
    group = Group(0, range(1), 1000, 1024, 512)
    assert record_bytes(group, in_files()) == 8192  # 512 x 4 x 3 = 6144
    assert record_bytes(group, in_files(optimizer="sgd")) == 4096


def wide_job(stage: int, dtype: str, world: int, *, arch: str = "hopper") -> Job:
    strategy = in_files(zero_stage=stage, dtype=dtype, bucket_bytes=300_000)
    return tiny.job(MODELS["llama"], strategy, world=world, n_micro_batches=1 + stage % 2, seq_len=64, arch=arch)


@pytest.mark.parametrize(("stage", "world", "dtype"), [(0, 1, "fp32"), (1, 2, "bf16"), (2, 8, "fp16"), (3, 4, "bf16")])
def test_live_bytes_are_the_forecast(stage: int, world: int, dtype: str) -> None:
    check(wide_job(stage, dtype, world))


def test_host_memory_is_two_slots_and_what_passes_through() -> None:
    job = wide_job(0, "bf16", 1)
    blueprint = lay_out(job)
    groups, memory = blueprint.layout.groups, memory_of(blueprint)
    assert len(groups) > N_SLOTS
    slots = N_SLOTS * max(record_bytes(g, job.strategy) for g in groups)
    sizes = [2 * g.shard_numel for g in groups]
    assert "master_params" not in memory.host_category_peak_bytes
    assert "optimizer_state" not in memory.host_category_peak_bytes
    two_updates = max(a + b for a, b in pairwise(sizes))
    assert memory.host_category_peak_bytes["offload_staging"] == slots + two_updates
    assert memory.host_category_peak_bytes["grads"] == sum(sizes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_session_copies_the_forecast_bytes_says_how_fast_and_leaves_nothing(dtype: str, tmp_path: Path) -> None:
    job = wide_job(0, dtype, 1, arch="cpu")
    options = SessionOptions(steps=2, warmup=1, nvme_folder=str(tmp_path))
    real, fake = run_session(job, "cpu", options), run_session(job, "fake-cpu", SessionOptions())
    copies = traffic_of(lay_out(job).program)[2]
    assert real.copy_bytes == fake.copy_bytes == copies
    assert (
        copies["nvme_read"]
        == copies["nvme_write"]
        == sum(record_bytes(g, job.strategy) for g in lay_out(job).layout.groups)
    )
    for name in ("host_bytes", "peak_allocated_bytes", "category_peak_bytes", "phase_peak_bytes"):
        assert getattr(real, name) == getattr(fake, name) != 0, name
    rates = real.copy_bytes_per_s
    assert rates.keys() == {"h2d", "d2h", "nvme_read", "nvme_write"} and min(rates.values()) > 0
    assert rates["nvme_read"] == real.copy_bytes["nvme_read"] / real.copy_seconds["nvme_read"]
    assert real.file_access.startswith(("direct, ", "buffered ")) and not fake.file_access
    assert list(tmp_path.iterdir()) == []


def test_every_group_is_read_before_its_step_and_slots_are_left_before_they_are_read_over() -> None:
    for dtype in ("bf16", "fp32"):
        job = wide_job(1, dtype, 2)
        program, groups = lay_out(job).program, lay_out(job).layout.groups
        last = [e for s in program.step[-2:] for e in s.events]
        reads = [e.group for e in last if isinstance(e, Copy) and e.stream == "nvme_read"]
        writes = [e.group for e in last if isinstance(e, Copy) and e.stream == "nvme_write"]
        assert reads == writes == [g.number for g in groups] and len(groups) > N_SLOTS
        for g in reads[N_SLOTS:]:
            at = next(i for i, e in enumerate(last) if isinstance(e, Copy) and e.tag == ("nvme_read", g))
            left = {e.tag for e in last[:at] if isinstance(e, Wait) and e.stream == "nvme_read"}
            assert ("nvme_write", g - N_SLOTS) in left and (("h2d", g - N_SLOTS) in left) == (dtype == "fp32")


# ---- time ---------------------------------------------------------------------------------------------------------


def with_files(profile: HardwareProfile, *points: FilePoint) -> HardwareProfile:
    return replace(profile, files=points)


def points(read: float, write: float) -> tuple[FilePoint, ...]:
    """The runtime's own size and number of blocks, and others that must not count."""
    return tuple(
        FilePoint(way, block, queue, rate * factor)
        for way, rate in (("read", read), ("write", write))
        for block, queue, factor in ((IO_BLOCK_BYTES, IO_QUEUE, 1.0), (4096, IO_QUEUE, 0.1), (IO_BLOCK_BYTES, 1, 0.3))
    )


def played(job: Job, profile: HardwareProfile) -> tuple[float, dict[str, float]]:
    blueprint = lay_out(job)
    time = time_of(blueprint.program, blueprint.costs, job, profile)
    return time.step_s, time.busy_s


def test_time_needs_measured_files() -> None:
    with pytest.raises(
        InputError, match=r"offload is 'optimizer:nvme', .* has none, allowed: .*calibrate --nvme FOLDER"
    ):
        predict(wide_job(0, "bf16", 1))
    assert "optimizer:nvme" not in OFFLOADS  # a search does not stumble over it


def test_ranks_share_the_drive_and_a_fast_one_costs_nothing() -> None:
    job = wide_job(1, "bf16", 2)
    profile = profile_for(job.cluster.gpu)[0]
    n_bytes = traffic_of(lay_out(job).program)[2]
    step_s, busy = played(job, with_files(profile, *points(2e8, 1e8)))
    assert busy["nvme_read"] == pytest.approx(2 * n_bytes["nvme_read"] / 2e8)
    assert busy["nvme_write"] == pytest.approx(2 * n_bytes["nvme_write"] / 1e8)
    assert step_s > busy["nvme_write"]
    host = replace(job, strategy=replace(job.strategy, offload="optimizer"))
    fast_s, host_s = played(job, with_files(profile, *points(1e15, 1e15)))[0], played(host, profile)[0]
    assert host_s < fast_s < 1.05 * host_s  # issuing the copies remains


def test_reading_hides_behind_the_passes_on_a_gpu_and_on_a_cpu() -> None:
    """The first two groups are read while the micro-batch computes: a drive that is quick enough for them costs only the rest."""
    job = wide_job(0, "bf16", 1)
    one_group = replace(job, strategy=replace(job.strategy, bucket_bytes=1 << 30))
    profile = profile_for(job.cluster.gpu)[0]
    free, _ = played(one_group, with_files(profile, *points(1e15, 1e15)))
    n_bytes = traffic_of(lay_out(one_group).program)[2]["nvme_read"]
    hidden, _ = played(one_group, with_files(profile, *points(n_bytes / (free / 100), 1e15)))
    assert hidden == pytest.approx(free, rel=1e-6)
    exposed, _ = played(one_group, with_files(profile, *points(n_bytes / (10 * free), 1e15)))
    assert 10 * free < exposed < 11 * free


def test_without_copies_there_are_no_rates() -> None:
    m = run_session(tiny.job(tiny.GPT, Strategy(dtype="fp32"), arch="cpu"), "cpu", SessionOptions(steps=1, warmup=0))
    assert m.copy_seconds == m.copy_bytes_per_s == {} and m.file_access == ""
