"""How calls are timed, with the device's clock replaced where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from estimator.errors import InputError
from validator import timing
from validator.kernels.measure import Bench
from validator.timing import time_call


class Clock:
    """Stands for torch's CUDA events: what was called between two of them takes a millisecond each."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.log.count("call")
                clock.log.append("event")

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_device_seconds_are_those_between_events(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = time_call(
        lambda: clock.log.append("call"), "cuda", 0.001, min_repeats=7, before=lambda: clock.log.append("flush")
    )
    assert seconds == [1e-3] * len(seconds) and 7 <= len(seconds) <= 25
    assert clock.log == [*["flush", "call"] * 2, *["flush", "event", "call", "event"] * len(seconds)]


def test_without_emptied_caches_short_calls_are_timed_many_in_a_row(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = time_call(lambda: clock.log.append("call"), "cuda", 0.001)
    assert seconds == [1e-3] * len(seconds)
    assert clock.log.count("call") == 2 + 50 * len(seconds)


def test_the_hosts_clock_and_calls_that_take_too_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(seconds):
        now[0] += seconds

    assert time_call(lambda: call(0.02), "cpu", 0.1, before=lambda: call(5.0)) == pytest.approx([0.02] * 5)
    assert time_call(lambda: call(0.5), "cpu", 0.1) == []
    assert len(time_call(lambda: call(1e-6), "cpu", 0.1)) == 25
    assert time_call(lambda: call(0.02), "cpu", 0.1, agree=lambda n: 2) == pytest.approx([0.02] * 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_bench_without_its_device():
    with pytest.raises(InputError, match="device is 'cuda', but torch sees no GPU"):
        Bench("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the cuda path has not been run here")
def test_a_copy_on_a_gpu_reaches_the_copys_bandwidth():
    from validator.kernels.case import KernelCase

    report = Bench("cuda").measure(KernelCase(kernel="copy", dtype="fp32", n_bytes=1 << 29, device="cuda"))
    assert 0.7 < report.of_copy < 1.3
