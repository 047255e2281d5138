"""Activation recomputation: what a block keeps for its backward pass.

``full`` keeps the block's input (Chen et al. 2016); ``selective`` also keeps attention outputs and every second
matrix product, the choice of torchtitan. Of parts of a block, ``attention`` and ``mlp`` are checkpoints of their own, ``norms`` and
``activation`` are left to ``runtime.remake``; ``estimator.ops.regions`` mirrors both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from estimator.errors import InputError
from estimator.job.recompute import SUBMODULE_PARTS, parts_of
from runtime.context import current_ledger
from runtime.parts import PartClock
from runtime.remake import Remaker, suspended

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
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        """What every forward pass, and so every replay, runs inside."""
        self._parts = parts

    @contextmanager
    def replay(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        ledger = current_ledger()
        self.active = True
        if ledger is not None:
            ledger.open_scope()
        try:
            with self._parts.part("recompute"), self.around(), inner:
                yield
        except (
            Exception
        ) as stop:  # the replay ends early: what only its frames hold goes now, not when the exception does
            clear_frames(stop.__traceback__)
            raise
        finally:
            self.active = False
            if ledger is not None:
                ledger.close_scope()


_summands = False
_keeping: tuple[list[tuple[Tensor, ...]], bool] | None = None
"""Where selective recomputation puts what ``kept`` makes, and whether it is there already."""


def kept(make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``make`` makes, which selective recomputation keeps as it does results of attention, and nothing of what is inside."""
    if _keeping is None:
        return make()
    results, is_there = _keeping
    if is_there:
        return results.pop(0)
    with summands():
        made = make()
    results.append(tuple(x.detach() for x in made))
    return made


@contextmanager
def _keeps(inner: AbstractContextManager[Any], results: list[tuple[Tensor, ...]], *, is_there: bool) -> Iterator[None]:
    global _keeping
    before, _keeping = _keeping, (results, is_there)
    try:
        with inner:
            yield
    finally:
        _keeping = before


@contextmanager
def summands() -> Iterator[None]:
    """Inside, matrix products and attention are never kept: they are parts of sums over ranks, which are made in their place."""
    global _summands
    before, _summands = _summands, True
    try:
        yield
    finally:
        _summands = before


def _every_second_matmul() -> Callable[..., CheckpointPolicy]:
    seen = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS and not _summands:
            seen[ctx.is_recompute] += 1
            keep = seen[ctx.is_recompute] % 2 == 1
        else:
            keep = op in _ATTENTIONS and not _summands
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def wrap_blocks(
    blocks: Sequence[nn.Module],
    recompute: str,
    parts: PartClock,
    keeping: Callable[[Any], Any] = lambda forward: forward,
) -> RecomputeClock:
    """Make every block recompute in its backward pass. Changes their ``forward``; ``parts`` times the replays. Where a whole
    block recomputes, ``keeping`` wraps what its input is kept by.

    Raises ``InputError`` where parts of a block are wanted that it does not name (``recompute_parts``).
    """
    clock = RecomputeClock(parts)
    if chosen := parts_of(recompute):
        for block in blocks:
            _wrap_parts(block, chosen, clock)
        return clock
    if recompute == "none":
        return clock

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if recompute == "full":
            return nullcontext(), clock.replay(nullcontext())
        keep, reuse = create_selective_checkpoint_contexts(_every_second_matmul())
        results: list[tuple[Tensor, ...]] = []
        return _keeps(keep, results, is_there=False), clock.replay(_keeps(reuse, results, is_there=True))

    for block in blocks:
        _checkpoint(block, contexts)
        block.forward = keeping(block.forward)  # type: ignore[method-assign]
    return clock


def _checkpoint(module: nn.Module, contexts: Callable[[], tuple[Any, Any]]) -> None:
    forward = module.forward
    trains = any(param.requires_grad for param in module.parameters())
    drops = any(getattr(part, "dropout", 0) for part in module.modules())
    again = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts, preserve_rng_state=drops)

    def run(*args: Any, **kwargs: Any) -> Any:
        needs = trains or any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs)))
        return (again if needs else forward)(*args, **kwargs)  # what needs no gradient keeps nothing

    module.forward = run  # type: ignore[method-assign]


def _wrap_parts(block: nn.Module, chosen: frozenset[str], clock: RecomputeClock) -> None:
    named: dict[str, tuple[str, ...]] = getattr(block, "recompute_parts", {})
    if missing := sorted(chosen - named.keys()):
        raise InputError(
            f"recompute is {','.join(sorted(chosen))!r}, but {type(block).__name__} does not say which of its modules are "
            f"{missing[0]!r}; allowed: none, selective, full, or a class attribute recompute_parts that names them"
        )
    for part in sorted(chosen & SUBMODULE_PARTS):
        for name in named[part]:
            _checkpoint(block.get_submodule(name), lambda: (suspended(), clock.replay(nullcontext())))
    if remade := chosen - SUBMODULE_PARTS:
        remaker, forward = Remaker(remade, lambda: clock.replay(nullcontext())), block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with remaker:
                return forward(*args, **kwargs)

        block.forward = run  # type: ignore[method-assign]
