"""Optimizer steps on flat shards, in place: torch's fused kernels on fp32 state, a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.job.strategy import Optimizer
from estimator.schedule.buffers import UPDATE_CHUNK_NUMEL


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyperparameters. The kind of optimizer is the ``Strategy``'s: it decides the memory."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates; SGD uses the first as its momentum."""
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled for AdamW, added to the gradient for Adam and SGD."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr < float("inf"):
            raise invalid("optimizer.lr", self.lr, "a number >= 0")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise invalid("optimizer.betas", self.betas, "two numbers from 0 up to, not including, 1")
        if self.eps < 0 or self.weight_decay < 0:
            raise invalid("optimizer.eps, weight_decay", (self.eps, self.weight_decay), "numbers >= 0")


def update(
    kind: Optimizer, config: OptimizerConfig, lr: float, step: Tensor, param: Tensor, grad: Tensor, states: list[Tensor]
) -> None:
    """One step, in place. ``param``, ``grad``, ``states``: fp32 of one shape; ``step``: fp32 scalar, 1 on the first step.

    Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW), Sutskever et al. 2013 (SGD with momentum), as in torch.optim.
    """
    if kind == "sgd":
        torch._fused_sgd_(
            [param], [grad], states, weight_decay=config.weight_decay, momentum=config.betas[0], lr=lr,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        return
    fused = torch._fused_adamw_ if kind == "adamw" else torch._fused_adam_
    fused(
        [param], [grad], [states[0]], [states[1]], [], [step], lr=lr, beta1=config.betas[0], beta2=config.betas[1],
        weight_decay=config.weight_decay, eps=config.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The flat tensors of one optimizer step, all of one length."""

    master: Tensor
    """fp32, like ``states``."""
    grads: Tensor
    """Changed by the step when there is no ``temp``."""
    states: list[Tensor]
    target: Tensor | None
    """Where the new parameters go in the model's dtype; ``None``: ``master`` is the parameter itself."""
    temp: Tensor | None
    """fp32, of at least one chunk, to widen gradients in; ``None``: they are fp32."""


def step_shard(
    kind: Optimizer, config: OptimizerConfig, lr: float, step: Tensor, factor: float | Tensor, shard: Shard
) -> None:
    """One step of ``shard``, chunk by chunk: gradients widened and multiplied by ``factor``, ``update``, written back."""
    for start in range(0, shard.master.numel(), UPDATE_CHUNK_NUMEL):
        part = slice(start, min(start + UPDATE_CHUNK_NUMEL, shard.master.numel()))
        grad = shard.grads[part]
        if shard.temp is not None:
            grad = shard.temp[: part.stop - part.start].copy_(grad)
        if isinstance(factor, Tensor) or factor != 1.0:
            grad.mul_(factor)
        update(kind, config, lr, step, shard.master[part], grad, [state[part] for state in shard.states])
        if shard.target is not None:
            shard.target[part].copy_(shard.master[part])


_ROW_NUMEL = 1 << 12


def squared_norm(flat: Tensor) -> Tensor:
    """Sum of the squares of ``flat`` (one dim, any float dtype) as an fp32 scalar, within 1e-6 relative.

    On a CPU torch's norm of one long vector adds the squares one after another in fp32 and loses a thousandth at 30
    million elements (measured, torch 2.13); there short rows are summed first. On a GPU its reduction is a tree.
    """
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float32).square()
    whole = flat.numel() // _ROW_NUMEL * _ROW_NUMEL
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW_NUMEL), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return rows.square_().sum().add_(rest.square_())


class LossScaler:
    """Dynamic loss scale for fp16 (Micikevicius et al. 2018): halved on overflow, doubled after a quiet while."""

    def __init__(self, dtype: str, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = dtype == "fp16"
        self.scale = initial if self.enabled else 1.0
        self.growth_interval = growth_interval
        self.skipped_steps = 0
        self._quiet_steps = 0

    def record(self, overflow: bool) -> None:
        """Adjust after a step that overflowed (and was skipped) or did not."""
        if not self.enabled:
            return
        if overflow:
            self.scale = max(self.scale / 2, 1.0)
            self.skipped_steps += 1
            self._quiet_steps = 0
            return
        self._quiet_steps += 1
        if self._quiet_steps == self.growth_interval:
            self.scale *= 2
            self._quiet_steps = 0
