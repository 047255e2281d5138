"""Hooks on a model's units: they tell the executor which unit's pass the model has reached.

A pass is over when the next one begins: by then autograd has added all gradients of the unit to their buffers, however
many of its parameters took part, since it runs the nodes of later operators first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from estimator.sharding.units import Unit
from runtime.executor import Executor
from runtime.recompute import RecomputeClock
from runtime.units import LiveUnit


class UnitHooks:
    """On every unit of a model. One module may be several units: it then takes their turns in order."""

    def __init__(
        self, live: Sequence[LiveUnit], executor: Executor, clock: RecomputeClock, *, has_loss: bool = True
    ) -> None:
        """``has_loss``: the last unit's pass is the loss; not so on most ranks of a pipeline."""
        self._executor, self._clock = executor, clock
        self.backward = "backward"
        """What the program calls the pass that gradients of outputs begin."""
        self._last = len(live) - 1 if has_loss else None
        self._first_trained = first_trained([u.unit for u in live])
        self._turns: dict[nn.Module, list[int]] = {}
        self._runs: Counter[nn.Module] = Counter()
        for index, unit in enumerate(live):
            self._turns.setdefault(unit.module, []).append(index)
        for module in self._turns:
            module.register_forward_pre_hook(self._before_forward)
            module.register_forward_hook(self._after_forward)

    def begin(self) -> None:
        """A micro-batch begins."""
        self._runs.clear()

    def _turn(self, module: nn.Module) -> tuple[int, str]:
        turns = self._turns[module]
        unit = turns[min(self._runs[module], len(turns) - 1)]
        return unit, "loss" if unit == self._last else "forward"

    def _is_replay(self) -> bool:
        return not torch.is_grad_enabled() or self._clock.active

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self._is_replay():
            unit, phase = self._turn(module)
            self._executor.inputs.offer(unit, args)
            self._executor.enter(unit, phase)

    def _after_forward(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._is_replay():
            return
        unit, phase = self._turn(module)
        self._runs[module] += 1
        if unit >= self._first_trained:
            self._watch(unit, [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad])
        self._executor.leave(unit, phase)

    def _watch(self, unit: int, outputs: list[Tensor]) -> None:
        """The first gradient of an output begins the unit's backward pass."""
        begun = False

        def hook(_: Tensor) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._executor.enter(unit, self.backward)

        for output in outputs:
            output.register_hook(hook)


def first_trained(units: Sequence[Unit]) -> int:
    """The unit at which backward ends."""
    return next(i for i, unit in enumerate(units) if unit.is_trained)
