"""Optimizer steps on flat shards, in place: the rules of this project's kernels, or torch's fused ones a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from estimator.errors import InputError, invalid
from estimator.job.strategy import Optimizer
from estimator.schedule.buffers import UPDATE_CHUNK_NUMEL
from runtime.context import has_data
from runtime.kernels.optimizer import State
from runtime.kernels.rules import Adagrad, Adam, Control, Lion, Rule, Sgd


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyperparameters. The kind of optimizer is the ``Strategy``'s: it decides the memory."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam and Lion; SGD uses the first as its momentum."""
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled for AdamW and Lion, added to the gradient for Adam, SGD and Adagrad."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr < float("inf"):
            raise invalid("optimizer.lr", self.lr, "a number >= 0")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise invalid("optimizer.betas", self.betas, "two numbers from 0 up to, not including, 1")
        if self.eps < 0 or self.weight_decay < 0:
            raise invalid("optimizer.eps, weight_decay", (self.eps, self.weight_decay), "numbers >= 0")


def rule_of(kind: Optimizer, config: OptimizerConfig) -> Rule:
    """The rule by which ``runtime.kernels`` takes the step that ``update`` takes with torch."""
    if kind == "sgd":
        return Sgd(momentum=config.betas[0], weight_decay=config.weight_decay)
    if kind == "lion":
        return Lion(betas=config.betas, weight_decay=config.weight_decay)
    if kind == "adagrad":
        return Adagrad(eps=config.eps, weight_decay=config.weight_decay)
    return Adam(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, decoupled=kind != "adam")


def update(
    kind: Optimizer, config: OptimizerConfig, lr: float, step: Tensor, param: Tensor, grad: Tensor,
    states: list[Tensor], skip: Tensor | None = None,
) -> None:  # fmt: skip
    """One step, in place. ``param``, ``grad``, ``states``: fp32 of one shape; ``step``: fp32 of one element, 1 on the first
    step; ``skip``: likewise, on the same device: where it is 1 nothing is changed.

    Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW), Sutskever et al. 2013 (SGD with momentum), as in torch.optim;
    Chen et al. 2023 (Lion) and Duchi et al. 2011 (Adagrad) as the kernels' references, with new tensors on the way.
    """
    if kind in ("lion", "adagrad"):
        new, new_states = rule_of(kind, config).stepped(param, grad, states, Control(lr=lr, step=step))
        for old, value in zip((param, *states), (new, *new_states), strict=True):
            old.copy_(value if skip is None else torch.where(skip != 0, old, value))
        return
    if kind == "sgd":
        if has_data(param):  # torch's fused SGD has no form for tensors without data; it allocates nothing
            torch._fused_sgd_(
                [param], [grad], states if config.betas[0] else [], weight_decay=config.weight_decay, momentum=config.betas[0], lr=lr,
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False, found_inf=skip,
            )  # fmt: skip
        return
    fused = torch._fused_adamw_ if kind == "adamw" else torch._fused_adam_
    fused(
        [param], [grad], [states[0]], [states[1]], [], [step], lr=lr, beta1=config.betas[0], beta2=config.betas[1],
        weight_decay=config.weight_decay, eps=config.eps, amsgrad=False, maximize=False, found_inf=skip,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The flat tensors of one optimizer step, all of one length, fp32 or narrower."""

    master: Tensor
    grads: Tensor
    """Changed by the step when they are fp32."""
    states: Sequence[State]
    target: Tensor | None
    """Where the new parameters go in the model's dtype; ``None``: ``master`` is the parameter itself."""
    temp: Tensor | None
    """fp32, of at least one chunk for each tensor that is not, to widen it in; ``None``: all are."""


def step_shard(
    kind: Optimizer, config: OptimizerConfig, lr: float, step: Tensor, factor: Tensor | None, shard: Shard,
    skip: Tensor | None = None, by: Callable[..., None] = update,
) -> None:  # fmt: skip
    """One step of ``shard``, chunk by chunk: widened, gradients multiplied by ``factor``, stepped ``by`` what is called as
    ``update`` is, rounded to nearest."""
    for start in range(0, shard.master.numel(), UPDATE_CHUNK_NUMEL):
        part = slice(start, min(start + UPDATE_CHUNK_NUMEL, shard.master.numel()))
        own = [flat[part] for flat in (shard.grads, shard.master, *_wide_states(shard))]
        grad, master, *states = wide = _widened(own, shard.temp)
        if factor is not None:
            grad.mul_(factor)
        by(kind, config, lr, step, master, grad, states, skip)
        for narrow, stepped in zip(own[1:], wide[1:], strict=True):
            if narrow is not stepped:
                narrow.copy_(stepped)
        if shard.target is not None:
            shard.target[part].copy_(master)


def _wide_states(shard: Shard) -> list[Tensor]:
    states = [state for state in shard.states if isinstance(state, Tensor)]
    assert len(states) == len(shard.states), "8-bit states are stepped by runtime.kernels.optimizer"
    return states


def _widened(tensors: list[Tensor], temp: Tensor | None) -> list[Tensor]:
    """Each of ``tensors``, or where it is not fp32 a copy of it that is, one after another in ``temp``."""
    wide, used = [], 0
    for tensor in tensors:
        if temp is not None and tensor.dtype != torch.float32:
            tensor, used = temp[used : used + tensor.numel()].copy_(tensor), used + tensor.numel()
        wide.append(tensor)
    return wide


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


_LARGEST_SCALE = 2.0**64
"""Gradients that are all zero never overflow: without a bound the scale would become infinite."""


class LossScaler:
    """Dynamic loss scale for fp16 (Micikevicius et al. 2018): halved on overflow, doubled after a quiet while.

    Its numbers are fp32 scalars on ``device``, where overflow is found: the host waits only when it reads them.
    """

    def __init__(
        self, dtype: str, device: torch.device | str = "cpu", initial: float = 2.0**16, growth_interval: int = 2000
    ) -> None:
        self.enabled = dtype == "fp16"
        self.growth_interval = growth_interval
        self._scale, self._quiet_steps, self._skipped_steps = (
            torch.full((), value, dtype=torch.float32, device=device)
            for value in (initial if self.enabled else 1.0, 0.0, 0.0)
        )

    @property
    def factor(self) -> float | Tensor:
        """What the loss is multiplied by: a scalar on the device, or 1."""
        return self._scale if self.enabled else 1.0

    @property
    def scale(self) -> float:
        """``factor`` as a number, which waits for the device. Setting it raises ``InputError`` without fp16."""
        return self._scale.item() if self.enabled else 1.0

    @scale.setter
    def scale(self, value: float) -> None:
        if not self.enabled:
            raise InputError(f"loss scale is set to {value}; only fp16 has one")
        self._scale.fill_(value)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite; reading it waits for the device."""
        return int(self._skipped_steps.item())

    def record(self, overflow: Tensor) -> None:
        """Adjust after a step. ``overflow``: fp32 of one element on the scaler's device, 1 when the step was skipped, else 0."""
        skipped = overflow.view(())
        self._skipped_steps.add_(skipped)
        if not self.enabled:
            return
        self._quiet_steps.add_(1).mul_(1 - skipped)
        grows = (self._quiet_steps == self.growth_interval).float()
        self._quiet_steps.mul_(1 - grows)
        self._scale.mul_(1 + grows - skipped / 2).clamp_(1.0, _LARGEST_SCALE)
