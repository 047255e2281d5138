"""Collectives over the data-parallel group, counted as they are issued."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.context import has_data

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""torch 2.13 renamed both; 2.11 has only the old names."""


class Communicator:
    """Starts collectives; every call and its full (unsharded) bytes are counted from the tensors themselves.

    On NCCL parameter gathers and gradient reductions use process groups, and so streams, of their own. Over torch's fake
    group one process plays one rank of many: results are then filled from its own shard (zeros or garbage would make
    kernels run faster), so that everything but the network is real.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._gather_group: Any = None
        self._reduce_group: Any = None
        self._virtual = self.size > 1 and dist.get_backend() == "fake"
        if self.size > 1 and dist.get_backend() == "nccl":
            self._gather_group, self._reduce_group = dist.new_group(), dist.new_group()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def _count(self, op: str, full: Tensor) -> None:
        self.bytes[op] += full.numel() * full.element_size()
        self.calls[op] += 1

    def all_gather(self, full: Tensor, shard: Tensor) -> Any:
        """``full`` becomes the shards of all ranks in rank order; ``shard`` may be its own slice of ``full``."""
        self._count("all_gather", full)
        if self._virtual and has_data(full):
            _repeat(shard, full)
            return _issued(full)
        return _all_gather(full, shard, group=self._gather_group, async_op=True)

    def gather_now(self, full: Tensor, shard: Tensor) -> None:
        """An all-gather outside of any step: waited for, not counted."""
        if self._virtual and has_data(full):
            _repeat(shard, full)
            return
        _all_gather(full, shard)

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Any:
        """``shard`` becomes this rank's slice of the sum over ranks; it may be that slice of ``full``."""
        self._count("reduce_scatter", full)
        if self._virtual and has_data(full):
            own = full[self.rank * shard.numel() :][: shard.numel()]
            if shard.data_ptr() != own.data_ptr():
                shard.copy_(own)
            return _issued(full)
        return _reduce_scatter(shard, full, group=self._reduce_group, async_op=True)

    def all_reduce(self, tensor: Tensor) -> Any:
        """``tensor`` becomes the sum over ranks."""
        self._count("all_reduce", tensor)
        if self._virtual and has_data(tensor):
            return _issued(tensor)
        return dist.all_reduce(tensor, group=self._reduce_group, async_op=True)

    def start_step(self) -> None:
        self.bytes.clear()
        self.calls.clear()


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
