"""Activation recomputation: what a block keeps for its backward pass.

``full`` keeps the block's input (Chen et al. 2016); ``selective`` also keeps attention outputs and every second
matrix product, the choice of torchtitan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from estimator.job.strategy import Recompute
from runtime.context import current_ledger
from runtime.parts import PartClock

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.addmm.default}
_ATTENTIONS = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
}


class RecomputeClock:
    """Times the replays of forwards as part ``recompute``, and says whether one is under way."""

    def __init__(self, parts: PartClock) -> None:
        self.active = False
        self._parts = parts

    @contextmanager
    def replay(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        ledger = current_ledger()
        self.active = True
        if ledger is not None:
            ledger.open_scope()
        try:
            with self._parts.part("recompute"), inner:
                yield
        finally:
            self.active = False
            if ledger is not None:
                ledger.close_scope()


def _every_second_matmul() -> Callable[..., CheckpointPolicy]:
    seen = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS:
            seen[ctx.is_recompute] += 1
            keep = seen[ctx.is_recompute] % 2 == 1
        else:
            keep = op in _ATTENTIONS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def wrap_blocks(blocks: list[nn.Module], recompute: Recompute, parts: PartClock) -> RecomputeClock:
    """Make every block recompute in its backward pass. Changes their ``forward``; ``parts`` times the replays."""
    clock = RecomputeClock(parts)
    if recompute == "none":
        return clock

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if recompute == "full":
            return nullcontext(), clock.replay(nullcontext())
        keep, reuse = create_selective_checkpoint_contexts(_every_second_matmul())
        return keep, clock.replay(reuse)

    for block in blocks:
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )
    return clock
