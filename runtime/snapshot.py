"""Device memory by category, from PyTorch's allocator history and what a ledger knows. Plain data in, plain data out.

The allocator writes down every allocation and release (``torch.cuda.memory._record_memory_history``; format:
``torch.cuda.memory._snapshot``); the ledger knows which tensors there are and what they are for. Replaying the first and
naming its blocks by the second gives every byte at the peak a category:

- an allocation that the ledger saw has the ledger's category;
- any other is ``workspace``: what cuBLAS, attention, sorting and scratch outside of the metered tensors take;
- ``fragmentation`` is what the allocator holds beyond what was asked for: free blocks, the rest of blocks that were not
  split, and rounding to 512 B. The last is also given on its own, as ``rounding_bytes``.

A block counts until its release is completed, so one that waits for another stream is still there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

ROUNDING_BYTES = 512
"""The allocator's smallest step (``kMinBlockSize`` in c10/cuda/CUDACachingAllocator)."""
_GROWTH = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


class Named(NamedTuple):
    """An allocation that the ledger saw."""

    n_before: int
    """Allocations that the history holds when it was seen: it is one of these, or older than the history."""
    address: int
    category: str


def attribute(
    before: Sequence[Mapping[str, Any]], trace: Iterable[Mapping[str, Any]], named: Iterable[Named]
) -> dict[str, Any]:
    """Bytes by category at the moment when most bytes are allocated, and each category's own maximum.

    ``before``: ``segments`` of a snapshot taken when the history began; ``trace``: the device's entry of ``device_traces``.
    Returns ``category_bytes_at_peak`` (``fragmentation`` included), ``category_peak_bytes``, ``peak_bytes`` (as asked
    for, without rounding), ``reserved_bytes`` and ``rounding_bytes`` at the peak, ``peak_reserved_bytes``, and two
    numbers that are 0 when both sides tell the same story: ``unmatched`` of ``named``, whose address holds no
    allocation, and ``unknown_frees``, releases of what was never allocated.
    """
    trace = list(trace)
    older = {
        _address_of(segment, index): block["requested_size"]
        for segment in before
        for index, block in enumerate(segment["blocks"])
        if block["state"].startswith("active")
    }
    categories, unmatched = _match(older, trace, named)
    replay = _Replay(sum(segment["total_size"] for segment in before))
    for address, size in older.items():
        replay.add(address, size, categories.get((address, 0), "workspace"))
    replay.look()
    n_allocations = 0
    for entry in trace:
        action = entry["action"]
        if action == "alloc":
            n_allocations += 1
            replay.add(entry["addr"], entry["size"], categories.get((entry["addr"], n_allocations), "workspace"))
        elif action == "free_completed":
            replay.drop(entry["addr"])
        elif action in _GROWTH:
            replay.grow(_GROWTH[action] * entry["size"])
        replay.look()
    return {**replay.result(), "unmatched": unmatched}


def _address_of(segment: Mapping[str, Any], index: int) -> int:
    """A block's address; older formats leave it out, blocks then follow one another."""
    blocks = segment["blocks"]
    if "address" in blocks[index]:
        return blocks[index]["address"]
    return segment["address"] + sum(block["size"] for block in blocks[:index])


def _match(
    older: Mapping[int, int], trace: Sequence[Mapping[str, Any]], named: Iterable[Named]
) -> tuple[dict[tuple[int, int], str], int]:
    """Category by (address, number of the allocation in the history, 0 for an older one), and how many match none.

    An address is used again and again; the ledger's tensor lives in the last allocation there before it was seen.
    """
    births: dict[int, list[int]] = {address: [0] for address in older}
    n_allocations = 0
    for entry in trace:
        if entry["action"] == "alloc":
            n_allocations += 1
            births.setdefault(entry["addr"], []).append(n_allocations)
    categories: dict[tuple[int, int], str] = {}
    unmatched = 0
    for item in named:
        here = births.get(item.address, [])
        place = bisect_right(here, item.n_before)
        if place == 0:
            unmatched += 1
        else:
            categories[item.address, here[place - 1]] = item.category
    return categories, unmatched


class _Replay:
    """Live allocations by category, with the state at the peak."""

    def __init__(self, reserved_bytes: int) -> None:
        self._blocks: dict[int, tuple[int, str]] = {}
        self._live: dict[str, int] = {}
        self._rounding = 0
        self._total = 0
        self._reserved = self._peak_reserved = reserved_bytes
        self._category_peak: dict[str, int] = {}
        self._peak = -1
        self._unknown_frees = 0
        self._at_peak: dict[str, Any] = {}

    def add(self, address: int, size: int, category: str) -> None:
        self._blocks[address] = (size, category)
        self._count(category, size, -size % ROUNDING_BYTES)

    def drop(self, address: int) -> None:
        if address not in self._blocks:
            self._unknown_frees += 1
            return
        size, category = self._blocks.pop(address)
        self._count(category, -size, -(-size % ROUNDING_BYTES))

    def _count(self, category: str, delta: int, rounding: int) -> None:
        value = self._live.get(category, 0) + delta
        self._live[category] = value
        self._total += delta
        self._rounding += rounding
        self._category_peak[category] = max(self._category_peak.get(category, 0), value)

    def grow(self, delta: int) -> None:
        self._reserved += delta
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    def look(self) -> None:
        """Remember this moment if no earlier one had as many bytes."""
        if self._total <= self._peak:
            return
        self._peak = self._total
        named = {category: n_bytes for category, n_bytes in self._live.items() if n_bytes}
        self._at_peak = {
            "category_bytes_at_peak": {**named, "fragmentation": self._reserved - self._total},
            "peak_bytes": self._total,
            "reserved_bytes": self._reserved,
            "rounding_bytes": self._rounding,
        }

    def result(self) -> dict[str, Any]:
        category_peak = {category: n_bytes for category, n_bytes in self._category_peak.items() if n_bytes}
        return {
            **self._at_peak,
            "category_peak_bytes": category_peak,
            "peak_reserved_bytes": self._peak_reserved,
            "unknown_frees": self._unknown_frees,
        }
