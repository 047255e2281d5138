"""The player on programs small enough to work out by hand, and properties of any program."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.job import Cluster, Gpu, Host, Job, ModelSpec, Strategy, Workload
from estimator.ops.cost import PassMemory, UnitCost
from estimator.ops.operator import Op
from estimator.report import TIME_PARTS
from estimator.schedule.events import (
    Accumulate,
    Collective,
    Compute,
    Copy,
    Event,
    GradNorm,
    Section,
    StepProgram,
    Update,
    Wait,
)
from estimator.time.code import PASS, WAIT, WORK
from estimator.time.durations import Durations
from estimator.time.player import INDEX, Player, StepTime, time_of
from estimator.time.profile import HardwareProfile, profile_for
from estimator.time.stack import LONE

GPU = Gpu(
    name="h100-sxm", arch="hopper", memory_bytes=80 << 30, memory_bytes_per_s=3.35e12,
    peak_flops={"fp32": 6.69e13, "bf16": 9.894e14, "fp16": 9.894e14}, n_sms=132, l2_bytes=50 << 20,
    link_bytes_per_s=4.5e11, host_link_bytes_per_s=6.4e10,
)  # fmt: skip
HOST = Host(memory_bytes=1 << 40, n_cores=96, memory_bytes_per_s=3e11)
CLUSTER = Cluster(gpu=GPU, n_gpus=8, gpus_per_node=8, internode_bytes_per_s=5e10, host=HOST)
MODEL = ModelSpec(
    name="tiny", family="custom", n_layers=1, d_model=64, n_heads=1, n_kv_heads=1, head_dim=64, d_ff=64,
    vocab_size=64, max_positions=64,
)  # fmt: skip
JOB = Job(
    model=MODEL,
    workload=Workload(seq_len=64, micro_batch_size=1, global_batch_size=8),
    strategy=Strategy(zero_stage=3),
    cluster=CLUSTER,
)
PROFILE, _ = profile_for(GPU)
FREE_ISSUE = replace(PROFILE, host_points=(PROFILE.host_points[0]._replace(op_s=0.0),))
"""The same machine with a host that issues in no time."""
NONE = PassMemory(*({} for _ in PassMemory._fields))


def matmul(n: int, backward: bool = False) -> Op:
    return Op("mm", "matmul", backward, "bf16", 2.0 * n**3, 6 * n * n, (1, n, n, n))


SMALL = UnitCost((matmul(2048),), (matmul(2048, True), matmul(2048, True)), (), NONE, NONE)
LARGE = UnitCost((matmul(8192),), (matmul(8192, True), matmul(8192, True)), (matmul(4096),), NONE, NONE)
COSTS = (SMALL, LARGE)


def program(*events: Event, repeat: int = 1) -> StepProgram:
    return StepProgram((), (Section("micro_batch", events, repeat),))


def play(p: StepProgram, profile: HardwareProfile = FREE_ISSUE, job: Job = JOB) -> StepTime:
    return time_of(p, COSTS, job, profile, LONE)


def gather(n_bytes: int, group: int = 0) -> Collective:
    return Collective("all_gather", "params", group, n_bytes, "gather", ("gather", group))


def reduce(n_bytes: int, group: int = 0) -> Collective:
    return Collective("reduce_scatter", "grads", group, n_bytes, "reduce", ("reduce", group))


D = Durations(COSTS, JOB, FREE_ISSUE, LONE)
FORWARD_S = D.passes(1, "forward")[0][1]
GATHER_S = D.collective("all_gather", 1 << 30)


def test_a_gather_that_is_waited_for_at_once_is_exposed_whole() -> None:
    t = play(program(gather(1 << 30), Wait("compute", ("gather", 0)), Compute(1, "forward")))
    assert t.parts["exposed_gather"] == pytest.approx(GATHER_S, rel=1e-12)
    assert t.parts["forward"] == pytest.approx(FORWARD_S, rel=1e-12)
    assert t.step_s == pytest.approx(GATHER_S + FORWARD_S, rel=1e-12)


def test_a_prefetched_gather_is_exposed_by_what_compute_does_not_cover() -> None:
    t = play(program(gather(1 << 32), Compute(1, "forward"), Wait("compute", ("gather", 0)), Compute(0, "forward")))
    whole = D.collective("all_gather", 1 << 32)
    assert whole > FORWARD_S, "the case needs a gather that is longer than the compute before it"
    assert t.parts["exposed_gather"] == pytest.approx(whole - FORWARD_S, rel=1e-12)
    assert t.busy_s["gather"] == pytest.approx(whole, rel=1e-12)
    hidden = play(program(gather(1 << 20), Compute(1, "forward"), Wait("compute", ("gather", 0))))
    assert hidden.parts["exposed_gather"] == 0.0


def test_collectives_start_after_the_compute_issued_before_them_and_queue_on_their_stream() -> None:
    t = play(program(Compute(1, "backward"), reduce(1 << 30), reduce(1 << 30, 1)))
    one = D.collective("reduce_scatter", 1 << 30)
    backward = sum(p[1] for p in D.passes(1, "backward"))
    assert t.step_s == pytest.approx(backward + 2 * one, rel=1e-12)
    assert t.parts["exposed_reduce"] == pytest.approx(2 * one, rel=1e-12)


def test_recomputation_is_told_apart_from_backward() -> None:
    t = play(program(Compute(1, "backward")))
    recompute, backward = D.passes(1, "backward")
    assert (recompute[0], backward[0]) == ("recompute", "backward")
    assert t.parts["recompute"] == pytest.approx(recompute[1], rel=1e-12)
    assert t.parts["backward"] == pytest.approx(backward[1], rel=1e-12)


def test_a_wait_is_split_between_what_is_waited_for_and_what_held_it_up() -> None:
    """Parameters come from the host, then from the other ranks: the copy counts as offload, the gather as gather."""
    n = 1 << 30
    t = play(
        program(
            Copy("h2d", "params", 0, n // 8, ("h2d", 0)),
            Wait("gather", ("h2d", 0)),
            gather(n),
            Wait("compute", ("gather", 0)),
        )
    )
    assert t.parts["offload"] == pytest.approx(D.copy("h2d", n // 8), rel=1e-12)
    assert t.parts["exposed_gather"] == pytest.approx(GATHER_S, rel=1e-12)


def test_the_host_optimizer_is_offload_that_compute_waits_for() -> None:
    numel = 1 << 24
    t = play(
        program(
            Copy("d2h", "grads", 0, 2 * numel, ("d2h", 0)),
            Wait("host", ("d2h", 0)),
            Update(0, numel, "host"),
            Wait("h2d", ("update", 0)),
            Copy("h2d", "updated_params", 0, 2 * numel, ("h2d", 0)),
            Wait("compute", ("h2d", 0)),
        )
    )
    expected = D.copy("d2h", 2 * numel) + D.update(numel, True) + D.copy("h2d", 2 * numel)
    assert t.step_s == pytest.approx(expected, rel=1e-12)
    assert t.parts["offload"] == pytest.approx(expected, rel=1e-12)
    assert t.bound == "offload"


def test_a_slow_host_bounds_small_kernels() -> None:
    op = Op("tiny", "elementwise", False, "bf16", 1.0, 1024)
    slow = replace(PROFILE, host_points=(PROFILE.host_points[0]._replace(op_s=1e-3),))
    t = time_of(program(Compute(0, "forward")), (UnitCost((op,) * 10, (), (), NONE, NONE),), JOB, slow, LONE)
    kernel = Durations((), JOB, slow, LONE).ops.seconds(op)
    assert t.step_s == pytest.approx(10e-3 + kernel, rel=1e-12)
    assert t.parts["forward"] == t.step_s


def test_a_cpu_has_one_clock() -> None:
    cpu = replace(GPU, name="cpu", arch="cpu")
    job = replace(JOB, cluster=replace(CLUSTER, gpu=cpu))
    t = time_of(
        program(gather(1 << 30), Compute(1, "forward"), Wait("compute", ("gather", 0))), COSTS, job, FREE_ISSUE, LONE
    )
    assert t.parts["exposed_gather"] > 0 and t.step_s == pytest.approx(sum(t.busy_s.values()), rel=1e-12)


@pytest.mark.parametrize(
    ("overlap", "forward_s", "waiting_s"),
    [
        (0.75, 3.0 + 0.25 * 2.0, 0.0),  # a quarter of the two seconds beside it
        (0.5, 3.0 + 0.5 * 2.0, 0.0),  # half speed for as long
        (0.25, 3.0 + 0.5 * 1.0, 1.0),  # one second in which only the collective goes on, one at half speed
        (0.0, 3.0, 2.0),
    ],
)
def test_a_collective_slows_a_cpus_arithmetic(overlap: float, forward_s: float, waiting_s: float) -> None:
    player = Player(SimpleNamespace(overlap=overlap), serial=True)  # type: ignore[arg-type]
    player.run([(WORK, INDEX["gather"], 2.0, 0.0, "exposed_gather", ("gather", 0)), (PASS, "forward", 3.0, 0.0, 0.0)])
    player.run([(WAIT, 0, ("gather", 0))])
    assert player.parts["forward"] == pytest.approx(forward_s)
    assert player.parts["exposed_gather"] == pytest.approx(waiting_s)
    assert sum(player.parts.values()) == pytest.approx(player.clocks[0])


def test_what_is_waited_for_at_once_is_all_waiting() -> None:
    player = Player(SimpleNamespace(overlap=0.6), serial=True)  # type: ignore[arg-type]
    player.run([(WORK, INDEX["gather"], 2.0, 0.0, "exposed_gather", ("gather", 0)), (WAIT, 0, ("gather", 0))])
    player.run([(PASS, "forward", 3.0, 0.0, 0.0)])
    assert (player.parts["exposed_gather"], player.parts["forward"]) == (2.0, 3.0)


EVENTS = st.lists(
    st.one_of(
        st.builds(Compute, st.sampled_from([0, 1]), st.sampled_from(["forward", "loss", "backward"])),
        st.builds(gather, st.integers(0, 1 << 32), st.integers(0, 2)),
        st.builds(reduce, st.integers(0, 1 << 32), st.integers(0, 2)),
        st.builds(
            lambda s, g, n: Copy(s, "params", g, n, (s, g)),
            st.sampled_from(["h2d", "d2h"]),
            st.integers(0, 2),
            st.integers(0, 1 << 32),
        ),
        st.builds(Accumulate, st.integers(0, 2), st.integers(1, 1 << 30)),
        st.builds(GradNorm, st.integers(0, 2), st.integers(1, 1 << 30), st.sampled_from(["compute", "host"])),
        st.builds(Update, st.integers(0, 2), st.integers(1, 1 << 28), st.sampled_from(["compute", "host"])),
        st.builds(
            Wait,
            st.sampled_from(["compute", "gather", "reduce", "h2d", "d2h", "host"]),
            st.tuples(st.sampled_from(["gather", "reduce", "h2d", "d2h", "update"]), st.integers(0, 2)),
        ),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(1, 60))
def test_repeating_equals_unrolling(events: list[Event], repeat: int) -> None:
    for profile in (FREE_ISSUE, PROFILE):
        folded = play(program(*events, repeat=repeat), profile)
        unrolled = play(program(*(events * repeat)), profile)
        assert folded.step_s == pytest.approx(unrolled.step_s, rel=1e-9)
        for stream in folded.busy_s:
            assert folded.busy_s[stream] == pytest.approx(unrolled.busy_s[stream], rel=1e-9, abs=1e-15)
        for part in TIME_PARTS:
            assert folded.parts[part] == pytest.approx(unrolled.parts[part], rel=1e-6, abs=1e-9 * unrolled.step_s)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_parts_add_up_and_no_stream_is_busier_than_the_step(events: list[Event]) -> None:
    t = play(program(*events), PROFILE)
    assert math.fsum(t.parts.values()) == pytest.approx(t.step_s, rel=1e-12)
    assert all(seconds >= 0 for seconds in t.parts.values())
    assert t.step_s >= max(t.busy_s.values()) * (1 - 1e-12)
    assert t.low_s <= t.step_s <= t.high_s


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.floats(1.0, 10.0))
def test_a_faster_link_never_makes_the_step_slower(events: list[Event], factor: float) -> None:
    faster = replace(JOB, cluster=replace(CLUSTER, gpu=replace(GPU, link_bytes_per_s=GPU.link_bytes_per_s * factor)))
    assert play(program(*events), job=faster).step_s <= play(program(*events)).step_s * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_the_step_is_at_least_its_critical_path(events: list[Event]) -> None:
    """An independent longest path over the dependencies that the contract states (host issue left out)."""
    ends: dict[str, float] = dict.fromkeys(("compute", "gather", "reduce", "h2d", "d2h", "host"), 0.0)
    tags: dict[tuple[str, int], float] = {}
    for e in events:
        if isinstance(e, Wait):
            ends[e.stream] = max(ends[e.stream], tags.get(e.tag, 0.0))
            continue
        stream = e.stream if isinstance(e, Collective | Copy | GradNorm | Update) else "compute"
        if isinstance(e, Compute):
            seconds = sum(p[1] for p in D.passes(e.unit, e.phase))
        elif isinstance(e, Collective):
            seconds = D.collective(e.op, e.n_bytes)
        elif isinstance(e, Copy):
            seconds = D.copy(e.stream, e.n_bytes)
        elif isinstance(e, Accumulate):
            seconds = D.accumulate(e.n_bytes)
        elif isinstance(e, GradNorm):
            seconds = D.grad_norm(e.n_bytes, stream == "host")
        else:
            seconds = D.update(e.numel, stream == "host")
        start = max(ends[stream], ends["compute"]) if isinstance(e, Collective | Copy) else ends[stream]
        ends[stream] = start + seconds
        if isinstance(e, Collective | Copy):
            tags[e.tag] = ends[stream]
        elif isinstance(e, Update):
            tags["update", e.group] = ends[stream]
    assert play(program(*events)).step_s >= max(ends.values()) * (1 - 1e-12)
