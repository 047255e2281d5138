"""Activation recomputation: what a block keeps for its backward pass.

``full`` keeps the block's input (Chen et al. 2016); ``selective`` also keeps attention outputs and every second
matrix product, the choice of torchtitan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from estimator.job.strategy import Recompute
from runtime.context import current_ledger

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.addmm.default}
_ATTENTIONS = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
}


class RecomputeClock:
    """Seconds spent replaying forwards since it was last read, and whether one is under way.

    On a GPU its events are read, not the host's clock, which only sees the launches.
    """

    def __init__(self, device: torch.device) -> None:
        self.active = False
        self._cuda = device.type == "cuda"
        self._spells: list[tuple[Any, Any]] = []

    def take(self) -> float:
        """Seconds so far; starts again from zero. On a GPU everything issued must have finished."""
        spells, self._spells = self._spells, []
        if self._cuda:
            return sum(start.elapsed_time(end) for start, end in spells) / 1e3
        return sum(end - start for start, end in spells)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def replay(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        ledger, start = current_ledger(), self._now()
        self.active = True
        if ledger is not None:
            ledger.open_scope()
        try:
            with inner:
                yield
        finally:
            self.active = False
            if ledger is not None:
                ledger.close_scope()
            self._spells.append((start, self._now()))


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


def wrap_blocks(blocks: list[nn.Module], recompute: Recompute, device: torch.device) -> RecomputeClock:
    """Make every block recompute in its backward pass. Changes their ``forward``; returns the clock of the replays."""
    clock = RecomputeClock(device)
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
