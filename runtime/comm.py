"""Collectives over data-parallel ranks, counted as they are issued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from estimator.schedule.events import Collective, Event, Span
from runtime.context import has_data

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""torch 2.13 renamed both; 2.11 has only the old names."""


class Communicator:
    """Starts collectives; every call and its full (unsharded) bytes are counted from the tensors themselves.

    On NCCL parameter gathers and gradient reductions use process groups, and so streams, of their own. Over torch's fake
    group one process plays one rank of many: results are then filled from its own shard (zeros or garbage would make
    kernels run faster), so that everything but the network is real.

    Collectives take the ``span`` of ranks that they join (``None``: all); ``join`` must have made it known.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        backend = dist.get_backend() if self.size > 1 else None
        self._virtual = backend == "fake"
        self._own_streams = backend == "nccl"
        self._groups: dict[tuple[str, Span | None], Any] = {("gather", None): None, ("reduce", None): None}
        self._timeout = _timeout_of_the_default_group(backend)
        if self._own_streams:
            self._groups = {key: dist.new_group(timeout=self._timeout) for key in self._groups}
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def join(self, events: Iterable[Event]) -> None:
        """Make process groups for the spans of all collectives among ``events``. Every rank must call this with the same."""
        used = dict.fromkeys((e.stream, e.span) for e in events if isinstance(e, Collective))
        for stream, span in used:
            self._group_of(stream, span)

    def _group_of(self, stream: str, span: Span | None) -> Any:
        """A group that spans all ranks in order is the default group's twin; on NCCL each stream has its own."""
        whole = span is None or span.size == self.size
        if (stream, span) not in self._groups:
            if whole:
                self._groups[stream, span] = self._groups[stream, None]
            elif not self._own_streams and (other := _other(stream), span) in self._groups:
                self._groups[stream, span] = self._groups[other, span]
            else:
                assert span is not None
                # only the members make it: with thousands of ranks nobody waits for groups of others
                self._groups[stream, span] = dist.new_group(
                    span.ranks(self.rank), timeout=self._timeout, use_local_synchronization=True
                )
        return self._groups[stream, span]

    def _count(self, op: str, full: Tensor) -> None:
        self.bytes[op] += full.numel() * full.element_size()
        self.calls[op] += 1

    def place(self, span: Span | None) -> int:
        """This rank's place among those of ``span``."""
        return self.rank if span is None else span.place(self.rank)

    def all_gather(self, full: Tensor, shard: Tensor, span: Span | None = None) -> Any:
        """``full`` becomes the shards of all ranks in rank order; ``shard`` may be its own slice of ``full``."""
        self._count("all_gather", full)
        if self._virtual and has_data(full):
            _repeat(shard, full)
            return _issued(full)
        return _all_gather(full, shard, group=self._group_of("gather", span), async_op=True)

    def gather_now(self, full: Tensor, shard: Tensor, span: Span | None = None) -> None:
        """An all-gather outside of any step: waited for, not counted."""
        if self._virtual and has_data(full):
            _repeat(shard, full)
            return
        _all_gather(full, shard, group=self._group_of("gather", span))

    def sum_now(self, tensor: Tensor) -> None:
        """An all-reduce over all ranks outside of any step: waited for, not counted."""
        if self.size > 1 and not (self._virtual and has_data(tensor)):
            dist.all_reduce(tensor)

    def reduce_scatter(self, shard: Tensor, full: Tensor, span: Span | None = None) -> Any:
        """``shard`` becomes this rank's slice of the sum over ranks; it may be that slice of ``full``."""
        self._count("reduce_scatter", full)
        if self._virtual and has_data(full):
            own = full[self.place(span) * shard.numel() :][: shard.numel()]
            if shard.data_ptr() != own.data_ptr():
                shard.copy_(own)
            return _issued(full)
        return _reduce_scatter(shard, full, group=self._group_of("reduce", span), async_op=True)

    def all_reduce(self, tensor: Tensor, span: Span | None = None) -> Any:
        """``tensor`` becomes the sum over ranks."""
        self._count("all_reduce", tensor)
        if self._virtual and has_data(tensor):
            return _issued(tensor)
        return dist.all_reduce(tensor, group=self._group_of("reduce", span), async_op=True)

    def all_to_all(self, received: Tensor, sent: Tensor, span: Span | None = None) -> Any:
        """Part i of ``sent`` goes to rank i of ``span``, whose part for this rank becomes part i of ``received``."""
        self._count("all_to_all", sent)
        if self._virtual and has_data(sent):
            part = sent.numel() // (self.size if span is None else span.size)
            _repeat(sent[self.place(span) * part :][:part], received)
            return _issued(sent)
        return dist.all_to_all_single(received, sent, group=self._group_of("reduce", span), async_op=True)

    def start_step(self) -> None:
        self.bytes.clear()
        self.calls.clear()


def _timeout_of_the_default_group(backend: str | None) -> Any:
    """How long its collectives wait: torch gives further groups a default of its own instead."""
    if backend not in ("gloo", "nccl"):
        return None
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    return dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout


def _other(stream: str) -> str:
    return "gather" if stream == "reduce" else "reduce"


def _repeat(shard: Tensor, full: Tensor) -> None:
    """Every slice of ``full`` becomes ``shard``, which may be one of them."""
    rows = full.view(-1, shard.numel())
    inside = shard.data_ptr() - full.data_ptr()
    own = inside // (shard.numel() * shard.element_size()) if 0 <= inside < full.numel() * full.element_size() else 0
    if rows[own].data_ptr() == shard.data_ptr():
        rows[:own].copy_(shard)
        rows[own + 1 :].copy_(shard)
    else:
        rows.copy_(shard)


def _issued(tensor: Tensor) -> Any:
    """What to wait for after work on the current stream; ``None`` on the CPU, where it is done."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event
