"""The simulator of PyTorch's caching allocator against traces with known answers, worked out from its rules by hand."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from estimator.errors import InputError
from estimator.memory.allocator import CachingAllocator, DeviceOutOfMemory
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.memory.blocks import Block, SegmentEvent
from estimator.units import MIB

KIB = 1024


def taken(allocator: CachingAllocator, n_bytes: int, stream: str = "compute") -> Block:
    block = allocator.malloc(n_bytes, stream)
    assert block is not None
    return block


# ---- segments and splitting -------------------------------------------------------------------------------------------


def test_small_blocks_share_segments_of_2_mib() -> None:
    a = CachingAllocator()
    first = taken(a, 1)
    assert (first.size, a.allocated_bytes, a.requested_bytes, a.reserved_bytes) == (512, 512, 1, 2 * MIB)
    second = taken(a, 513)  # rounded to 1,024, right behind the first
    assert (second.address - first.address, second.size, a.reserved_bytes) == (512, 1024, 2 * MIB)
    third = taken(a, MIB)  # the largest small request: 2 MiB - 1,536 B are left
    assert third.address - first.address == 1536 and a.reserved_bytes == 2 * MIB
    taken(a, MIB)  # 1 MiB - 1,536 B are left, too little
    assert a.reserved_bytes == 4 * MIB
    assert a.malloc(0) is None


@pytest.mark.parametrize(
    "n_bytes, segment, size",
    [
        # above 1 MiB: large; below 10 MiB a segment of 20 MiB, 19 MiB - 512 B left: split
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 512, 20 * MIB, 10 * MIB - 512),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounds to 10 MiB: a segment of its own, nothing left
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB left is not more than 1 MiB: not split
        (11 * MIB - 512, 12 * MIB, 11 * MIB - 512),  # 1 MiB + 512 B left: split
        (100 * MIB + 1, 102 * MIB, 100 * MIB + 512),  # a segment rounded to 2 MiB; 2 MiB - 512 B left
    ],
)
def test_large_blocks(n_bytes: int, segment: int, size: int) -> None:
    a = CachingAllocator()
    assert taken(a, n_bytes).size == size == a.allocated_bytes
    assert a.reserved_bytes == segment


def test_the_smallest_block_that_is_large_enough_then_the_lowest_address() -> None:
    a = CachingAllocator()
    blocks = [taken(a, n * MIB) for n in (40, 30, 30, 50)]
    forty, thirty, other, _ = (block.address for block in blocks)
    for block in (blocks[0], blocks[2], blocks[1], blocks[3]):
        a.free(block)
    again = taken(a, 25 * MIB)  # of 30, 30, 40, 50: the 30 at the lower address, of which 5 are left
    assert again.address == thirty and a.reserved_bytes == 150 * MIB
    assert taken(a, 4 * MIB).address == thirty + 25 * MIB  # the 5 left there
    assert taken(a, 30 * MIB).address == other
    assert taken(a, 31 * MIB).address == forty
    assert taken(a, 51 * MIB).size == 52 * MIB  # none: a segment of 52 MiB, of which 1 is left
    assert a.reserved_bytes == 202 * MIB


def test_free_neighbours_become_one_block() -> None:
    a = CachingAllocator()
    whole = taken(a, 90 * MIB)
    a.free(whole)
    first, second, third = (taken(a, 30 * MIB) for _ in range(3))  # all cut from the 90
    start = first.address
    assert a.reserved_bytes == 90 * MIB
    a.free(first)
    a.free(third)
    assert taken(a, 40 * MIB).size == 40 * MIB and a.reserved_bytes == 130 * MIB  # 30 + 30 are not neighbours
    a.free(second)
    assert taken(a, 90 * MIB).address == start and a.reserved_bytes == 130 * MIB


def test_pools_are_of_one_stream() -> None:
    a = CachingAllocator()
    a.free(taken(a, 30 * MIB))
    taken(a, 30 * MIB, "gather")
    assert a.reserved_bytes == 60 * MIB
    taken(a, 30 * MIB)
    assert a.reserved_bytes == 60 * MIB


def test_a_block_that_another_stream_uses_waits_for_it() -> None:
    a = CachingAllocator()
    block = taken(a, 30 * MIB)
    start = block.address
    a.record_stream(block, "compute")  # its own: nothing to wait for
    a.record_stream(block, "reduce")
    a.free(block)
    assert (a.allocated_bytes, a.requested_bytes) == (0, 30 * MIB)
    other = taken(a, 30 * MIB)
    assert a.reserved_bytes == 60 * MIB and other.address != start
    a.complete("reduce")
    assert taken(a, 30 * MIB).address == start and a.reserved_bytes == 60 * MIB


# ---- too little room --------------------------------------------------------------------------------------------------


def test_cached_segments_are_given_back_when_the_device_is_full() -> None:
    seen: list[SegmentEvent] = []
    a = CachingAllocator(limit_bytes=100 * MIB, on_segment=seen.append)
    a.free(taken(a, 60 * MIB))
    taken(a, 80 * MIB)  # 60 + 80 > 100: the 60 goes
    assert (a.reserved_bytes, a.peak_reserved_bytes, a.n_retries) == (80 * MIB, 80 * MIB, 1)
    assert [(e.action, e.n_bytes // MIB) for e in seen] == [
        ("segment_alloc", 60),
        ("segment_free", 60),
        ("segment_alloc", 80),
    ]


def test_a_segment_with_a_live_block_cannot_be_given_back() -> None:
    a = CachingAllocator(limit_bytes=100 * MIB)
    whole = taken(a, 60 * MIB)
    a.free(whole)
    taken(a, 10 * MIB)  # cut from the 60
    with pytest.raises(DeviceOutOfMemory):
        taken(a, 51 * MIB)  # 50 are left there, 40 on the device, and 60 + 52 > 100
    assert a.reserved_bytes == 60 * MIB
    assert taken(a, 50 * MIB).size == 50 * MIB


def test_blocks_that_wait_for_a_stream_are_waited_for_before_giving_up() -> None:
    a = CachingAllocator(limit_bytes=100 * MIB)
    block = taken(a, 60 * MIB)
    a.record_stream(block, "reduce")
    a.free(block)
    assert taken(a, 100 * MIB).size == 100 * MIB and a.n_retries == 1


# ---- options ----------------------------------------------------------------------------------------------------------


def test_blocks_of_max_split_size_are_whole() -> None:
    a = CachingAllocator(AllocatorSettings.parse("max_split_size_mb:64"))
    block = taken(a, 100 * MIB)
    a.free(block)
    taken(a, 30 * MIB)  # a 100 is not cut for it
    assert a.reserved_bytes == 130 * MIB
    taken(a, 75 * MIB)  # 100 >= 75 + 20: too much to waste; 76 MiB, unsplit
    assert a.reserved_bytes == 206 * MIB
    assert taken(a, 90 * MIB).size == 100 * MIB  # 100 < 90 + 20: taken whole
    assert a.reserved_bytes == 206 * MIB


def test_oversize_blocks_are_given_back_before_all_others() -> None:
    a = CachingAllocator(AllocatorSettings.parse("max_split_size_mb:64"), limit_bytes=300 * MIB)
    for block in [taken(a, n * MIB) for n in (30, 70, 90)]:
        a.free(block)
    # 190 + 200 > 300; no free block of 200: 90 and 70 go, the largest first; 160 are not enough, so all go
    taken(a, 200 * MIB)
    assert (a.reserved_bytes, a.n_retries) == (200 * MIB, 1)
    a = CachingAllocator(AllocatorSettings.parse("max_split_size_mb:64"), limit_bytes=300 * MIB)
    for block in [taken(a, n * MIB) for n in (30, 70, 190)]:
        a.free(block)
    # 290 + 100 > 300; the 190 is too large to hand out (>= 100 + 20): it goes, and no retry is counted
    taken(a, 100 * MIB)
    assert (a.reserved_bytes, a.n_retries) == (200 * MIB, 0)


def test_an_expandable_segment_grows_by_20_mib() -> None:
    seen: list[SegmentEvent] = []
    a = CachingAllocator(AllocatorSettings.parse("expandable_segments:True"), on_segment=seen.append)
    first = taken(a, 30 * MIB)  # 2 pieces; 10 MiB left
    start = first.address
    assert a.reserved_bytes == 40 * MIB
    second = taken(a, 25 * MIB)  # 10 are there, 15 more: one piece; 5 left
    assert a.reserved_bytes == 60 * MIB and second.address == start + 30 * MIB
    a.free(first)
    third = taken(a, 35 * MIB)  # 30 at the start, 5 at the end and what follows: 30 more, 2 pieces
    assert a.reserved_bytes == 100 * MIB and third.address == second.address + 25 * MIB
    small = taken(a, 100)  # an expandable segment of small blocks: 2 MiB
    assert a.reserved_bytes == 102 * MIB and small.size == 512
    assert [(e.action, e.address - start, e.n_bytes // MIB) for e in seen[:3]] == [
        ("segment_map", 0, 40), ("segment_map", 40 * MIB, 20), ("segment_map", 60 * MIB, 40)
    ]  # fmt: skip


def test_an_expandable_segment_gives_back_whole_pieces() -> None:
    seen: list[SegmentEvent] = []
    settings = AllocatorSettings.parse("expandable_segments:True")
    a = CachingAllocator(settings, limit_bytes=100 * MIB, on_segment=seen.append)
    first, second = taken(a, 50 * MIB), taken(a, 10 * MIB)  # 60 mapped
    start = first.address
    a.free(first)
    third = taken(a, 70 * MIB)  # 30 MiB short: of the free 50, 2 pieces go (40), and the segment grows by 80
    assert [(e.action, e.address - start, e.n_bytes // MIB) for e in seen[-2:]] == [
        ("segment_unmap", 0, 40), ("segment_map", 60 * MIB, 80)
    ]  # fmt: skip
    assert (a.reserved_bytes, third.address - start, a.n_retries) == (100 * MIB, 60 * MIB, 1)
    a.free(second)
    assert taken(a, 20 * MIB).address == start + 40 * MIB  # 10 left of the first and 10 of the second are one block


def test_idle_segments_are_collected_above_the_threshold() -> None:
    a = CachingAllocator(AllocatorSettings.parse("garbage_collection_threshold:0.5"), limit_bytes=200 * MIB)
    old, new = taken(a, 60 * MIB), taken(a, 70 * MIB)
    a.free(old)  # after 2 searches
    taken(a, 20 * MIB)  # cut from the 60: no longer a whole segment
    a.free(new)
    taken(a, 80 * MIB)  # 130 > 100: the 70 goes (it alone is whole); 60 + 80 are left
    assert (a.reserved_bytes, a.n_retries) == (140 * MIB, 0)


@pytest.mark.parametrize(
    "option, n_bytes, rounded",
    [
        ("roundup_power2_divisions:4", 2000, 2048),  # at most 4 x 512: to 512 B
        ("roundup_power2_divisions:4", 5000, 5120),  # steps of 4,096 / 4
        ("roundup_power2_divisions:4", 8192, 8192),
        ("roundup_power2_divisions:4", 9 * MIB, 10 * MIB),  # steps of 8 MiB / 4
        ("roundup_power2_divisions:[4:1,8:8,>:2]", 5 * MIB, 5 * MIB),  # from 4 MiB: 1, which rounds to 512 B
        ("roundup_power2_divisions:[4:1,8:8,>:2]", 9 * MIB + 1, 10 * MIB),  # from 8 MiB: steps of 1 MiB
        ("roundup_power2_divisions:[4:1,8:8,>:2]", 17 * MIB, 24 * MIB),  # above: steps of 16 MiB / 2
    ],
)
def test_rounding_to_divisions_of_powers_of_two(option: str, n_bytes: int, rounded: int) -> None:
    assert AllocatorSettings.parse(option).round(n_bytes) == rounded


def test_options_are_read_as_pytorch_reads_them() -> None:
    assert AllocatorSettings.parse("") == AllocatorSettings()
    assert AllocatorSettings.parse("expandable_segments:True, large_segment_size_mb:40") == AllocatorSettings(
        expandable_segments=True, large_segment_bytes=40 * MIB
    )
    for text, said in [
        ("expandable_segment:True", "did you mean 'expandable_segments'"),
        ("expandable_segments:yes", "allowed: True, False"),
        ("max_split_size_mb:20", "at least 21"),
        ("max_split_size_mb:big", "a number"),
        ("garbage_collection_threshold:1", "between 0 and 1"),
        ("roundup_power2_divisions:3", "a power of two"),
        ("expandable_segments", "name:value"),
    ]:
        with pytest.raises(InputError, match=said):
            AllocatorSettings.parse(text)


# ---- properties -------------------------------------------------------------------------------------------------------

OPTIONS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:64",
    "roundup_power2_divisions:8",
    "garbage_collection_threshold:0.6",
)


def played(seed: int, options: str, limit_bytes: int | None, check: bool = True) -> CachingAllocator | None:
    """A random trace; ``None`` where memory runs out."""
    rng = random.Random(seed)
    settings = AllocatorSettings.parse(options)
    if settings.collects and limit_bytes is None:
        limit_bytes = 1 << 40
    a = CachingAllocator(settings, limit_bytes)
    live: list[Block] = []
    try:
        for _ in range(300):
            if live and rng.random() < 0.47:
                block = live.pop(rng.randrange(len(live)))
                if rng.random() < 0.1:
                    a.record_stream(block, "reduce")
                a.free(block)
            else:
                stream = "gather" if rng.random() < 0.2 else "compute"
                live.append(taken(a, int(2 ** rng.uniform(6, 26)), stream))
            if rng.random() < 0.1:
                a.complete("reduce")
            if check:
                holds(a, live)
    except DeviceOutOfMemory:
        return None
    for block in live:
        a.free(block)
    a.complete("reduce")
    if check:
        holds(a, [])
    return a


def holds(a: CachingAllocator, live: list[Block]) -> None:
    """What is true of an allocator at any time."""
    assert a.requested_bytes <= a.reserved_bytes and sum(b.size for b in live) == a.allocated_bytes <= a.reserved_bytes
    assert a.reserved_bytes % (2 * MIB) == 0 and a.reserved_bytes <= (a.limit_bytes or a.reserved_bytes)
    spans: list[tuple[int, int]] = [(b.address, b.size) for b in live]
    for pool in a._pools.values():
        assert pool.free == sorted(pool.free, key=lambda item: item[:2])
        for size, address, block in pool.free:
            assert (size, address, block.is_free, block.is_mapped) == (block.size, block.address, True, True)
            for near in (block.prev, block.next):
                assert near is None or not (near.is_free and near.is_mapped and not near.n_events), (
                    "unmerged neighbours"
                )
            assert block.next is None or block.next.address == address + size
            spans.append((address, size))
    spans.sort()
    assert all(here + size <= there for (here, size), (there, _) in pairwise(spans)), "overlap"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("limit_mib", [None, 400])
def test_blocks_never_overlap_and_free_ones_are_merged(options: str, limit_mib: int | None) -> None:
    ended = [played(seed, options, limit_mib and limit_mib * MIB) for seed in range(8)]
    assert any(ended)
    for a in filter(None, ended):
        assert a.allocated_bytes == a.requested_bytes == 0
        assert a.peak_requested_bytes <= a.peak_reserved_bytes and a.peak_allocated_bytes <= a.peak_reserved_bytes
        assert sum(size for pool in a._pools.values() for size, _, _ in pool.free) == a.reserved_bytes


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_room_beyond_what_is_needed_changes_nothing(options: str) -> None:
    """A run without retries is the run without a limit, under this limit and any larger one; below what lives it ends."""
    for seed in range(8):
        free = played(seed, options, None, check=False)
        assert free is not None and free.n_retries == 0
        need = free.peak_reserved_bytes
        for limit in (need, need + 2 * MIB, 2 * need):
            same = played(seed, options, limit, check=False)
            assert same is not None and (same.n_retries, same.peak_reserved_bytes) == (0, need)
        assert played(seed, options, free.peak_allocated_bytes - 2 * MIB, check=False) is None
