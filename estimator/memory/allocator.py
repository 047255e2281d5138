"""PyTorch's CUDA caching allocator, in plain Python: which segments it takes from the device for a given order of requests.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` and ``c10/core/AllocatorConfig.h`` of torch 2.11 to 2.13, class
``DeviceCachingAllocator``; methods say which of its functions they are. CUDA graphs' private pools are left out.

A *segment* is what was asked of the device; it is cut into *blocks*. Sizes are rounded to 512 B. Blocks of at most 1 MiB live
in small segments (2 MiB), others in large ones; every stream has its own pool of either. The smallest free block that is large
enough is taken, of equal ones that at the lowest address.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from estimator.memory.allocator_settings import (
    MIN_BLOCK_BYTES,
    MIN_LARGE_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorSettings,
)
from estimator.memory.blocks import (
    Block,
    Device,
    Pool,
    Range,
    SegmentEvent,
    Upwards,
    allocatable,
    grown,
    link,
    merge,
    remove,
)


class DeviceOutOfMemory(Exception):
    """A request that could not be met, even after all cached segments had been given back."""

    def __init__(self, n_bytes: int, allocator: CachingAllocator) -> None:
        super().__init__(f"{n_bytes} bytes asked for, {allocator.reserved_bytes} reserved")
        self.n_bytes = n_bytes


class CachingAllocator:
    """One device's allocator.

    ``limit_bytes``: what it can take from the device (``None``: any number); ``address_bytes``: of an expandable segment;
    ``on_segment`` is told of every segment taken, given back, mapped or unmapped.
    """

    def __init__(
        self, settings: AllocatorSettings | None = None, limit_bytes: int | None = None, device: Device | None = None,
        on_segment: Callable[[SegmentEvent], None] | None = None, address_bytes: int = 1 << 40,
    ) -> None:  # fmt: skip
        self.settings = settings or AllocatorSettings()
        self.limit_bytes, self.address_bytes = limit_bytes, address_bytes
        self._device: Device = device or Upwards()
        self._on_segment = on_segment
        self._pools: dict[tuple[str, bool], Pool] = {}
        self._events: dict[str, list[Block]] = {}
        self._max_split, self._expands = self.settings.max_split_bytes, self.settings.expandable_segments
        self._is_plain = self._max_split is None and not self._expands and not self.settings.collects
        self._round = self.settings.round if self.settings.roundup_power2_divisions else None
        self.reserved_bytes = self.peak_reserved_bytes = 0
        """Bytes taken from the device (``torch.cuda.memory_reserved``)."""
        self.allocated_bytes = self.peak_allocated_bytes = 0
        """Bytes of blocks handed out, rounding included (``torch.cuda.memory_allocated``)."""
        self.requested_bytes = self.peak_requested_bytes = 0
        """The same as asked for. These include blocks that wait for another stream; ``allocated_bytes`` does not."""
        self.reserved_at_peak_bytes = 0
        """Reserved when most was asked for."""
        self.n_retries = 0
        """Requests that gave back all cached segments first (``num_alloc_retries``)."""

    # ---- requests -------------------------------------------------------------------------------------------------

    def malloc(self, n_bytes: int, stream: str = "compute") -> Block | None:
        """``n_bytes`` on ``stream``; ``None`` for none. Raises ``DeviceOutOfMemory``."""
        if n_bytes <= 0:
            return None
        size = (n_bytes + 511) & -512 if self._round is None else self._round(n_bytes)
        is_small = size <= SMALL_BYTES
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = Pool(stream, is_small)
        free = pool.free
        if self._is_plain:
            place = bisect_left(free, (size,))
            block = free.pop(place)[2] if place < len(free) else self._new(pool, size, n_bytes)
        else:
            block = self._search(pool, size) or self._new(pool, size, n_bytes)
        rest = block.size - size
        if rest and (
            rest >= MIN_BLOCK_BYTES
            if is_small or self._expands
            else rest > SMALL_BYTES and (self._max_split is None or size < self._max_split)
        ):  # should_split
            front = Block(block.address, size, pool)
            front.range = block.range
            front.prev, front.next = block.prev, block
            if block.prev is not None:
                block.prev.next = front
            block.prev = front
            block.address += size
            block.size = rest
            block.born = pool.n_searches
            insort(free, (rest, block.address, block))
            block = front
        block.is_free = False
        block.requested = n_bytes
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        self.requested_bytes += n_bytes
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes
            self.reserved_at_peak_bytes = self.reserved_bytes
        return block

    def record_stream(self, block: Block, stream: str) -> None:
        """``stream`` uses ``block`` too: once freed it waits until that stream has done what it had to do then."""
        if stream != block.pool.stream:
            block.used_by = {*(block.used_by or ()), stream}

    def free(self, block: Block) -> None:
        """``block`` is no longer referred to."""
        self.allocated_bytes -= block.size
        if block.used_by:
            for stream in block.used_by:
                self._events.setdefault(stream, []).append(block)
            block.n_events, block.used_by = len(block.used_by), None
        else:
            self._free_block(block)

    def complete(self, stream: str) -> None:
        """``stream`` has done all that it had to do: blocks that waited for it come back."""
        for block in self._events.pop(stream, ()):
            block.n_events -= 1
            if not block.n_events:
                self._free_block(block)

    def restart_peaks(self) -> None:
        """Maxima from now on (``torch.cuda.reset_peak_memory_stats``)."""
        self.peak_reserved_bytes, self.peak_allocated_bytes = self.reserved_bytes, self.allocated_bytes
        self.peak_requested_bytes, self.reserved_at_peak_bytes = self.requested_bytes, self.reserved_bytes

    def state(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Free blocks by pool. Together with the addresses of live blocks it says what will happen next, but for garbage collection."""
        return tuple(tuple(item[:2] for item in pool.free) for pool in self._pools.values())

    def adopt(
        self, pool_of: tuple[str, bool], pieces: Sequence[tuple[int, int, int]], end: int | None = None
    ) -> list[Block]:
        """A segment that exists already: stream and whether its blocks are small; (address, size, bytes asked for, 0 where
        free) of its blocks in order. ``end``: it is expandable and may grow up to there. Its blocks."""
        pool = self._pools.setdefault(pool_of, Pool(*pool_of))
        blocks: list[Block] = []
        for address, size, requested in pieces:
            block = Block(address, size, pool)
            link(block, blocks[-1] if blocks else None, None)
            block.requested, block.is_free = requested, not requested
            if requested:
                self.allocated_bytes += size
                self.requested_bytes += requested
            else:
                insort(pool.free, (size, address, block))
            blocks.append(block)
        self.reserved_bytes += sum(block.size for block in blocks)
        if end is not None:
            first, last = blocks[0], blocks[-1]
            piece = SMALL_SEGMENT_BYTES if pool.is_small else self.settings.large_segment_bytes
            rest = Block(last.address + last.size, end - last.address - last.size, pool)
            rest.is_mapped = False
            link(rest, last, None)
            insort(pool.unmapped, (rest.address, rest))
            segment = Range(first.address, end - first.address, piece)
            for block in (*blocks, rest):
                block.range = segment
        self.restart_peaks()
        return blocks

    # ---- free blocks ----------------------------------------------------------------------------------------------

    def _search(self, pool: Pool, size: int) -> Block | None:
        """``get_free_block``."""
        free, limit = pool.free, self._max_split
        pool.n_searches += 1
        place = bisect_left(free, (size,))
        if place == len(free):
            return None
        if self._expands:  # a block counts as what it can grow to
            while place + 1 < len(free) and grown(free[place + 1][2]) < grown(free[place][2]):
                place += 1
        block = free[place][2]
        if limit is not None:
            if size < limit <= block.size:
                return None
            if size >= limit and block.size >= size + self.settings.max_non_split_rounding_bytes:
                return None
        del free[place]
        return block

    def _free_block(self, block: Block) -> None:
        """``free_block``: merges it with its free neighbours."""
        self.requested_bytes -= block.requested
        pool = block.pool
        block.is_free = True
        near = block.prev
        if near is not None and near.is_free and near.is_mapped and not near.n_events:
            remove(pool.free, near)
            block.address = near.address
            block.size += near.size
            block.prev = near.prev
            if near.prev is not None:
                near.prev.next = block
        near = block.next
        if near is not None and near.is_free and near.is_mapped and not near.n_events:
            remove(pool.free, near)
            block.size += near.size
            block.next = near.next
            if near.next is not None:
                near.next.prev = block
        block.born = pool.n_searches
        insort(pool.free, (block.size, block.address, block))

    # ---- segments -------------------------------------------------------------------------------------------------

    def _new(self, pool: Pool, size: int, n_bytes: int) -> Block:
        """A block of new memory, if need be of what the cache gives back."""
        if self.settings.collects:
            self._collect()
        block = self._alloc_block(pool, size)
        if block is None and self._release_available(pool, size):
            block = self._alloc_block(pool, size)
        if block is None:
            self.empty_cache()
            self.n_retries += 1
            block = self._alloc_block(pool, size)
        if block is None:
            raise DeviceOutOfMemory(n_bytes, self)
        return block

    def _segment_bytes(self, size: int) -> int:
        """``get_allocation_size``."""
        if size <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if size < MIN_LARGE_BYTES:
            return self.settings.large_segment_bytes
        return size + (-size) % ROUND_LARGE_BYTES

    def _alloc_block(self, pool: Pool, size: int) -> Block | None:
        """``alloc_block``."""
        if self._expands:
            return self._expand(pool, size)
        n_bytes = self._segment_bytes(size)
        if not self._has_room(n_bytes):
            return None
        address = self._device.place(n_bytes)
        self._take("segment_alloc", address, n_bytes)
        return Block(address, n_bytes, pool)

    def _has_room(self, n_bytes: int) -> bool:
        fits = self.limit_bytes is None or self.reserved_bytes + n_bytes <= self.limit_bytes
        return fits and self._device.has_room(n_bytes)

    def _take(self, action: str, address: int, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes if action in ("segment_alloc", "segment_map") else -n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        if self._on_segment is not None:
            self._on_segment(SegmentEvent(action, address, n_bytes))

    def _release_available(self, pool: Pool, size: int) -> bool:
        """``release_available_cached_blocks``: one large enough, or several of those that are never split, largest first."""
        limit = self._max_split
        if limit is None:
            return False
        wanted, free = max(size, limit), pool.free
        place = bisect_left(free, (wanted,))
        if place < len(free) and free[place][2].range is None:
            self._release(free[place][2])
            return True
        released = 0
        for block in [item[2] for item in reversed(free[:place])]:
            if released >= wanted or block.size < limit:
                break
            if block.range is None:
                self._release(block)
                released += block.size
        return released >= wanted

    def empty_cache(self) -> None:
        """``release_cached_blocks``: waits for all streams, then gives back every segment that is free as a whole."""
        for stream in list(self._events):
            self.complete(stream)
        for is_small in (False, True):
            for pool in self._pools.values():
                if pool.is_small == is_small:
                    blocks = [item[2] for item in pool.free]
                    for block in blocks:
                        if block.range is None and block.prev is None and block.next is None:
                            self._release(block)
                    for block in blocks:
                        if block.range is not None:
                            self._unmap(block)

    def _release(self, block: Block) -> None:
        """``release_block``."""
        remove(block.pool.free, block)
        self._device.take_back(block.address, block.size)
        self._take("segment_free", block.address, block.size)

    def _collect(self) -> None:
        """``garbage_collect_cached_blocks``: above the threshold gives back whole large segments that lie idle longest."""
        assert self.limit_bytes is not None
        excess = self.reserved_bytes - int(self.settings.garbage_collection_threshold * self.limit_bytes)
        large = [pool for pool in self._pools.values() if not pool.is_small]
        idle = [
            item[2]
            for pool in large
            for item in pool.free
            if item[2].prev is None and item[2].next is None and item[2].range is None
        ]
        total = sum(block.pool.n_searches - block.born for block in idle)
        freed, is_new = 0, True
        while freed < excess and is_new and idle:
            threshold, is_new = total / len(idle), False
            for block in list(idle):
                age = block.pool.n_searches - block.born
                if age >= threshold:
                    is_new = True
                    freed += block.size
                    total -= age
                    idle.remove(block)
                    self._release(block)

    # ---- expandable segments --------------------------------------------------------------------------------------

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """``try_allocate_expandable_block``."""
        block: Block | None = self._find_room(pool, size)
        assert block is not None
        if not block.is_mapped:
            block = self._map(block, min(block.size, size))
        while block is not None and block.size < size:
            after = block.next
            assert after is not None
            block = self._map(after, min(size - block.size, after.size))
        if block is not None:
            remove(pool.free, block)
        return block

    def _find_room(self, pool: Pool, size: int) -> Block:
        """``find_expandable_block``: the first free addresses of any expandable segment that are enough, else a new segment's."""
        for _, block in pool.unmapped:
            first = block.prev if block.prev is not None and allocatable(block.prev) else block
            n_bytes, at = 0, first
            while at is not None and n_bytes < size and allocatable(at):
                n_bytes += at.size
                at = at.next  # type: ignore[assignment]
            if n_bytes >= size:
                return first
        piece = SMALL_SEGMENT_BYTES if pool.is_small else self.settings.large_segment_bytes
        n_bytes = self.address_bytes + (-self.address_bytes) % piece
        address = self._device.place(n_bytes)
        block = Block(address, n_bytes, pool)
        block.is_mapped = False
        block.range = Range(address, n_bytes, piece)
        insort(pool.unmapped, (address, block))
        return block

    def _map(self, block: Block, n_bytes: int) -> Block | None:
        """``map_block``: memory for the first ``n_bytes`` of ``block``, in whole pieces; merged with what lies beside it."""
        assert block.range is not None
        pool = block.pool
        mapped = n_bytes + (-n_bytes) % block.range.piece_bytes
        if not self._has_room(mapped):
            return None
        pool.unmapped.remove((block.address, block))
        block.is_mapped = True
        if mapped < block.size:
            rest = Block(block.address + mapped, block.size - mapped, pool)
            rest.is_mapped, rest.range = False, block.range
            link(rest, block, block.next)
            insort(pool.unmapped, (rest.address, rest))
            block.size = mapped
        address = block.address
        merge(block, block.prev)
        merge(block, block.next)
        block.born = pool.n_searches
        insort(pool.free, (block.size, block.address, block))
        self._take("segment_map", address, mapped)
        return block

    def _unmap(self, block: Block) -> None:
        """``unmap_block``: gives back the whole pieces within a free block."""
        assert block.range is not None
        piece, pool = block.range.piece_bytes, block.pool
        start, end = block.address - block.range.address, block.address + block.size - block.range.address
        first, last = -(-start // piece) * piece, end // piece * piece
        if first >= last:
            return
        remove(pool.free, block)
        if first > start:
            before = Block(block.address, first - start, pool)
            before.range = block.range
            link(before, block.prev, block)
            insort(pool.free, (before.size, before.address, before))
        if end > last:
            after = Block(block.range.address + last, end - last, pool)
            after.range = block.range
            link(after, block, block.next)
            insort(pool.free, (after.size, after.address, after))
        block.address, block.size, block.is_mapped = block.range.address + first, last - first, False
        address, n_bytes = block.address, block.size
        merge(block, block.prev)
        merge(block, block.next)
        insort(pool.unmapped, (block.address, block))
        self._take("segment_unmap", address, n_bytes)
        if block.prev is None and block.next is None:  # release_expandable_segment
            pool.unmapped.remove((block.address, block))
