"""Optimizer steps that are one training step late (``Strategy.delayed_update``): plain PyTorch with the same delay trains alike."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.ops.cost import UnitCost
from estimator.plan.question import PlanQuestion
from estimator.predict import lay_out, predict, traffic_of
from estimator.schedule.events import Copy, Update, Wait
from estimator.time.player import time_of
from estimator.time.profile import profile_for
from runtime import initialize
from runtime.models import Decoder
from runtime.offload import delayed
from runtime.reference import PARITY_OPTIMIZER, TOLERANCES, relative_difference
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.memory import MODELS, check
from tests.runtime.offload_worker import OffloadCase, run_group
from tests.runtime.parity_worker import Outcome, batch, run_engine, run_plain

pytestmark = pytest.mark.usefixtures("one_thread")


def late(**fields: object) -> Strategy:
    return Strategy(offload="optimizer", delayed_update=True, **{"bucket_bytes": 20_000, **fields})  # type: ignore[arg-type]


def engine_outcome(case: OffloadCase) -> Outcome:
    return run_engine(case, 0)  # type: ignore[arg-type]


def plain(case: OffloadCase) -> Outcome:
    return run_plain(case)  # type: ignore[arg-type]


def assert_bit_equal(got: Outcome, want: Outcome) -> None:
    for name in want.params:
        assert torch.equal(got.params[name], want.params[name]), name
    assert got.losses == pytest.approx(want.losses, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload": "none"}, "delayed_update is on with offload 'none'; allowed: only with offload 'optimizer'"),
        ({"offload": "optimizer,param"}, "delayed_update is on with offload 'optimizer,param'"),
        (
            {"offload": "optimizer", "offload_fraction": 0.5},
            "delayed_update is on with offload_fraction 0.5; allowed: 1",
        ),
    ],
)
def test_what_cannot_be_late(fields: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Strategy(delayed_update=True, **fields)
    with pytest.raises(InputError, match="delayed_update is 1"):
        Strategy(offload="optimizer", delayed_update=1)  # type: ignore[arg-type]


def test_a_search_over_offloads_is_late_only_where_that_can_be() -> None:
    job = tiny.job(tiny.GPT, late())
    question = PlanQuestion(
        model=job.model, cluster=job.cluster, seq_len=16, global_batch_size=2, base=job.strategy, recomputes=("none",),
    )  # fmt: skip
    assert {s.offload: s.delayed_update for s in question.strategies()}["optimizer"]
    assert [s.offload for s in question.strategies() if s.delayed_update] == ["optimizer"]


# ---- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_process_trains_as_plain_pytorch_with_the_same_delay(dtype: str, accumulation: int) -> None:
    case = OffloadCase(late(dtype=dtype, grad_clip=0.0), accumulation=accumulation)
    got, want = engine_outcome(case), plain(case)
    assert_bit_equal(got, want)
    if (
        accumulation == 1
    ):  # every step has the same batch: two steps from the initial parameters, then one that has learnt
        assert got.losses[0] == got.losses[1] > got.losses[2]
    on_time = plain(case._replace(strategy=replace(case.strategy, delayed_update=False)))
    assert on_time.losses[1] < got.losses[1] and relative_difference(got.params, on_time.params) > 1e-3


@pytest.mark.parametrize(
    "stages_and_dtypes",
    [((2, "bf16"), (3, "fp32")), pytest.param(((0, "bf16"), (1, "fp32"), (3, "bf16")), marks=pytest.mark.slow)],
)
def test_two_processes(stages_and_dtypes: tuple, tmp_path: Path) -> None:
    cases = [
        OffloadCase(late(zero_stage=stage, dtype=dtype, grad_clip=0.0), world=2, accumulation=1 + stage % 2)
        for stage, dtype in stages_and_dtypes
    ]
    for case, got in zip(cases, run_group(cases, tmp_path), strict=True):
        assert_bit_equal(got, plain(case))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_clipping_and_skipped_steps_belong_to_their_gradients(dtype: str) -> None:
    case = OffloadCase(late(dtype=dtype, grad_clip=0.5), accumulation=2)
    got, want = engine_outcome(case), plain(case)
    assert relative_difference(got.params, want.params) <= TOLERANCES[dtype].params
    assert got.losses == pytest.approx(want.losses, rel=TOLERANCES[dtype].loss)


def train(strategy: Strategy, steps: int, look: bool = False) -> dict[str, torch.Tensor]:
    model = Decoder(tiny.GPT)
    model.reset_parameters(0)
    engine = initialize(model=model, strategy=strategy, optimizer=PARITY_OPTIMIZER)
    for _ in range(steps):
        engine.backward(engine(*batch(0, 0)))
        engine.step()
        if look:
            engine.full_parameters()
    return engine.full_parameters()


def test_looking_at_the_parameters_changes_nothing() -> None:
    looked, not_looked = train(late(), 5, look=True), train(late(), 5)
    assert all(torch.equal(looked[name], not_looked[name]) for name in looked)


def test_the_step_is_taken_in_another_thread_and_its_errors_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    step_shard = delayed.step_shard

    def watched(*args: object) -> None:
        threads.add(threading.current_thread().name)
        step_shard(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(delayed, "step_shard", watched)
    train(late(), 3)
    assert len(threads) == 1 and next(iter(threads)).startswith("zerocast-late-steps")

    def broken(*_: object) -> None:
        raise RuntimeError("no step today")

    monkeypatch.setattr(delayed, "step_shard", broken)
    with pytest.raises(RuntimeError, match="no step today"):
        train(late(), 2)


# ---- bytes and time -----------------------------------------------------------------------------------------------


def wide_job(stage: int, dtype: str, world: int, *, arch: str = "hopper", **fields: object) -> Job:
    strategy = late(zero_stage=stage, dtype=dtype, bucket_bytes=300_000, **fields)
    return tiny.job(MODELS["llama"], strategy, world=world, n_micro_batches=1 + stage % 2, seq_len=64, arch=arch)


@pytest.mark.parametrize(("stage", "world", "dtype"), [(0, 1, "fp32"), (1, 2, "bf16"), (2, 8, "fp16"), (3, 4, "bf16")])
def test_live_bytes_are_the_forecast(stage: int, world: int, dtype: str) -> None:
    check(wide_job(stage, dtype, world))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_real_step_holds_and_copies_the_forecast_bytes(dtype: str) -> None:
    job = wide_job(0, dtype, 1, arch="cpu")
    real, fake = (run_session(job, d, SessionOptions(steps=1, warmup=2)) for d in ("cpu", "fake-cpu"))  # type: ignore[arg-type]
    assert real.copy_bytes == fake.copy_bytes == traffic_of(lay_out(job).program)[2]
    assert (real.host_bytes, real.category_peak_bytes) == (fake.host_bytes, fake.category_peak_bytes)
    on_time = lay_out(replace(job, strategy=replace(job.strategy, delayed_update=False)))
    assert real.copy_bytes == traffic_of(on_time.program)[2]


def test_no_gradient_is_overwritten_and_no_update_begins_before_what_it_needs() -> None:
    program = lay_out(wide_job(2, "bf16", 4)).program
    assert program.step[0].name == "delayed_update"
    assert all(isinstance(e, Update) and e.stream == "worker" for e in program.step[0].events)
    events = [e for section in program.step for e in section.events]
    for i, event in enumerate(events):
        if isinstance(event, Copy) and event.purpose == "grads":
            assert events[i - 1] == Wait("host", ("update", event.group))
    last = events[-len(program.step[0].events) :]
    assert {e.tag for e in last if isinstance(e, Wait) and e.stream == "host"} >= {
        ("h2d", e.group) for e in program.step[0].events
    }


def test_the_forecast_hides_the_host_behind_the_device() -> None:
    """With passes as long as the host's step, the delay hides nearly all of it; with none to hide behind it hides nothing."""
    job = wide_job(0, "bf16", 1)
    on_time = replace(job, strategy=replace(job.strategy, delayed_update=False))

    def played(job: Job, times: float) -> tuple[float, float]:
        blueprint, profile = lay_out(job), profile_for(job.cluster.gpu)[0]

        def longer(cost: UnitCost) -> UnitCost:
            ops = (op._replace(flops=op.flops * times, n_bytes=int(op.n_bytes * times)) for op in cost.forward)
            return cost._replace(forward=tuple(ops))

        time = time_of(blueprint.program, [longer(c) for c in blueprint.costs], job, profile)
        return time.step_s, time.parts["offload"]

    (late_s, late_offload_s), (step_s, offload_s) = played(job, 3000.0), played(on_time, 3000.0)
    assert late_offload_s < 0.5 * offload_s and late_s < step_s
    assert step_s - late_s == pytest.approx(offload_s - late_offload_s, rel=0.1)
    assert predict(job).step_s <= predict(on_time).step_s * 1.01  # type: ignore[operator]
