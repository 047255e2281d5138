"""Programs with parameter servers: hand-counted events, and time that a server's link bounds."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.job import Job, Strategy
from estimator.job.mesh import Mesh
from estimator.job.options import JobOptions, build_job
from estimator.predict import lay_out, predict
from estimator.schedule.events import Alloc, Collective, Free, GradNorm, StepProgram, SumPieces, Update, Wait
from estimator.schedule.program import build_program
from estimator.schedule.servers import grow_older, tag
from estimator.sharding.layout import make_layout
from estimator.sharding.units import model_units
from estimator.time.durations import Durations
from estimator.time.network import timer_over
from estimator.time.player import Player, steady_step
from estimator.time.profile import profile_for
from estimator.time.stack import LONE
from tests.estimator.test_program import SPEC, TIED

GIB, PIB = 1 << 30, 1 << 50


def job(**fields: object) -> Job:
    chosen = {"gpus": 8, "zero": 0, "seq_len": 2048, **fields}
    return build_job(JobOptions(model="llama-3.2-1b", gpu="h100-sxm", **chosen))  # type: ignore[arg-type]


def served(n_servers: int, staleness: int = 0, **fields: object) -> Job:
    return job(sync="parameter_server", n_servers=n_servers, staleness=staleness, **fields)


def programme(strategy: Strategy, n: int, is_server: bool, *, spec=SPEC) -> StepProgram:
    layout = make_layout(model_units(spec), strategy, 0, 4)
    return build_program(layout, strategy, 0, Mesh(dp=4), n, is_server=is_server)


def events(program: StepProgram) -> list:
    return [e for s in program.step for _ in range(s.repeat) for e in s.events]


# ---- what a step does -----------------------------------------------------------------------------------------------


def test_events_of_a_server_and_of_a_worker() -> None:
    """Five units in as many groups, two micro-batches: gradients are pushed once, when they are complete."""
    strategy = Strategy(sync="parameter_server", n_servers=2, bucket_bytes=1)
    server, worker = (events(programme(strategy, 2, is_server)) for is_server in (True, False))
    for rank in (server, worker):
        assert Counter(e.op for e in rank if isinstance(e, Collective)) == {"push": 5, "pull": 5, "all_reduce": 1}
    assert sum(isinstance(e, Update) for e in server) == sum(isinstance(e, SumPieces) for e in server) == 5
    assert not any(isinstance(e, Update | SumPieces | GradNorm) for e in worker)
    pieces = [e for e in server if isinstance(e, SumPieces)]
    groups = {g.number: g for g in make_layout(model_units(SPEC), strategy, 0, 4).groups}
    assert all(e.pieces == 4 and 2 * e.numel == groups[e.group].padded_numel for e in pieces)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Strategy, sync=st.just("parameter_server"), n_servers=st.integers(1, 4), staleness=st.integers(0, 3),
        dtype=st.sampled_from(["fp32", "bf16"]), bucket_bytes=st.integers(1, 20_000), grad_clip=st.sampled_from([0.0, 1.0]),
        recompute=st.sampled_from(["none", "full"]),
    ),
    st.integers(1, 3), st.booleans(), st.sampled_from([SPEC, TIED]),
)  # fmt: skip
def test_rules_of_every_program(strategy: Strategy, n: int, is_server: bool, spec) -> None:
    """Steps leave what they find; the oldest gradients go when their push has been waited for; every rank sends the same."""
    program = programme(strategy, n, is_server, spec=spec)
    start = Counter(e.buffer for e in program.init if isinstance(e, Alloc))
    live = Counter(start)
    under_way: dict[tuple[str, int], int] = {}
    for step in range(strategy.staleness + 2):
        arrived = set()
        for e in events(program):
            if isinstance(e, Alloc):
                live[e.buffer] += 1
            elif isinstance(e, Free):
                live[e.buffer] -= 1
                assert live[e.buffer] >= 0
                assert e.buffer.role not in ("full_grads", "received") or e.buffer.group in arrived
            elif isinstance(e, Collective) and e.op == "push":
                under_way[e.tag] = step
            elif isinstance(e, Wait) and e.tag[0].startswith("push"):
                assert under_way.pop(e.tag, step - strategy.staleness) == step - strategy.staleness
                arrived.add(e.tag[1])
        assert +live == start
        grow_older(under_way, strategy.staleness)
        assert len(under_way) == len({g for _, g in under_way}) * min(step + 1, strategy.staleness)
    other = programme(strategy, n, not is_server, spec=spec)
    assert [e for e in events(program) if isinstance(e, Collective)] == [
        e for e in events(other) if isinstance(e, Collective)
    ]


def test_tags_grow_older() -> None:
    newest = {tag(7, 0): "new", tag(7, 1): "old", ("gather", 7): "pull"}
    grow_older(newest, 2)
    assert newest == {tag(7, 1): "new", tag(7, 2): "old", ("gather", 7): "pull"}


# ---- what it takes --------------------------------------------------------------------------------------------------


def test_a_servers_link_carries_what_every_other_rank_pushes() -> None:
    made = job()
    timer, link = (
        timer_over(None, made, profile_for(made.cluster.gpu)[0], "bf16"),
        profile_for(made.cluster.gpu)[0].link,
    )
    assert link is not None
    rate = link.ring_efficiency * made.cluster.gpu.link_bytes_per_s
    for n_servers in (1, 2, 8):
        assert timer.through_servers(PIB, n_servers) == pytest.approx(7 * PIB / n_servers / rate, rel=1e-3)
    assert timer.through_servers(GIB, 8) == timer.seconds("all_to_all", GIB)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 4, 8, 16, 32]), st.sampled_from(["bf16", "fp32"]), st.integers(1, 4), st.sampled_from([4 << 20, 64 << 20]),
    st.integers(0, 2),
)  # fmt: skip
def test_more_servers_are_faster_and_one_is_slower_than_an_all_reduce(
    gpus: int, dtype: str, accumulation: int, bucket_bytes: int, staleness: int
) -> None:
    fields = {"gpus": gpus, "dtype": dtype, "global_batch": accumulation * gpus, "bucket_bytes": bucket_bytes}
    servers = [n for n in (1, 2, 3, 4, 8, 16, 32) if n <= gpus]
    seconds = [predict(served(n, staleness, **fields)).step_s for n in servers]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in itertools.pairwise(seconds))
    if staleness == 0:
        assert seconds[0] > predict(job(**fields)).step_s


@pytest.mark.parametrize("gpus", [8, 16])
def test_staleness_hides_pushes_but_not_pulls(gpus: int) -> None:
    at = [predict(served(1, staleness, gpus=gpus), stack=LONE) for staleness in (0, 1, 3)]
    assert at[1].step_s < at[0].step_s
    assert at[2].step_s == pytest.approx(at[1].step_s)
    assert at[1].time_parts_s["exposed_gather"] == pytest.approx(at[0].time_parts_s["exposed_gather"], rel=0.01)
    sums_s = at[0].time_parts_s["exposed_reduce"] - at[1].time_parts_s["exposed_reduce"]
    assert sums_s == pytest.approx(at[0].step_s - at[1].step_s, rel=0.05)
    for report in at:
        assert sum(report.time_parts_s.values()) == pytest.approx(report.step_s)


def test_pushes_that_take_longer_than_a_step_bound_it() -> None:
    """Every step then takes as long as its pushes, however late they may be."""
    made = served(1, 2, gpus=16)
    profile = profile_for(made.cluster.gpu)[0]
    blueprint = lay_out(made)

    class Slow(Durations):
        def collective(self, op, n_bytes, span=None) -> float:
            return 100.0 if op == "push" else super().collective(op, n_bytes, span)

    parts, busy = steady_step(Player(Slow(blueprint.costs, made, profile), serial=False), blueprint.program, 2)
    n_groups = len(blueprint.layout.groups)
    assert busy["reduce"] == 100.0 * n_groups == pytest.approx(sum(parts.values()))


def test_a_step_on_processes_of_a_cpu_adds_up() -> None:
    """One clock there: the share of pushes that arithmetic hides is hidden in a later step too."""
    made = served(2, 1)
    made = replace(made, cluster=replace(made.cluster, gpu=replace(made.cluster.gpu, arch="cpu")))
    blueprint, profile = lay_out(made), profile_for(job().cluster.gpu)[0]
    durations = Durations(blueprint.costs, job(sync="parameter_server", n_servers=2, staleness=1), profile)
    durations.overlap = 0.5
    late, busy = steady_step(Player(durations, serial=True), blueprint.program, 1)
    in_time = Player(durations, serial=True)
    on_time = lay_out(replace(made, strategy=replace(made.strategy, staleness=0))).program
    for section in on_time.step:
        in_time.play(section)
    assert sum(late.values()) <= sum(in_time.finish()[0].values())
    assert busy["reduce"] > 0
