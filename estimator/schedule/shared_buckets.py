"""Gradients in buckets of fixed size that all groups share, and what an optimizer step makes of gradients, as in DeepSpeed.

Stages 1 and 2 (``deepspeed/runtime/zero/stage_1_and_2.py``): every gradient is copied into a bucket as autograd makes it
(``contiguous_gradients``, the default), or into one of two with ``overlap_comm``; buckets live from the beginning of a backward pass to
its end. Stage 3 (``stage3.py``) has one for good, whose contents are put into the ranks' order in a second one to be reduced
(``coalesced_collectives.py: reduce_scatter_coalesced``), and keeps reduced gradients in a buffer for good. A step makes one flat tensor
of a rank's gradients and one of fp32 (``_prepare_fp32_grad_for_sub_group``, ``flatten``), under stage 3 of so many elements at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.framework import FRAMEWORKS
from estimator.job.strategy import Strategy
from estimator.schedule.buffers import GroupBuffers
from estimator.schedule.events import Alloc, Buffer, Event, Free
from estimator.sharding.layout import Group, Layout, align
from estimator.units import DTYPE_BYTES


def has_shared_buckets(strategy: Strategy) -> bool:
    return FRAMEWORKS[strategy.framework].bucket_numel > 0


def leaves_buckets_reduced(strategy: Strategy, n_micro_batches: int) -> bool:
    """Whether stage 1 reduces gradients as they come, as stage 2 does, so that nothing is kept of what has left a bucket: with
    ``overlap_comm``, and where no micro-batches come before (``create_gradient_handling_hooks``)."""
    exact = strategy.grad_compression == "none"
    return has_shared_buckets(strategy) and bool(strategy.overlap_comm) and n_micro_batches == 1 and exact


def buckets(strategy: Strategy, zero_stage: int) -> list[Buffer]:
    """Those that gradients are copied into; under stage 3 they live from step to step."""
    if not has_shared_buckets(strategy) or zero_stage == 0:
        return []
    n = 2 if strategy.overlap_comm and zero_stage < 3 else 1
    return [Buffer(f"bucket_{i}", -1, "reduce_buckets", _bucket_bytes(strategy)) for i in range(n)]


class Filling:
    """Stage 3: the bucket that lives from step to step, and what has been copied into it since it was last reduced."""

    def __init__(self, layout: Layout, strategy: Strategy) -> None:
        self.layout, self.strategy = layout, strategy
        self.held: list[int] = []
        """Groups, in the order in which their gradients came."""
        self.under_way: list[int] = []
        """Those that the bucket held before, which is being reduced while it is filled again (``overlap_comm``, the default of stage 3)."""
        self.by_layer = any(unit.whole for unit in layout.units)
        """Layers are units."""
        self._numel = 0
        """Elements in a bucket that lives as long as a backward pass (stages 1 and 2)."""

    def takes(self, b: GroupBuffers) -> bool:
        """Whether the gradients of a group with these buffers go into it."""
        return b.bucketed and b.lasting_grads

    def before(self, g: int) -> list[int]:
        """What must be reduced before the gradients of group ``g`` have room."""
        groups = self.layout.groups
        numel = sum(groups[other].numel for other in (*self.held, g))
        return self.held if numel > self.strategy.bucket_numel else []

    def sent(self, held: Sequence[int], entering: int | None) -> Buffer:
        """What the gradients of ``held`` are put into to be reduced, in the ranks' order (one whose parts are equal stays where it is), and
        beside it those of group ``entering`` as autograd has made them."""
        groups, width = self.layout.groups, DTYPE_BYTES[self.strategy.dtype]
        stays = len(held) == 1 and groups[held[0]].numel == groups[held[0]].padded_numel and self._is_one(held[0])
        numel = 0 if stays else sum(groups[g].padded_numel for g in held)
        return Buffer(
            "sent_bucket",
            held[0],
            "reduce_buckets",
            (numel + (groups[entering].numel if entering is not None else 0)) * width,
        )

    def made(self, unit: int, closed: Sequence[Buffer]) -> list[Event]:
        """Stages 1 and 2: the first gradients of a backward pass, those of ``unit``, are there, and buckets are made for them."""
        numel = sum(param.numel for param in self.layout.units[unit].params if param.trained)
        fresh = Buffer("fresh_grads", -1, "temporaries", numel * DTYPE_BYTES[self.strategy.dtype])
        return [Alloc(fresh), *map(Alloc, closed), Free(fresh)]

    def copies(self, unit: int, stage: int) -> list[Event]:
        """Stage 2 (and stage 1 where it does as that): the gradients of ``unit`` come. Where there is no room for them, what the bucket holds
        is reduced first, as a flat copy (``allreduce_bucket``). Stage 1 copies into it what then goes: that makes no peak."""
        if stage == 1:
            return []
        numel = sum(param.numel for param in self.layout.units[unit].params if param.trained)
        if self._numel + numel <= self.strategy.bucket_numel:
            self._numel += numel
            return []
        events = self._copy(self._numel + numel)
        self._numel = min(numel, self.strategy.bucket_numel)
        return events

    def rest(self, stage: int) -> list[Event]:
        """The backward pass is over."""
        if stage == 1:
            return []
        numel, self._numel = self._numel, 0
        return self._copy(numel)

    def _copy(self, numel: int) -> list[Event]:
        flat = Buffer("flat_bucket", -1, "reduce_buckets", numel * DTYPE_BYTES[self.strategy.dtype])
        return [Alloc(flat), Free(flat)]

    def _is_one(self, g: int) -> bool:
        return sum(1 for _ in self.layout.slots(self.layout.groups[g])) == 1


def keeps_own_grads(layout: Layout, strategy: Strategy, zero_stage: int) -> bool:
    """Whether gradients stay as autograd makes them until the step, layer by layer: stage 1."""
    plain = not strategy.offload_optimizer and strategy.grad_compression == "none"
    return zero_stage == 1 and plain and any(unit.whole for unit in layout.units)


def grad_parts(layout: Layout, all_buffers: Sequence[GroupBuffers]) -> list[list[Buffer]]:
    """By unit, its part of the ``full_grads`` of its groups; padding comes with a group's first unit, which is the last in backward."""
    parts: list[list[Buffer]] = [[] for _ in layout.units]
    for group in layout.groups:
        full = all_buffers[group.number].full_grads
        if not full.n_bytes:
            continue
        numel = dict.fromkeys(group.units, 0)
        for slot in layout.slots(group):
            numel[slot.unit] += align(slot.param.numel)
        width = full.n_bytes // group.padded_numel
        numel[group.units[0]] += group.padded_numel - sum(numel.values())
        for unit, n in numel.items():
            if n:
                parts[unit].append(full._replace(role=f"grads_of_{unit}", n_bytes=n * width))
    return parts


def own_part(full_grads: Buffer, group: Group) -> Buffer:
    """What is left of a group's gradients when those that other ranks step are gone."""
    return full_grads._replace(role="own_grads", n_bytes=full_grads.n_bytes // group.n_shards)


def step_copies(groups: Sequence[Group], strategy: Strategy) -> tuple[list[Buffer], list[Buffer]]:
    """What a step makes of a rank's gradients: what lives while it is made only, and what lives until the step is over."""
    if not has_shared_buckets(strategy) or strategy.offload_optimizer:
        return [], []
    numel = sum(group.shard_numel for group in groups)
    if strategy.zero_stage == 3:
        numel = min(numel, FRAMEWORKS[strategy.framework].sub_group_numel)
    flat = Buffer("flat_grads", -1, "temporaries", numel * DTYPE_BYTES[strategy.grads])
    if strategy.grads == strategy.masters:
        return [], [flat]
    return [flat], [Buffer("wide_grads", -1, "temporaries", numel * DTYPE_BYTES[strategy.masters])]


def _bucket_bytes(strategy: Strategy) -> int:
    return strategy.bucket_numel * DTYPE_BYTES[strategy.dtype]  # also where sums are kept in fp32
