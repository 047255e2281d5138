"""Device memory of this process: NVML's figure for it where there is one, else a difference, else all that is taken."""

from __future__ import annotations

import importlib
import os

import pytest

from tests.validator.fake_nvml import FakeNvml
from validator.measure.device_memory import DeviceMeter
from validator.measure.instruments import allocator_facts, peak_rss_bytes, pinned_peaks

ME = os.getpid()


def attached(meter: DeviceMeter, uuid: str = "b") -> DeviceMeter:
    meter.attach(uuid, lambda: (300, 1000))
    return meter


def test_the_figure_for_this_process() -> None:
    nvml = FakeNvml({"GPU-a": 9, "GPU-b": 40}, {"GPU-b": {7: 40}})
    meter = DeviceMeter(nvml)
    nvml.processes["GPU-b"] = {7: 45, ME: 100}
    nvml.used["GPU-b"] = 150
    attached(meter)
    assert (meter.source, meter.used_bytes(), meter.others_bytes(), meter.reason) == ("nvml-process", 100, 50, None)
    nvml.processes["GPU-b"][ME] = 130
    assert meter.used_bytes() == 130


@pytest.mark.parametrize(
    "processes",
    [{}, {7: 40}, {ME: None}],
    ids=["another numbering", "only others are told", "no figure"],
)
def test_a_difference_where_the_process_is_not_told(processes: dict[int, int | None]) -> None:
    nvml = FakeNvml({"GPU-b": 40})
    meter = DeviceMeter(nvml)
    nvml.processes["GPU-b"], nvml.used["GPU-b"] = processes, 190
    attached(meter, "GPU-b")
    assert (meter.source, meter.used_bytes(), meter.others_bytes()) == ("nvml-device", 150, 40)


def test_a_stranger_with_this_processes_number_is_not_this_process() -> None:
    """In a container another process may have had the number all along."""
    nvml = FakeNvml({"GPU-b": 40}, {"GPU-b": {ME: 40}})
    meter = DeviceMeter(nvml)
    nvml.used["GPU-b"] = 60
    assert (attached(meter).source, meter.used_bytes()) == ("nvml-device", 20)


def test_without_nvml_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    meter = attached(DeviceMeter())
    assert (meter.source, meter.used_bytes(), meter.others_bytes()) == ("driver", 700, None)
    assert meter.reason == "pynvml is not installed"


def test_nvml_that_fails_or_does_not_know_the_device() -> None:
    broken = FakeNvml({"GPU-b": 1})
    broken.error = "Driver Not Loaded"
    meter = attached(DeviceMeter(broken))
    assert (meter.source, meter.used_bytes(), meter.reason) == ("driver", 700, "NVML says: Driver Not Loaded")
    meter = attached(DeviceMeter(FakeNvml({"GPU-a": 1})), "MIG-b")
    assert (meter.source, meter.reason) == ("driver", "NVML lists no device MIG-b")


def test_pinned_peaks_under_old_and_new_names() -> None:
    assert pinned_peaks({"allocated_bytes.peak": 3, "reserved_bytes.peak": 4}) == {
        "peak_active_bytes": 3,
        "peak_held_bytes": 4,
    }
    assert pinned_peaks({"active_bytes.peak": 3, "allocated_bytes.peak": 4}) == {
        "peak_active_bytes": 3,
        "peak_held_bytes": 4,
    }
    assert pinned_peaks({}) == {}


def test_allocator_facts() -> None:
    stats = {"allocated_bytes.all.peak": 7, "segment.all.peak": 2, "num_alloc_retries": 1, "num_ooms": 0, "other": 5}
    assert allocator_facts(stats) == {
        "peak_allocated_bytes": 7,
        "peak_segments": 2,
        "num_alloc_retries": 1,
        "num_ooms": 0,
    }


@pytest.mark.skipif(os.name != "posix", reason="needs a Unix")
def test_peak_rss_follows_what_is_held() -> None:
    before = peak_rss_bytes()
    assert before is not None
    held = bytearray(before + (64 << 20))  # more than was ever held
    after = peak_rss_bytes()
    assert after is not None and after >= before + (32 << 20) and len(held) > before
