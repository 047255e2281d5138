"""Files and late steps on the player's clocks, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from estimator.job import Job, Strategy
from estimator.predict import lay_out
from estimator.schedule.events import Commit, Compute, Copy, Update, Wait
from estimator.schedule.nvme import IO_BLOCK_BYTES, IO_QUEUE
from estimator.time.durations import Durations
from estimator.time.profile import FilePoint, HardwareProfile, OverheadPoint
from estimator.time.stack import LONE
from tests.estimator.test_time_player import COSTS, FREE_ISSUE, GPU, JOB, play, program

FILES: HardwareProfile = replace(
    FREE_ISSUE,
    files=(
        FilePoint("read", IO_BLOCK_BYTES, IO_QUEUE, 8e9),
        FilePoint("write", IO_BLOCK_BYTES, IO_QUEUE, 4e9),
        FilePoint("read", 4096, 1, 1e6),
    ),
)
NVME = replace(JOB, strategy=Strategy(zero_stage=3, offload="optimizer:nvme"))
CPU = replace(NVME, cluster=replace(NVME.cluster, gpu=replace(GPU, name="cpu", arch="cpu")))
READ, WRITE = 10**9, 10**8
"""Eight ranks share the drive: 1 s and 0.2 s."""


def read(group: int, n_bytes: int = READ) -> Copy:
    return Copy("nvme_read", "states", group, n_bytes, ("nvme_read", group))


def write(group: int, n_bytes: int = WRITE) -> Copy:
    return Copy("nvme_write", "states", group, n_bytes, ("nvme_write", group))


@pytest.mark.parametrize("job", [NVME, CPU], ids=["gpu", "cpu"])
def test_a_read_goes_on_behind_computing_and_starts_with_its_issue(job: Job) -> None:
    compute_s = play(program(Compute(1, "forward")), FILES, job).step_s
    events = (Compute(1, "forward"), Wait("host", ("nvme_read", 0)))
    t = play(program(read(0), *events), FILES, job)
    assert t.busy_s["nvme_read"] == pytest.approx(1.0) and t.step_s == pytest.approx(max(1.0, compute_s), rel=1e-9)
    assert t.parts["offload"] == pytest.approx(1.0 - compute_s, rel=1e-9)
    alone = play(program(read(0, READ // 10**9), *events), FILES, job)
    assert alone.step_s == pytest.approx(compute_s, rel=1e-6) and alone.parts["offload"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("job", [NVME, CPU], ids=["gpu", "cpu"])
def test_a_read_may_wait_for_a_write_and_the_host_does_not(job: Job) -> None:
    """write 0.2 s, then read 1 s of its slot, beside a read of 1 s that is under way: 0.2 s are hidden."""
    events = (read(1), write(0), Wait("nvme_read", ("nvme_write", 0)), read(2))
    t = play(program(*events, Wait("host", ("nvme_read", 2))), FILES, job)
    assert t.step_s == pytest.approx(2.0, rel=1e-6)
    first = play(
        program(write(0, 10 * WRITE), Wait("nvme_read", ("nvme_write", 0)), read(2), Wait("host", ("nvme_read", 2))),
        FILES,
        job,
    )
    assert first.step_s == pytest.approx(3.0, rel=1e-6)


def test_a_late_step_goes_on_behind_computing_on_a_gpu() -> None:
    late = replace(JOB, strategy=Strategy(zero_stage=3, offload="optimizer", delayed_update=True))
    durations = Durations(COSTS, late, FREE_ISSUE, LONE)
    compute_s, numel = play(program(Compute(1, "forward")), job=late).step_s, 10**6
    update_s = durations.update(numel, True)
    numel = int(numel * 3 * compute_s / update_s)
    update_s = durations.update(numel, True)
    wait = Wait("host", ("update", 0))
    t = play(program(Update(0, numel, "worker"), Compute(1, "forward"), wait), job=late)
    assert t.step_s == pytest.approx(update_s, rel=1e-9) and t.parts["offload"] == pytest.approx(
        update_s - compute_s, rel=1e-6
    )
    assert t.busy_s["worker"] == pytest.approx(update_s) and t.busy_s["host"] == 0


def test_on_a_cpu_a_late_step_takes_the_same_cores() -> None:
    late = replace(CPU, strategy=Strategy(zero_stage=3, offload="optimizer", delayed_update=True))
    update_s = Durations(COSTS, late, FREE_ISSUE, LONE).update(10**9, True)
    t = play(program(Update(0, 10**9, "worker"), Compute(1, "forward")), job=late)
    assert t.step_s == pytest.approx(update_s + play(program(Compute(1, "forward")), job=late).step_s, rel=1e-9)


def with_sums(one: float, four: float, *more: FilePoint) -> HardwareProfile:
    """Checksums at ``one`` byte per second on one thread and at ``four`` on four; reads alone at 3e9."""
    sums = (FilePoint("checksum", IO_BLOCK_BYTES, 1, one), FilePoint("checksum", IO_BLOCK_BYTES, IO_QUEUE, four))
    return replace(FILES, files=(*FILES.files, FilePoint("read", IO_BLOCK_BYTES, 1, 3e9), *sums, *more))


@pytest.mark.parametrize(
    ("one", "four", "n_cores", "rate"),
    [
        (6e9, 24e9, 64, 1e9),  # the drive's 8e9, shared by eight ranks
        (6e8, 24e8, 8, 6e8),  # one core for each rank
        (6e8, 9e8, 64, 9e8),  # four threads at once are no faster
    ],
)
def test_checksums_cost_where_the_drive_is_quicker(one: float, four: float, n_cores: int, rate: float) -> None:
    host = replace(NVME.cluster.host, n_cores=n_cores)
    job = replace(NVME, cluster=replace(NVME.cluster, host=host))
    assert Durations(COSTS, job, with_sums(one, four)).copy("nvme_read", 10**9) == pytest.approx(1e9 / rate)


def test_a_thread_takes_its_turns_one_after_another() -> None:
    """One rank: four threads, each of which reads a block in 1/3e9 s per byte and sums it in 1/1e9: 4 / (4/3e9) = 3e9."""
    alone = replace(NVME, workload=replace(NVME.workload, global_batch_size=NVME.n_micro_batches),
                    cluster=replace(NVME.cluster, n_gpus=1, gpus_per_node=1))  # fmt: skip
    assert Durations(COSTS, alone, with_sums(1e9, 4e9)).copy("nvme_read", 10**9) == pytest.approx(1e9 / 3e9)
    assert Durations(COSTS, alone, FILES).copy("nvme_read", 10**9) == pytest.approx(1e9 / 8e9)  # without sums' rates


@pytest.mark.parametrize("job", [NVME, CPU], ids=["gpu", "cpu"])
def test_the_host_waits_for_a_commit(job: Job) -> None:
    profile = replace(FILES, overheads=(OverheadPoint("commit", 0.25), OverheadPoint("launch", 1.0)))
    without = play(program(Commit()), FILES, job)
    t = play(program(Commit()), profile, job)
    assert t.step_s == pytest.approx(0.25) and t.parts["offload"] == pytest.approx(0.25) and without.step_s == 0.0


def test_a_step_commits_once_after_everything_has_been_written() -> None:
    events = lay_out(replace(NVME, strategy=replace(NVME.strategy, dtype="bf16"))).program.step[-1].events
    (at,) = [i for i, event in enumerate(events) if isinstance(event, Commit)]
    writes = [
        i for i, e in enumerate(events) if isinstance(e, Wait) and e.tag[0] == "nvme_write" and e.stream == "host"
    ]
    assert writes and max(writes) < at
