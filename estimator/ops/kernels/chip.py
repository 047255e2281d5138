"""A GPU as launches see it: sizes of blocks and grids per architecture."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.kernels import ARCHITECTURES


class Tile(NamedTuple):
    """Sizes that depend on the chip. None of them has been measured yet."""

    threads: int
    """Threads of a block of an elementwise kernel."""
    unroll: int
    """Packs that one thread of an elementwise kernel loads before it computes."""
    row_elements: int
    """Most elements of a row that one thread holds (forward pass of a norm)."""
    row_elements_backward: int
    resident_threads: int
    """Threads of a persistent grid on each multiprocessor."""


_TILES = {
    70: Tile(threads=256, unroll=2, row_elements=16, row_elements_backward=16, resident_threads=1024),
    80: Tile(threads=256, unroll=2, row_elements=32, row_elements_backward=16, resident_threads=1024),
    90: Tile(threads=256, unroll=2, row_elements=32, row_elements_backward=16, resident_threads=1024),
    100: Tile(threads=256, unroll=4, row_elements=32, row_elements_backward=16, resident_threads=1024),
}


class Chip(NamedTuple):
    arch: int
    """Compute capability, major * 10 + minor."""
    n_sms: int
    tile: Tile

    def persistent_blocks(self, threads: int) -> int:
        """Blocks of ``threads`` threads that fill the chip once."""
        return self.n_sms * max(1, self.tile.resident_threads // threads)


def tile_of(arch: int) -> Tile:
    """Sizes for compute capability ``arch``: those of the nearest older entry."""
    return _TILES[max((known for known in _TILES if known <= arch), default=min(_TILES))]


def chip_of(arch: str, n_sms: int) -> Chip:
    """The chip of a GPU of architecture ``arch`` (one of ``ARCHITECTURES``) with ``n_sms`` multiprocessors (0, not known:
    an H200's)."""
    return Chip(ARCHITECTURES[arch], n_sms or 132, tile_of(ARCHITECTURES[arch]))


H200 = chip_of("hopper", 132)
"""What tensors without a device (``meta``) stand for unless somebody says otherwise."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def aligned_pack(itemsize: int, row: int) -> int:
    """Elements per access to aligned tensors of ``itemsize`` bytes per element: as many, up to 16 bytes, as divide ``row``."""
    pack = 16 // itemsize
    while row % pack:
        pack //= 2
    return pack
