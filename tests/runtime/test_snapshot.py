"""Allocator histories written by hand, in the format of ``torch.cuda.memory._snapshot``, with known answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.history import AllocatorHistory
from runtime.ledger import Block, Ledger
from runtime.snapshot import Named, attribute

MIB = 1 << 20


def segment(address: int, total: int, *blocks: tuple[int, int, str]) -> dict[str, Any]:
    """A segment with (address, requested bytes, state) blocks."""
    listed = [{"address": a, "size": -(-r // 512) * 512, "requested_size": r, "state": s} for a, r, s in blocks]
    return {"address": address, "total_size": total, "device": 0, "blocks": listed}


def alloc(address: int, size: int) -> dict[str, Any]:
    return {"action": "alloc", "addr": address, "size": size, "stream": 0}


def free(address: int, size: int) -> list[dict[str, Any]]:
    return [{"action": a, "addr": address, "size": size, "stream": 0} for a in ("free_requested", "free_completed")]


def test_categories_workspace_and_fragmentation_at_the_peak() -> None:
    before = [segment(0, 2 * MIB, (0, 1000, "active_allocated"), (1024, 2000, "inactive"))]
    trace = [
        alloc(4096, 600),
        alloc(8192, 5000),
        *free(4096, 600),
        alloc(4096, 100),
        {"action": "snapshot", "addr": 0, "size": 0},
    ]
    found = attribute(before, trace, [Named(0, 0, "params"), Named(1, 4096, "activations")])
    assert found == {
        "category_bytes_at_peak": {
            "params": 1000, "activations": 600, "workspace": 5000, "fragmentation": 2 * MIB - 6600,
        },
        "category_peak_bytes": {"params": 1000, "activations": 600, "workspace": 5100},
        "peak_bytes": 6600,
        "reserved_bytes": 2 * MIB,
        "rounding_bytes": 24 + 424 + 120,  # up to 1024, 1024, 5120
        "peak_reserved_bytes": 2 * MIB,
        "unknown_frees": 0,
        "unmatched": 0,
    }  # fmt: skip


def test_an_address_used_again_by_another_category() -> None:
    trace = [alloc(0, 512), *free(0, 512), alloc(0, 1024), *free(0, 1024), alloc(0, 2048)]
    named = [Named(1, 0, "temporaries"), Named(2, 0, "activations")]
    found = attribute([segment(0, 4096)], trace, named)
    assert found["category_peak_bytes"] == {"temporaries": 512, "activations": 1024, "workspace": 2048}
    assert found["category_bytes_at_peak"] == {"workspace": 2048, "fragmentation": 2048}


def test_blocks_from_before_the_history_are_named_and_released() -> None:
    """Seen in the step or not, in a segment that gives addresses or (older formats) only sizes."""
    first = segment(
        100 * MIB, 4096, (100 * MIB, 512, "active_allocated"), (100 * MIB + 512, 1024, "active_awaiting_free")
    )
    second = segment(200 * MIB, 4096, (200 * MIB, 1536, "inactive"), (200 * MIB + 1536, 512, "active_allocated"))
    for block in second["blocks"]:
        del block["address"]
    trace = [*free(100 * MIB + 512, 1024), *free(100 * MIB, 512), alloc(100 * MIB, 256)]
    named = [Named(0, 100 * MIB, "params"), Named(0, 200 * MIB + 1536, "grads"), Named(1, 100 * MIB, "temporaries")]
    found = attribute([first, second], trace, named)
    assert found["category_bytes_at_peak"] == {"params": 512, "grads": 512, "workspace": 1024, "fragmentation": 6144}
    assert found["category_peak_bytes"] == {"params": 512, "grads": 512, "workspace": 1024, "temporaries": 256}


def test_a_block_that_waits_for_another_stream_is_still_there() -> None:
    requested, completed = free(0, 512)
    found = attribute([segment(0, 2048)], [alloc(0, 512), requested, alloc(512, 512), completed], [])
    assert found["peak_bytes"] == 1024


def test_segments_that_come_and_go() -> None:
    grown = {"action": "segment_alloc", "addr": 0, "size": 4096, "stream": 0}
    mapped = {"action": "segment_map", "addr": 4096, "size": 2048, "stream": 0}
    gone = {"action": "segment_free", "addr": 0, "size": 4096, "stream": 0}
    found = attribute([], [grown, alloc(0, 512), *free(0, 512), mapped, gone, alloc(4096, 600)], [])
    assert (found["peak_reserved_bytes"], found["reserved_bytes"], found["peak_bytes"]) == (6144, 2048, 600)
    assert found["category_bytes_at_peak"]["fragmentation"] == 2048 - 600


def test_stories_that_differ_are_told() -> None:
    found = attribute([], [*free(512, 512), alloc(0, 512)], [Named(0, 0, "params"), Named(1, 9999, "grads")])
    assert (found["unknown_frees"], found["unmatched"]) == (1, 2)
    assert found["category_peak_bytes"] == {"workspace": 512}


class FakeAllocator:
    """What ``AllocatorHistory`` asks of ``torch.cuda``; memory is handed out by the test."""

    def __init__(self) -> None:
        self.count, self.trace, self.recording, self.options = 5, [], False, {}
        self.segments = [segment(0, MIB, (0, 512, "active_allocated")), {**segment(0, MIB), "device": 1}]
        self.memory = SimpleNamespace(_record_memory_history=self.record, _snapshot=self.snapshot)

    def record(self, enabled: str | None, context: Any = None, clear_history: bool = False) -> None:
        assert (enabled, clear_history) in (("all", True), (None, False))
        self.recording = enabled == "all"

    def snapshot(self) -> dict[str, Any]:
        traces = [self.trace, [alloc(0, 77)]]
        return {"segments": self.segments, "device_traces": traces, "allocator_settings": self.options}

    def synchronize(self) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def memory_stats_as_nested_dict(self) -> dict[str, Any]:
        return {"allocation": {"all": {"allocated": self.count}}}

    def alloc(self, address: int, size: int) -> None:
        self.count += 1
        self.trace.append(alloc(address, size))


def test_history_joins_the_ledgers_blocks() -> None:
    cuda = FakeAllocator()
    history = AllocatorHistory(cuda)
    with history:
        assert cuda.recording
        history.note(0, Block(512, "params", False, 0))
        late = Block(1024, "undecided", False, 0)
        cuda.alloc(512, 1024)
        history.note(512, late)
        history.note(4242, Block(8, "grads", True, 0))  # the host's
        cuda.alloc(2048, 64)
        late.category = "activations"  # decided when its pass was over
    assert not cuda.recording
    assert history.attribution()["category_bytes_at_peak"] == {
        "params": 512, "activations": 1024, "workspace": 64, "fragmentation": MIB - 1600,
    }  # fmt: skip


def test_the_simulator_is_held_against_what_was_recorded() -> None:
    cuda = FakeAllocator()
    cuda.segments = []
    history = AllocatorHistory(cuda)
    with history:
        cuda.trace.append({"action": "segment_alloc", "addr": 4 * MIB, "size": 2 * MIB, "stream": 0})
        cuda.alloc(4 * MIB, 1000)
        cuda.alloc(4 * MIB + 1024, 10)
    got = history.attribution()["simulated"]
    assert (got["first_difference"], got["n_equal"], got["n_segment_events"], got["n_moved"]) == (None, 1, 1, 0)
    cuda.options = {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
    with history:
        pass
    assert "backend" in history.attribution()["simulated"]["refused"]


def test_recording_ends_when_the_step_fails() -> None:
    cuda = FakeAllocator()
    with pytest.raises(ValueError), AllocatorHistory(cuda):
        raise ValueError
    assert not cuda.recording


def test_a_ledger_tells_addresses_of_all_that_it_counts() -> None:
    seen: list[tuple[int, Block]] = []
    ledger = Ledger(lambda address, block: seen.append((address, block)))
    with ledger:
        x = torch.ones(100)
        y = x + 1
        _ = y[3:]  # a view: no memory of its own
    assert [(address, block.n_bytes) for address, block in seen] == [(x.data_ptr(), 400), (y.data_ptr(), 400)]
