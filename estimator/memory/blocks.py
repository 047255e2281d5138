"""What the simulated allocator works with: blocks, pools of them, and the device that segments come from."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple, Protocol

from estimator.memory.allocator_settings import ROUND_LARGE_BYTES


class Block:
    """A piece of a segment: handed out, free, or waiting for another stream."""

    __slots__ = (
        "address",
        "born",
        "is_free",
        "is_mapped",
        "n_events",
        "next",
        "pool",
        "prev",
        "range",
        "requested",
        "size",
        "used_by",
    )  # fmt: skip

    def __init__(self, address: int, size: int, pool: Pool) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.requested = 0
        self.prev: Block | None = None
        self.next: Block | None = None
        self.is_free = True
        self.is_mapped = True
        self.range: Range | None = None
        """The expandable segment that it is a part of."""
        self.used_by: set[str] | None = None
        """Streams other than its own that use it."""
        self.n_events = 0
        """Of those, how many had work left when it was freed, and have."""
        self.born = 0
        """Searches of its pool until it became free (for garbage collection)."""


class Pool:
    """Blocks of one kind and stream."""

    __slots__ = ("free", "is_small", "n_searches", "stream", "unmapped")

    def __init__(self, stream: str, is_small: bool) -> None:
        self.stream, self.is_small = stream, is_small
        self.free: list[tuple[int, int, Block]] = []
        """Sorted: (size, address, block)."""
        self.unmapped: list[tuple[int, Block]] = []
        """Sorted: (address, block) of expandable segments where there is no memory yet."""
        self.n_searches = 0


class Range:
    """An expandable segment: addresses that get memory piece by piece."""

    __slots__ = ("address", "piece_bytes", "size")

    def __init__(self, address: int, size: int, piece_bytes: int) -> None:
        self.address, self.size, self.piece_bytes = address, size, piece_bytes


class SegmentEvent(NamedTuple):
    """What the allocator asks of the device, named as in PyTorch's memory history."""

    action: str
    """``segment_alloc``, ``segment_free``, ``segment_map``, ``segment_unmap``."""
    address: int
    n_bytes: int


class Device(Protocol):
    """Where segments come from."""

    def has_room(self, n_bytes: int) -> bool:
        """Whether it has ``n_bytes`` more."""

    def place(self, n_bytes: int) -> int:
        """Address of a new segment of ``n_bytes``."""

    def take_back(self, address: int, n_bytes: int) -> None:
        """The segment is free again."""


class Upwards:
    """Numbers addresses upwards; those of a segment given back go to the next one of its size."""

    def __init__(self) -> None:
        self._next = 0x7F00_0000_0000
        self._free: dict[int, list[int]] = {}

    def has_room(self, n_bytes: int) -> bool:
        return True

    def place(self, n_bytes: int) -> int:
        if free := self._free.get(n_bytes):
            return free.pop(0)
        address, self._next = self._next, self._next + n_bytes + (-n_bytes) % ROUND_LARGE_BYTES
        return address

    def take_back(self, address: int, n_bytes: int) -> None:
        insort(self._free.setdefault(n_bytes, []), address)


def grown(block: Block) -> int:
    """What a block of an expandable segment can grow to."""
    after = block.next
    return block.size + (after.size if after is not None and not after.is_mapped else 0)


def allocatable(block: Block) -> bool:
    return block.is_free and not block.n_events


def remove(free: list[tuple[int, int, Block]], block: Block) -> None:
    del free[bisect_left(free, (block.size, block.address))]


def link(block: Block, before: Block | None, after: Block | None) -> None:
    """Puts ``block`` between two neighbours."""
    block.prev, block.next = before, after
    if before is not None:
        before.next = block
    if after is not None:
        after.prev = block


def merge(block: Block, other: Block | None) -> None:
    """``try_merge_blocks``: a free neighbour with or without memory, like ``block``, becomes a part of it."""
    if other is None or not allocatable(other) or other.is_mapped != block.is_mapped:
        return
    if block.prev is other:
        block.address = other.address
    link(block, *((other.prev, block.next) if block.prev is other else (block.prev, other.next)))
    block.size += other.size
    if other.is_mapped:
        remove(block.pool.free, other)
    else:
        block.pool.unmapped.remove((other.address, other))
