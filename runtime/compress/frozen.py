"""Adam whose second moment is frozen: what is stepped with after the warm-up of compressed gradients.

Tang et al. 2021 (1-bit Adam), algorithm 1. Where the paper has no bias correction, both moments keep torch's: the second one's
of the step at which it was frozen, so that nothing jumps. A parameter element that had no gradient in the whole warm-up stands
still from then on (compression would give it others' noise over a root of zero; DeepSpeed masks such elements).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from estimator.job.strategy import Optimizer
from runtime.optimizer import OptimizerConfig


class FrozenAdam:
    """Steps as ``runtime.optimizer.update``, the second moment apart."""

    def __init__(self, step: Tensor, *, given_momentum: bool) -> None:
        """``step``: fp32 of one element, the last one of the warm-up. ``given_momentum``: in place of gradients come first
        moments over ``1 - beta1``, without weight decay (``estimator.schedule.events.Blend``)."""
        self._step, self._given_momentum = step, given_momentum

    def __call__(
        self, kind: Optimizer, config: OptimizerConfig, lr: float, step: Tensor, param: Tensor, grad: Tensor,
        states: list[Tensor], skip: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One step, in place; ``grad`` is changed. Arguments as of ``update``."""
        (beta1, beta2), (first, second) = config.betas, states
        if kind == "adam" and config.weight_decay:
            grad.add_(param, alpha=config.weight_decay)
        if self._given_momentum:
            grad.mul_(1 - beta1)
        if skip is not None:
            torch.where(skip != 0, first, grad, out=grad)
        if self._given_momentum:
            first.copy_(grad)
        else:
            first.lerp_(grad, 1 - beta1)
        taken = lr if skip is None else lr * (1 - skip)
        if kind == "adamw" and config.weight_decay:
            param.mul_(1 - taken * config.weight_decay)
        larger = (1 - beta1**step) / taken  # infinite where nothing is to be changed
        torch.sqrt(second, out=grad).mul_(larger * (1 - beta2**self._step).rsqrt())
        if config.eps:
            grad.add_(larger * config.eps)
        param.addcdiv_(first, grad, value=-1)


def still_where_nothing_came(second: Tensor) -> None:
    """In place: elements of a second moment that are zero become infinite, so that they divide every step to zero."""
    second.masked_fill_(second == 0, math.inf)
