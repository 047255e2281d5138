"""The optimizers' rules: hyperparameters, and one step in plain torch. The kernels' form of each is in ``optimizer.cuh``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.optimizer import RULES


@dataclass(frozen=True, kw_only=True)
class Control:
    """What is decided anew for every step. Tensors are fp32 of one element on the parameters' device; the host never reads them."""

    lr: float | Tensor
    """Learning rate; a tensor where a CUDA graph replays the step under a schedule."""
    step: Tensor | None = None
    """Number of this step, 1 for the first: bias correction of Adam and LAMB (``None``: no correction).

    The caller counts: ``step += 1`` before the call and ``step -= skip`` after it, so that skipped steps do not count.
    """
    factor: Tensor | None = None
    """Multiplies every gradient: loss-scale removal, mean over ranks and clipping in one (``None``: 1)."""
    skip: Tensor | None = None
    """Where it is not zero the step writes nothing (``None``: never)."""

    def __post_init__(self) -> None:
        if not isinstance(self.lr, Tensor) and not 0 <= self.lr < float("inf"):
            raise invalid("lr", self.lr, "a number >= 0, or a tensor")
        for name in ("lr", "step", "factor", "skip"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and (value.dtype != torch.float32 or value.numel() != 1):
                raise invalid(name, f"{value.dtype} of {value.numel()} elements", "fp32 of one element")


class Coefficients(NamedTuple):
    """Of a rule, as the kernels take them."""

    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    decay: float = 0.0

    def arguments(self) -> tuple[float, ...]:
        """``beta1`` to ``decay`` of ``STEP_PARAMETERS``."""
        logs = [math.log(beta) if beta > 0 else -math.inf for beta in (self.beta1, self.beta2)]
        return (
            float(self.beta1), 1.0 - self.beta1, logs[0], float(self.beta2), 1.0 - self.beta2, logs[1],
            float(self.eps), float(self.decay),
        )  # fmt: skip


class Rule(ABC):
    """One optimizer with its hyperparameters."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Key of ``RULES``; in capitals ``RULE`` in ``optimizer.cuh``."""

    @property
    def kernel(self) -> str:
        """Name in the registry."""
        return RULES[self.name].kernel

    @property
    def n_states(self) -> int:
        """Numbers kept for each parameter."""
        return RULES[self.name].n_states

    @abstractmethod
    def coefficients(self) -> Coefficients: ...

    @abstractmethod
    def stepped(self, p: Tensor, g: Tensor, states: list[Tensor], control: Control) -> tuple[Tensor, list[Tensor]]:
        """New parameters and states, in plain torch, of one shape and dtype; ``g`` has been multiplied by the factor."""


@dataclass(frozen=True, kw_only=True)
class _Moments(Rule):
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check(self.betas, self.eps, self.weight_decay)

    def coefficients(self) -> Coefficients:
        return Coefficients(*self.betas, self.eps, self.weight_decay)

    def moments(self, g: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The next first and second moment."""
        beta1, beta2 = self.betas
        return [beta1 * states[0] + (1 - beta1) * g, beta2 * states[1] + (1 - beta2) * g.square()]

    def direction(self, states: list[Tensor], step: Tensor | None) -> Tensor:
        """First moment over the root of the second, both with their bias corrected."""
        first, second = (1.0, 1.0) if step is None else (correction(beta, step, states[0]) for beta in self.betas)
        return states[0] / first / ((states[1] / second).sqrt() + self.eps)


@dataclass(frozen=True, kw_only=True)
class Adam(_Moments):
    """Kingma & Ba 2015; Loshchilov & Hutter 2019 (AdamW) where ``decoupled``. As in torch.optim."""

    decoupled: bool = True
    """Weight decay shrinks the parameters (AdamW) instead of being added to the gradient."""

    @property
    def name(self) -> str:
        return "adamw" if self.decoupled else "adam"

    def stepped(self, p: Tensor, g: Tensor, states: list[Tensor], control: Control) -> tuple[Tensor, list[Tensor]]:
        if self.decoupled:
            p = p * (1 - control.lr * self.weight_decay)
        else:
            g = g + self.weight_decay * p
        states = self.moments(g, states)
        return p - control.lr * self.direction(states, control.step), states


@dataclass(frozen=True, kw_only=True)
class Lamb(_Moments):
    """You et al. 2020, algorithm 2, without a bound on the norms: see ``lamb.py``."""

    eps: float = 1e-6

    @property
    def name(self) -> str:
        return "lamb"

    def update(self, p: Tensor, states: list[Tensor], step: Tensor | None) -> Tensor:
        """What the learning rate and the trust ratio multiply."""
        return self.direction(states, step) + self.weight_decay * p

    def stepped(self, p: Tensor, g: Tensor, states: list[Tensor], control: Control) -> tuple[Tensor, list[Tensor]]:
        states = self.moments(g, states)
        u = self.update(p, states, control.step)
        return p - control.lr * trust_ratio(p.square().sum(), u.square().sum()) * u, states


@dataclass(frozen=True, kw_only=True)
class Sgd(Rule):
    """Momentum as in torch.optim (Sutskever et al. 2013); the momentum buffer starts at zero."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    """Added to the gradient."""
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check((self.momentum,), 0.0, self.weight_decay)

    @property
    def name(self) -> str:
        return "sgd_nesterov" if self.nesterov else "sgd"

    def coefficients(self) -> Coefficients:
        return Coefficients(beta1=self.momentum, decay=self.weight_decay)

    def stepped(self, p: Tensor, g: Tensor, states: list[Tensor], control: Control) -> tuple[Tensor, list[Tensor]]:
        g = g + self.weight_decay * p
        buffer = self.momentum * states[0] + g
        return p - control.lr * (g + self.momentum * buffer if self.nesterov else buffer), [buffer]


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Chen et al. 2023, algorithm 2."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    """Decoupled."""

    def __post_init__(self) -> None:
        _check(self.betas, 0.0, self.weight_decay)

    @property
    def name(self) -> str:
        return "lion"

    def coefficients(self) -> Coefficients:
        return Coefficients(*self.betas, decay=self.weight_decay)

    def stepped(self, p: Tensor, g: Tensor, states: list[Tensor], control: Control) -> tuple[Tensor, list[Tensor]]:
        mixed = self.betas[0] * states[0] + (1 - self.betas[0]) * g
        sign = torch.where(mixed.isnan(), mixed, mixed.sign())
        momentum = self.betas[1] * states[0] + (1 - self.betas[1]) * g
        return p - control.lr * (sign + self.weight_decay * p), [momentum]


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """Duchi et al. 2011, as in torch.optim without its own decay of the learning rate."""

    eps: float = 1e-10
    weight_decay: float = 0.0
    """Added to the gradient."""

    def __post_init__(self) -> None:
        _check((), self.eps, self.weight_decay)

    @property
    def name(self) -> str:
        return "adagrad"

    def coefficients(self) -> Coefficients:
        return Coefficients(eps=self.eps, decay=self.weight_decay)

    def stepped(self, p: Tensor, g: Tensor, states: list[Tensor], control: Control) -> tuple[Tensor, list[Tensor]]:
        g = g + self.weight_decay * p
        total = states[0] + g.square()
        return p - control.lr * g / (total.sqrt() + self.eps), [total]


def correction(beta: float, step: Tensor, like: Tensor) -> Tensor:
    """``1 - beta^step`` in ``like``'s dtype, computed in fp64."""
    return (1 - torch.as_tensor(beta, dtype=torch.float64, device=step.device) ** step.double()).to(like.dtype)


def trust_ratio(param_square: Tensor, update_square: Tensor) -> Tensor:
    """Norm of the parameters over the norm of their update, from their squares; 1 where one of them is zero."""
    usable = (param_square > 0) & (update_square > 0)
    return torch.where(usable, param_square.sqrt() / update_square.sqrt(), 1.0)


def _check(betas: tuple[float, ...], eps: float, weight_decay: float) -> None:
    for beta in betas:
        if not 0 <= beta < 1:
            raise invalid("decay rates (betas, momentum)", betas, "numbers from 0 up to, not including, 1")
    if not 0 <= eps < math.inf or not 0 <= weight_decay < math.inf:
        raise invalid("eps, weight_decay", (eps, weight_decay), "numbers >= 0")
