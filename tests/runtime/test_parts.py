"""Where a step's seconds go: parts nest, add up, and on a GPU are the compute stream's, read once."""

from __future__ import annotations

import time

import pytest
import torch

from estimator.job import Strategy
from runtime import OptimizerConfig, initialize
from runtime.parts import PartClock
from runtime.session import SessionOptions, run_session
from runtime.streams import SideStreams
from tests.runtime import tiny
from tests.runtime.fake_cuda import FakeCopy, FakeCuda
from tests.runtime.test_engine import ConvNet

CUDA = torch.device("cuda")


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def test_an_inner_part_is_not_the_outer_ones(cuda: FakeCuda) -> None:
    clock = PartClock(CUDA, cuda)
    clock.start()
    with clock.part("backward"):
        cuda.current.run(2.0)
        with clock.part("recompute"):
            cuda.current.run(0.5)
            with clock.part("exposed_gather"):
                cuda.current.run(0.25)
            cuda.current.run(0.5)
        cuda.current.run(1.0)
    cuda.current.run(7.0)  # in no part
    with clock.part("optimizer"):
        cuda.current.run(0.125)
    assert cuda.synchronisations == 0 and cuda.host_s == 0  # the host went ahead
    assert clock.read() == pytest.approx(
        {"backward": 3.0, "recompute": 1.0, "exposed_gather": 0.25, "optimizer": 0.125}
    )
    clock.start()
    assert clock.read() == {}


def test_the_host_falling_behind_counts_where_it_happens(cuda: FakeCuda) -> None:
    clock = PartClock(CUDA, cuda)
    with clock.part("forward"):
        cuda.current.run(1.0)
        cuda.host_s = 3.0  # the device runs dry
        cuda.current.run(1.0)
    assert clock.read() == pytest.approx({"forward": 4.0})


def test_a_part_ends_when_it_fails(cuda: FakeCuda) -> None:
    clock = PartClock(CUDA, cuda)
    with pytest.raises(ValueError), clock.part("forward"):
        cuda.current.run(1.0)
        raise ValueError
    with clock.part("backward"):
        cuda.current.run(2.0)
    assert clock.read() == pytest.approx({"forward": 1.0, "backward": 2.0})


@pytest.mark.parametrize(("compute_s", "exposed_s"), [(1.0, 2.0), (3.0, 0.0), (5.0, 0.0)])
def test_only_what_compute_cannot_hide_is_exposed(cuda: FakeCuda, compute_s: float, exposed_s: float) -> None:
    clock, streams = PartClock(CUDA, cuda), SideStreams(CUDA, cuda)
    with clock.part("forward"):
        done = streams.copy("h2d", None, FakeCopy(cuda, 3.0))  # type: ignore[arg-type]
        cuda.current.run(compute_s)
        with clock.part("offload"):
            streams.wait("compute", done)
        cuda.current.run(1.0)
    assert clock.read() == pytest.approx({"forward": compute_s + 1.0, "offload": exposed_s})
    assert streams.copy_seconds() == pytest.approx({"h2d": 3.0})


def test_copies_are_timed_where_they_run(cuda: FakeCuda) -> None:
    """Not from when they were issued: behind the compute stream and behind one another."""
    streams = SideStreams(CUDA, cuda)
    cuda.current.run(4.0)
    for seconds in (1.0, 2.0):
        streams.copy("d2h", None, FakeCopy(cuda, seconds))  # type: ignore[arg-type]
    last = streams.copy("h2d", None, FakeCopy(cuda, 0.5))  # type: ignore[arg-type]
    streams.wait("host", last)
    assert cuda.host_s == pytest.approx(4.5)
    assert streams.copy_seconds() == pytest.approx({"d2h": 3.0, "h2d": 0.5})
    streams.start_step()
    assert streams.copy_seconds() == {}


def test_marks_of_a_device(cuda: FakeCuda) -> None:
    clock = PartClock(CUDA, cuda)
    start = clock.mark()
    cuda.current.run(1.5)
    assert clock.between(start, clock.mark()) == pytest.approx(1.5)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("offload", ["none", "optimizer,param"])
def test_on_the_cpu_the_parts_add_up_to_the_step(offload: str, recompute: str) -> None:
    model = tiny.LLAMA
    strategy = Strategy(dtype="fp32", offload=offload, recompute=recompute)  # type: ignore[arg-type]
    job = tiny.job(model, strategy, n_micro_batches=2, micro_batch=16, arch="cpu")
    measured = run_session(job, "cpu", SessionOptions(steps=1, warmup=2, track_memory=False))
    (step_s,) = measured.step_seconds
    assert 0.5 * step_s < sum(measured.part_seconds.values()) <= step_s  # drawing the batch is in no part
    assert (measured.part_seconds["recompute"] > 0) == (recompute == "full")
    assert ("optimizer" in measured.part_seconds) == (offload == "none")
    assert (
        measured.copy_seconds.keys() == measured.copy_bytes.keys() == ({"h2d", "d2h"} if offload != "none" else set())
    )
    assert sum(measured.copy_seconds.values()) < step_s and measured.device_step_seconds == ()


def test_seconds_are_those_of_the_step_under_way() -> None:
    engine = initialize(model=ConvNet(), strategy=Strategy(dtype="fp32"), optimizer=OptimizerConfig())
    for _ in range(2):
        start_s = time.perf_counter()
        engine.backward(engine(torch.randn(2, 1, 8, 8)).sum())
        engine.step()
        elapsed_s = time.perf_counter() - start_s
    assert {"forward", "backward", "recompute", "optimizer"} <= engine.seconds.keys()
    assert 0 < sum(engine.seconds.values()) <= elapsed_s
