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
from estimator.schedule.events import Buffer
from estimator.sharding.layout import Group
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


def sent_bucket(group: Group, strategy: Strategy) -> Buffer:
    """Stage 3: what a bucket's contents are put into to be reduced."""
    n_bytes = min(_bucket_bytes(strategy), group.padded_numel * DTYPE_BYTES[strategy.grads])
    return Buffer("sent_bucket", group.number, "reduce_buckets", n_bytes)


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
    return strategy.bucket_numel * DTYPE_BYTES[strategy.grads]
