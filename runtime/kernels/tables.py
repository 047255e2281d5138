"""Many tensors in one launch: the table that tells each block its chunk of a tensor, and where the tensors lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from estimator.errors import InputError, invalid
from runtime.context import managed_memory

Lists = Mapping[str, Sequence[Tensor]]
"""Lists of tensors by the name that errors give them: tensor i of each list belongs to tensor i of the others."""

_KEPT_TABLES = 1024


class Table(NamedTuple):
    values: Tensor
    """int64: the tensor's number for every chunk; then for every tensor its size, head, first chunk and pointers."""
    n_chunks: int
    n_tensors: int


_in_graphs: dict[int, Table] = {}
"""Tables that a captured CUDA graph reads, by address: they stay as long as the process."""


class _Entries(NamedTuple):
    """One list, as far as its table depends on it."""

    name: str
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    dtypes: frozenset[torch.dtype]
    dense: bool


def check_lists(lists: Lists, sides: Lists | None = None) -> None:
    """Raises ``InputError`` unless the lists match: as many tensors, of the same sizes, contiguous, one dtype to a list.

    ``sides``: lists with a tensor for each tensor, of any size.
    """
    _check(*_entries(lists, sides or {}, with_addresses=False))


def table_of(lists: Lists, sides: Lists | None = None, *, chunk: int, pack: int, from_start: bool = False) -> Table:
    """The table for ``lists`` then ``sides``, on the device of the first tensor, in chunks of ``chunk`` elements.

    Tensors that all start equally far from a whole access of ``pack`` elements get whole accesses (``from_start``: only
    those that start at one), others single elements. Tables are kept as long as the same tensors come again; a new one is
    copied to the device without waiting for it. Raises ``InputError`` for lists that do not match, and for a new table
    while a CUDA graph is captured.
    """
    device = next(iter(lists.values()))[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if any({t.device for t in tensors} - {device} for tensors in (*lists.values(), *(sides or {}).values())):
        raise invalid("devices of the tensors of one launch", "mixed", f"all on {device}")
    table = _built(device, stream, chunk, pack, from_start, *_entries(lists, sides or {}))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _in_graphs[table.values.data_ptr()] = table
    return table


def _entries(
    lists: Lists, sides: Lists, with_addresses: bool = True
) -> tuple[tuple[_Entries, ...], tuple[_Entries, ...]]:
    def of(name: str, tensors: Sequence[Tensor]) -> _Entries:
        addresses = tuple(map(Tensor.data_ptr, tensors)) if with_addresses else ()
        dense = all(map(Tensor.is_contiguous, tensors))
        return _Entries(name, addresses, tuple(map(Tensor.numel, tensors)), frozenset(t.dtype for t in tensors), dense)

    return tuple(of(*item) for item in lists.items()), tuple(of(*item) for item in sides.items())


def _check(lists: tuple[_Entries, ...], sides: tuple[_Entries, ...]) -> None:
    first = lists[0]
    for entries in (*lists, *sides):
        if len(entries.sizes) != len(first.sizes):
            raise invalid(
                f"number of {entries.name}", len(entries.sizes), f"{len(first.sizes)}, as many as {first.name}"
            )
        if len(entries.dtypes) > 1:
            raise invalid(f"dtypes of {entries.name}", sorted(map(str, entries.dtypes)), "one dtype for all")
        if not entries.dense:
            raise invalid(f"strides of {entries.name}", "with gaps", "contiguous tensors")
    for entries in lists:
        for i, (size, wanted) in enumerate(zip(entries.sizes, first.sizes, strict=True)):
            if size != wanted:
                raise invalid(f"size of {entries.name}[{i}]", size, f"{wanted}, as {first.name}[{i}]")


@functools.lru_cache(_KEPT_TABLES)
def _built(
    device: torch.device, stream: int, chunk: int, pack: int, from_start: bool, lists: tuple[_Entries, ...],
    sides: tuple[_Entries, ...],
) -> Table:  # fmt: skip
    """A pure function of its arguments; ``stream`` is one of them because other streams may not see the copy yet."""
    _check(lists, sides)
    sizes = np.array(lists[0].sizes, dtype=np.int64)
    starts = np.stack([_starts(entries, pack) for entries in lists])
    heads = np.where((starts == starts[0]).all(axis=0), starts[0], -1)
    if from_start:
        heads = np.where(heads > 0, -1, heads)
    chunks = np.where(sizes > 0, -(-(sizes + np.maximum(heads, 0)) // chunk), 0)
    first = np.cumsum(chunks) - chunks
    pointers = [np.array(entries.addresses, dtype=np.int64) for entries in (*lists, *sides)]
    records = np.stack([sizes, heads, first, *pointers], axis=1)
    values = np.concatenate([np.repeat(np.arange(len(sizes)), chunks), records.ravel()])
    with managed_memory():  # kept from call to call and from run to run: not this call's, and too small to be forecast
        return Table(_on_device(torch.from_numpy(values), device), int(chunks.sum()), len(sizes))


def _starts(entries: _Entries, pack: int) -> np.ndarray:
    """For each tensor, how many elements past a whole access it starts."""
    itemsize = next(iter(entries.dtypes)).itemsize
    return np.array(entries.addresses, dtype=np.int64) // itemsize % pack


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise InputError(
            "a CUDA graph is captured over tensors that no earlier call had; call once with the same tensors first"
        )
    return values.pin_memory().to(device, non_blocking=True)
