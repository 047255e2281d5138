"""An optimizer that host and device share (``Strategy.offload_fraction``) trains as one in one place does; bytes are the forecast's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.predict import lay_out, predict, traffic_of
from estimator.schedule.buffers import group_buffers, host_numel
from estimator.sharding.layout import Group
from runtime.reference import TOLERANCES, relative_difference
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.memory import MODELS, check
from tests.runtime.offload_worker import OffloadCase, run_group
from tests.runtime.parity_worker import Outcome, run_engine, run_plain

GROUP = Group(0, range(1), 1000, 1024, 256)
"""Four shards of 256 elements."""


pytestmark = pytest.mark.usefixtures("one_thread")


def shared(fraction: float, **fields: object) -> Strategy:
    return Strategy(offload="optimizer", offload_fraction=fraction, bucket_bytes=20_000, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fraction", "numel"), [(1, 256), (0.5, 128), (0.3, 80), (0.001, 8), (0.99, 256), (0.96, 248), (1e-9, 8)]
)
def test_the_host_has_aligned_elements_and_never_none(fraction: float, numel: int) -> None:
    assert host_numel(GROUP, shared(fraction)) == numel
    assert (group_buffers(GROUP, shared(fraction), 1).device_part is None) == (numel == 256)


def test_buffers_of_both_places_by_hand() -> None:
    b = group_buffers(GROUP, shared(0.25, dtype="bf16"), 2)
    assert (b.master.n_bytes, b.host_grads.n_bytes, b.host_update.n_bytes) == (64 * 4, 64 * 2, 64 * 2)  # type: ignore[union-attr]
    assert [s.n_bytes for s in b.optimizer_states] == [64 * 4] * 2
    assert b.device_part is not None and b.device_part.numel == 192
    mine = [b.device_part.master, *b.device_part.optimizer_states, b.device_part.update_temp]
    assert [(x.n_bytes, x.place) for x in mine] == [(192 * 4, "device")] * 4  # type: ignore[union-attr]
    fp32 = group_buffers(GROUP, shared(0.25, dtype="fp32"), 2).device_part
    assert fp32 is not None and fp32.master is None and fp32.update_temp is None
    fused = group_buffers(GROUP, shared(0.25), 2, fused_step=True).device_part
    assert fused is not None and fused.update_temp is None


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan"), True, "half"])
def test_a_fraction_is_a_number_up_to_one(fraction: object) -> None:
    with pytest.raises(InputError, match=r"offload_fraction is .*; allowed: a number above 0 and at most 1"):
        Strategy(offload="optimizer", offload_fraction=fraction)  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", ["none", "optimizer,param"])
def test_only_an_offloaded_optimizer_is_shared(offload: str) -> None:
    with pytest.raises(InputError, match=f"offload_fraction is 0.5 with offload '{offload}'; allowed: .* 'optimizer'"):
        Strategy(offload=offload, offload_fraction=0.5)  # type: ignore[arg-type]


def test_the_whole_on_the_host_is_the_same_job_as_ever() -> None:
    job = tiny.job(tiny.GPT, Strategy(offload="optimizer"))
    assert job.key == replace(job, strategy=shared(1, **{})).key or job.strategy.bucket_bytes != 20_000
    assert job.key == replace(job, strategy=replace(job.strategy, offload_fraction=1)).key
    assert job.key != replace(job, strategy=replace(job.strategy, offload_fraction=0.5)).key


def test_what_is_offloaded_is_named() -> None:
    assert Strategy(offload="optimizer,param").offload_words == "optimizer,param"
    assert shared(0.25).offload_words == "optimizer 0.25"
    assert Strategy(offload="optimizer", delayed_update=True).offload_words == "optimizer delayed"


# ---- numerics -----------------------------------------------------------------------------------------------------


def assert_bit_equal(got: Outcome, want: Outcome) -> None:
    assert got.params.keys() == want.params.keys()
    for name in want.params:
        assert torch.equal(got.params[name], want.params[name]), name
    assert got.losses == pytest.approx(want.losses, rel=1e-6)


def plain(case: OffloadCase) -> Outcome:
    return run_plain(case)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("fraction", "accumulation"), [(0.3, 1), (0.5, 3), (0.97, 1)])
def test_one_process_trains_as_plain_pytorch(dtype: str, fraction: float, accumulation: int) -> None:
    case = OffloadCase(shared(fraction, dtype=dtype, grad_clip=0.0), accumulation=accumulation)
    assert_bit_equal(run_engine(case, 0), plain(case))  # type: ignore[arg-type]


GRID = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))


@pytest.mark.parametrize("grid", [GRID[3::4], pytest.param(GRID, marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_processes_train_as_plain_pytorch(grid: list, tmp_path: Path) -> None:
    cases = [
        OffloadCase(shared(0.4, zero_stage=stage, dtype=dtype, grad_clip=0.0), world=2, accumulation=1 + stage % 2)
        for stage, dtype in grid
    ]
    for case, got in zip(cases, run_group(cases, tmp_path), strict=True):
        assert_bit_equal(got, plain(case))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_clipping_and_loss_scaling_hold_for_both_parts(dtype: str) -> None:
    case = OffloadCase(shared(0.5, dtype=dtype, grad_clip=0.5), accumulation=2)
    got, want = run_engine(case, 0), plain(case)  # type: ignore[arg-type]
    assert relative_difference(got.params, want.params) <= TOLERANCES[dtype].params
    assert got.losses == pytest.approx(want.losses, rel=TOLERANCES[dtype].loss)


# ---- bytes and time -----------------------------------------------------------------------------------------------


def wide_job(fraction: float, stage: int, dtype: str, world: int, *, arch: str = "hopper") -> Job:
    strategy = replace(shared(fraction, zero_stage=stage, dtype=dtype), bucket_bytes=300_000)
    return tiny.job(MODELS["llama"], strategy, world=world, n_micro_batches=1 + stage % 2, seq_len=64, arch=arch)


@pytest.mark.parametrize(("stage", "world", "dtype"), [(0, 1, "fp32"), (1, 2, "bf16"), (2, 8, "fp16"), (3, 4, "bf16")])
@pytest.mark.parametrize("arch", ["hopper", "cdna3"])
def test_live_bytes_are_the_forecast(stage: int, world: int, dtype: str, arch: str) -> None:
    """cdna3 has none of the kernels: torch's step widens gradients first."""
    check(wide_job(0.4, stage, dtype, world, arch=arch))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_real_step_copies_the_forecast_bytes(dtype: str) -> None:
    job = wide_job(0.3, 0, dtype, 1, arch="cpu")
    real = run_session(job, "cpu", SessionOptions(steps=1, warmup=1))
    assert real.copy_bytes == traffic_of(lay_out(job).program)[2]
    fake = run_session(job, "fake-cpu", SessionOptions())
    assert (fake.copy_bytes, fake.host_bytes, fake.peak_allocated_bytes) == (
        real.copy_bytes, real.host_bytes, real.peak_allocated_bytes,
    )  # fmt: skip
    whole = lay_out(replace(job, strategy=replace(job.strategy, offload_fraction=1.0)))
    assert sum(real.copy_bytes.values()) == pytest.approx(0.3 * sum(traffic_of(whole.program)[2].values()), rel=0.01)


def test_the_device_steps_while_the_host_does() -> None:
    """Host-bound: half of the optimizer on the device takes about half of the host's seconds away."""
    whole, half = (predict(wide_job(fraction, 1, "bf16", 2)) for fraction in (1.0, 0.5))
    assert half.step_s is not None and whole.step_s is not None and half.step_s < whole.step_s
    assert half.time_parts_s["offload"] < 0.8 * whole.time_parts_s["offload"]
    assert half.time_parts_s["optimizer"] > 0 == whole.time_parts_s["optimizer"]
    assert half.host_bytes == pytest.approx(whole.host_bytes / 2, rel=0.01)  # type: ignore[operator]
