"""Tables of launches over many tensors: one int64 for every chunk, then a record for every tensor."""

from __future__ import annotations

from collections.abc import Iterable

from estimator.ops.kernels.chip import ceil_div

FIELDS = 3
"""Numbers in a tensor's record before its addresses: size, head, first chunk."""


def rounded_chunk(wanted: int, round_elements: int) -> int:
    """At least ``wanted`` elements in whole rounds of a block's threads."""
    return ceil_div(wanted, round_elements) * round_elements


def n_chunks(sizes: Iterable[int], chunk: int) -> int:
    """Chunks of ``chunk`` elements of tensors of ``sizes`` elements that start where whole accesses may."""
    return sum(ceil_div(size, chunk) for size in sizes)


def table_bytes(sizes: Iterable[int], n_lists: int, chunk: int) -> int:
    """Bytes of the table of ``n_lists`` lists of such tensors; it stays on the device after the launch."""
    sizes = tuple(sizes)
    return 8 * (n_chunks(sizes, chunk) + len(sizes) * (FIELDS + n_lists))
