"""The same training in plain PyTorch: one process, whole parameters, torch's own optimizers, no kernels of this project.
What the engine must equal.

Gradients are added in the order that the stage prescribes: over micro-batches first where they stay local (stages 0, 1),
over ranks first where every micro-batch is reduced (2, 3). So on one and two ranks (a + b = b + a) both give the same bits
on a CPU; beyond, communication libraries add in an order of their own, and attention's backward pass on a GPU in any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.strategy import Strategy
from runtime.functional import attending_by
from runtime.kernels.registry import switched_off
from runtime.optimizer import LossScaler, OptimizerConfig
from runtime.storage import TORCH_DTYPES

Batches = Callable[[int, int, int], tuple[Tensor, ...]]
"""The inputs of one forward pass by step, rank and micro-batch; asked for once each, micro-batches of a rank in order."""
PARITY_OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5)
"""For comparing: eps is raised because a key bias has a gradient of exactly zero in theory, and Adam turns its rounding
noise into steps."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest differences between the engine and plain PyTorch that rounding explains, relative."""

    loss: float
    params: float
    """Norm of the difference over the norm, all parameters as one vector."""


TOLERANCES = {
    "fp32": Tolerance(loss=1e-6, params=1e-6),
    "bf16": Tolerance(loss=2e-2, params=2e-3),
    "fp16": Tolerance(loss=2e-2, params=2e-3),
}
"""By dtype; measured on four gloo ranks, whose sums round in another order, over 20 steps of small models."""


def tolerance(dtype: str, n_summands: int = 1) -> Tolerance:
    """What rounding explains. Where ranks round their parts of a layer's result to 16 bits before they add them up
    (``Strategy.n_summands``), the parameters' share doubles (measured on two and four ranks)."""
    usual = TOLERANCES[dtype]
    return usual if n_summands == 1 or dtype == "fp32" else replace(usual, params=2 * usual.params)


@dataclass(frozen=True, kw_only=True)
class PlainOutcome:
    """What plain training gives."""

    losses: list[list[list[float]]]
    """By step, rank and micro-batch."""
    params: dict[str, Tensor]
    """Masters by name, fp32."""


@switched_off("all")
def train_plain(
    model: nn.Module, strategy: Strategy, optimizer: OptimizerConfig, batches: Batches, *, n_ranks: int,
    n_micro_batches: int, steps: int,
) -> PlainOutcome:  # fmt: skip
    """Train ``model`` (fp32, returns its loss) as ``n_ranks`` ranks would, their batches one after another.

    Of ``strategy`` only the stage's order of additions, dtypes, optimizer, clipping, delay and staleness matter: sharding, offload and
    recomputation change nothing. A delayed update leaves the model with the parameters of the step before. The model is left in the strategy's dtype.
    """
    if strategy.optimizer == "adamw8bit":
        raise InputError(
            "optimizer is 'adamw8bit', which rounds moments in blocks of flat shards; allowed in plain PyTorch: adamw, adam, sgd, lion, adagrad"
        )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masters = [model.get_parameter(n).detach().to(TORCH_DTYPES[strategy.masters], copy=True).float() for n in names]
    model.to(TORCH_DTYPES[strategy.dtype])
    params = [model.get_parameter(name) for name in names]
    stepper = _optimizer(strategy, optimizer, masters)
    scaler = LossScaler(strategy.dtype, params[0].device)
    ranks_first = strategy.zero_stage >= 2 and n_ranks > 1
    under_way: deque[Sequence[Tensor]] = deque()
    losses = []
    for step in range(steps):
        losses.append([[0.0] * n_micro_batches for _ in range(n_ranks)])

        def gradients(rank: int, micro: int, step: int = step) -> Sequence[Tensor]:
            with attending_by(strategy.attention):
                loss = model(*batches(step, rank, micro))
            losses[step][rank][micro] = loss.item()
            grads = torch.autograd.grad(loss * (scaler.factor / n_micro_batches), params)
            return [grad.to(TORCH_DTYPES[strategy.grads]) for grad in grads]

        def pushed(grads: Sequence[Tensor]) -> Sequence[Tensor]:
            return [grad.float() for grad in grads] if strategy.has_servers else grads

        def of_replica(ranks: range, gradients: Callable[..., Sequence[Tensor]] = gradients) -> Sequence[Tensor]:
            if ranks_first:
                return _sum(_sum(gradients(r, m) for r in ranks) for m in range(n_micro_batches))
            return _sum(pushed(_sum(gradients(r, m) for m in range(n_micro_batches))) for r in ranks)

        size = max(1, strategy.shard_size // strategy.cp) if strategy.shard_size else n_ranks
        total = _sum(of_replica(range(first, min(first + size, n_ranks))) for first in range(0, n_ranks, size))
        under_way.append(total)
        if len(under_way) <= strategy.staleness:
            continue
        for master, grad in zip(masters, under_way.popleft(), strict=True):
            master.grad = grad.float() / (scaler.factor * n_ranks)
        looks = scaler.enabled or strategy.grad_clip > 0
        overflow = looks and not all(bool(torch.isfinite(m.grad).all()) for m in masters if m.grad is not None)
        if strategy.delayed_update:
            _publish(masters, params)
        if not overflow:
            if strategy.grad_clip > 0:
                _clip(masters, strategy.grad_clip)
            stepper.step()
            _round(strategy, masters, stepper)
        if scaler.enabled:
            scaler.record(torch.full((1,), float(overflow), device=params[0].device))
        if not strategy.delayed_update:
            _publish(masters, params)
    frozen = {name: p.detach().float() for name, p in model.named_parameters() if not p.requires_grad}
    return PlainOutcome(losses=losses, params=frozen | dict(zip(names, masters, strict=True)))


@torch.no_grad()
def _round(strategy: Strategy, masters: Iterable[Tensor], stepper: torch.optim.Optimizer) -> None:
    """Masters and states lose what their own dtypes do not hold."""
    for tensor in masters:
        tensor.copy_(tensor.to(TORCH_DTYPES[strategy.masters]))
    for state in stepper.state.values():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum"):
            if name in state:
                state[name].copy_(state[name].to(TORCH_DTYPES[strategy.states]))


@torch.no_grad()
def _publish(masters: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    for param, master in zip(params, masters, strict=True):
        param.copy_(master)


def _sum(terms: Iterable[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Term by term from the first on."""
    return reduce(lambda total, more: [a + b for a, b in zip(total, more, strict=True)], terms)


def _clip(masters: list[Tensor], most: float) -> None:
    """By the global norm, summed in fp64: ``clip_grad_norm_`` loses a thousandth on a CPU's long vectors."""
    square = sum((m.grad.double().square().sum() for m in masters if m.grad is not None), torch.zeros(()))
    nn.utils.clip_grads_with_norm_(masters, most, square.sqrt().float())


def _optimizer(strategy: Strategy, config: OptimizerConfig, masters: list[Tensor]) -> torch.optim.Optimizer:
    if strategy.optimizer == "sgd":
        return torch.optim.SGD(
            masters, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay, fused=True
        )
    if strategy.optimizer == "adagrad":
        return torch.optim.Adagrad(masters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    if strategy.optimizer == "lion":
        return _Lion(masters, config)
    kind = torch.optim.AdamW if strategy.optimizer == "adamw" else torch.optim.Adam
    return kind(masters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


class _Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, which torch has not."""

    def __init__(self, params: list[Tensor], config: OptimizerConfig) -> None:
        super().__init__(params, {})
        self._config = config

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        assert closure is None
        config = self._config
        for param in self.param_groups[0]["params"]:
            momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
            sign = (config.betas[0] * momentum + (1 - config.betas[0]) * param.grad).sign()
            param.sub_(config.lr * (sign + config.weight_decay * param))
            momentum.mul_(config.betas[1]).add_((1 - config.betas[1]) * param.grad)


def relative_difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Norm of ``got - want`` over the norm of ``want``, both taken as one vector. Raises ``ValueError`` on other names."""
    if got.keys() != want.keys():
        raise ValueError(f"parameters differ in name: {sorted(got.keys() ^ want.keys())}")
    square = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    norm = sum(float(tensor.double().square().sum()) for tensor in want.values())
    return (square / max(norm, 1e-24)) ** 0.5


def excess(dtype: str, parity: Mapping[str, float], n_summands: int = 1) -> str | None:
    """One sentence when ``parity`` (``loss`` and ``params``) is beyond ``dtype``'s tolerance on so many ranks."""
    allowed = tolerance(dtype, n_summands)
    for name, limit in (("loss", allowed.loss), ("params", allowed.params)):
        if not parity[name] <= limit:  # also when it is no number
            return (
                f"{name} differs from plain PyTorch by {parity[name]:.1e} relative; allowed with {dtype}: {limit:.0e}"
            )
    return None
