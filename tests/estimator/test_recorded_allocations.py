"""Histories in the format of ``torch.cuda.memory._snapshot``, written by hand after the allocator's rules, through the simulator."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InputError
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.memory.recorded import replay_recorded, settings_of
from estimator.units import MIB

A, B, C, D, S = 0x7F10_0000_0000, 0x7F20_0000_0000, 0x7F30_0000_0000, 0x7F40_0000_0000, 0x7F50_0000_0000


def entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": stream, "time_us": 0, "frames": []}


def freed(address: int, size: int, stream: int = 0) -> list[dict[str, Any]]:
    return [entry("free_requested", address, size, stream), entry("free_completed", address, size, stream)]


TRACE = [
    entry("segment_alloc", A, 30 * MIB),
    entry("alloc", A, 30 * MIB),
    entry("segment_alloc", S, 2 * MIB),
    entry("alloc", S, 100),
    entry("alloc", S + 512, 1000),  # 100 B took 512
    *freed(A, 30 * MIB),
    entry("alloc", A, 10 * MIB + 1),  # cut from the 30
    entry("segment_alloc", B, 20 * MIB, 7),
    entry("alloc", B, 5 * MIB, 7),  # another stream: a segment of its own
    entry("alloc", A + 10 * MIB + 512, 4 * MIB),
    entry("free_requested", A, 10 * MIB + 1),  # another stream still uses it
    entry("segment_alloc", C, 16 * MIB),
    entry("alloc", C, 16 * MIB),  # 16 MiB - 512 B are left of the 30, 10 MiB + 512 B wait
    entry("free_completed", A, 10 * MIB + 1),
    entry("alloc", A, 10 * MIB),
    *freed(C, 16 * MIB),
    *freed(S, 100),
    *freed(S + 512, 1000),
]
RETRY = [
    entry("segment_free", C, 16 * MIB),  # the device is full: all whole free segments go
    entry("segment_free", S, 2 * MIB),
    entry("segment_alloc", D, 40 * MIB),
    entry("alloc", D, 39 * MIB + 5),
]


def test_a_recorded_history_is_met_event_by_event() -> None:
    got = replay_recorded([], TRACE + RETRY)
    assert got.is_exact, got.first_difference
    assert (got.n_requests, got.n_segment_events, got.n_equal) == (9, 7, 7)
    assert (got.n_extra, got.n_moved, got.unknown_frees) == (0, 0, 0)
    # 30 + 2 + 20 + 16, then 30 + 20 + 40
    assert got.recorded_peak_bytes == got.simulated_peak_bytes == 90 * MIB


def test_the_cache_may_be_emptied_between_requests_and_at_the_end() -> None:
    emptied = [entry("segment_free", C, 16 * MIB), entry("segment_free", S, 2 * MIB)]
    got = replay_recorded([], [*TRACE, *emptied, entry("alloc", A + 10 * MIB, 512)])
    # 512 B are of the small pool, whose segment has gone: the simulator takes one that was not recorded
    assert got.first_difference is not None and "segment_alloc of 2097152 bytes" in got.first_difference
    assert (got.n_equal, got.n_extra) == (6, 1)
    assert replay_recorded([], [*TRACE, *emptied]).is_exact


def test_running_out_of_memory_is_met_too() -> None:
    out = [
        *TRACE,
        *RETRY[:2],
        entry("oom", 10 * MIB, 60 * MIB),
        entry("segment_alloc", C, 20 * MIB),
        entry("alloc", C, 20 * MIB),
    ]
    assert replay_recorded([], out).n_segment_events == 7


@pytest.mark.parametrize(
    "place, instead, said",
    [
        (
            0,
            entry("segment_alloc", A, 32 * MIB),
            "segment_alloc of 31457280 bytes at 0x7f1000000000 is simulated alone",
        ),
        (4, entry("alloc", S + 1024, 1000), "1000 bytes at 0x7f5000000400, simulated at 0x7f5000000200"),
        (14, entry("free_completed", B, 1), "10485760 bytes at 0x7f1000000000, simulated at"),
        (5, entry("free_requested", D, 30 * MIB), "what is freed at 0x7f4000000000 is not known"),
    ],
)
def test_a_history_that_breaks_the_rules_is_found_out(place: int, instead: dict[str, Any], said: str) -> None:
    trace = TRACE[:place] + [instead] + TRACE[place + 1 :]
    got = replay_recorded([], trace)
    assert not got.is_exact and got.first_difference is not None and said in got.first_difference


def segment(address: int, blocks: list[tuple[int, int]], kind: str = "large", **more: Any) -> dict[str, Any]:
    """Blocks: size, and bytes asked for (0: free)."""
    listed = [
        {"size": size, "requested_size": asked, "state": "active_allocated" if asked else "inactive", "frames": []}
        for size, asked in blocks
    ]
    total = sum(size for size, _ in blocks)
    return {"address": address, "total_size": total, "stream": 0, "segment_type": kind, "blocks": listed, **more}


def test_a_history_may_begin_in_the_middle() -> None:
    before = [
        segment(A, [(10 * MIB, 10 * MIB - 3), (20 * MIB, 0)]),
        segment(S, [(512, 9), (2 * MIB - 512, 0)], "small"),
    ]
    trace = [
        *freed(A, 10 * MIB - 3),
        entry("alloc", A, 30 * MIB),  # 10 and 20 have become one
        entry("alloc", S + 512, 512),
    ]
    got = replay_recorded(before, trace)
    assert got.is_exact and got.recorded_peak_bytes == got.simulated_peak_bytes == 32 * MIB


def test_expandable_segments() -> None:
    settings = AllocatorSettings.parse("expandable_segments:True")
    trace = [
        entry("segment_map", A, 40 * MIB),
        entry("alloc", A, 30 * MIB),
        entry("segment_map", A + 40 * MIB, 20 * MIB),
        entry("alloc", A + 30 * MIB, 25 * MIB),
        *freed(A, 30 * MIB),
        entry("segment_unmap", A, 20 * MIB),  # the device is full; of the free 30 MiB one piece is whole
        entry("segment_map", A + 60 * MIB, 40 * MIB),
        entry("alloc", A + 55 * MIB, 45 * MIB),
    ]
    got = replay_recorded([], trace, settings)
    assert (got.first_difference, got.n_equal, got.simulated_peak_bytes) == (None, 4, 80 * MIB)
    half = [segment(A, [(30 * MIB, 0), (25 * MIB, 25 * MIB), (5 * MIB, 0)], is_expandable=True)]
    assert replay_recorded(half, trace[6:], settings).is_exact


def test_the_settings_of_a_snapshot() -> None:
    assert settings_of(
        {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}
    ).expandable_segments
    assert settings_of({}) == AllocatorSettings()
    with pytest.raises(InputError, match="allocator option is 'graph'"):
        settings_of({"allocator_settings": {"PYTORCH_ALLOC_CONF": "graph:1"}})
