"""Low-rank adapters beside frozen projections (Hu et al. 2021).

``estimator.ops.lora`` mirrors what an adapter computes and keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.job.lora import Lora, LoraInit
from estimator.job.model import ModelSpec
from runtime.parallel.layers import WholeLayers

A, B = "lora_a", "lora_b"
"""What the parameters of an adapter are called."""


class LoraLinear(nn.Linear):
    """A projection with an adapter: ``lora_a`` ``[rank, in]``, ``lora_b`` ``[out, rank]``."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, lora: Lora) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.lora_a = nn.Parameter(torch.empty(lora.rank, n_in))
        self.lora_b = nn.Parameter(torch.empty(n_out, lora.rank))
        self.scale, self.dropout = lora.scale, lora.dropout

    def added(self, x: Tensor, base: Tensor) -> Tensor:
        """``base + scale * B A dropout(x)``; ``x`` ``[..., in]``, ``base`` ``[..., out]``."""
        low = F.linear(torch.native_dropout(x, self.dropout, True)[0] if self.dropout else x, self.lora_a)
        if self.scale != 1:
            low = low * self.scale
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), self.lora_b.t()).view_as(base)


def make_linear(spec: ModelSpec, name: str, n_in: int, n_out: int, *, bias: bool) -> nn.Linear:
    """The projection ``name`` of a block of ``spec``."""
    if spec.lora is not None and spec.lora.adapts(f"{name}.weight"):
        return LoraLinear(n_in, n_out, bias=bias, lora=spec.lora)
    return nn.Linear(n_in, n_out, bias=bias)


def columns(layers: WholeLayers, x: Tensor, linears: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Projections of the residual stream by ``linears``."""
    made = list(layers.columns(x, [(linear.weight, linear.bias) for linear in linears]))
    for number, linear in enumerate(linears):
        if isinstance(linear, LoraLinear):
            made[number] = linear.added(x, made[number])
    return made


def row(layers: WholeLayers, x: Tensor, linear: nn.Linear) -> Tensor:
    """The projection of heads or channels back to the residual stream by ``linear``."""
    y = layers.row(x, linear.weight, linear.bias)
    return linear.added(x, y) if isinstance(linear, LoraLinear) else y


def freeze(model: nn.Module, lora: Lora | None) -> None:
    """All of ``model`` but its adapters, if it has any."""
    if lora is not None:
        for name, param in model.named_parameters():
            param.requires_grad_(name.endswith((A, B)))


def initial_adapter(name: str, param: Tensor, init: LoraInit, generator: torch.Generator) -> None:
    """Writes the initial values of an adapter's parameter ``name``, as PEFT's are distributed."""
    if name.endswith(B):
        nn.init.zeros_(param)
    elif init == "gaussian":
        nn.init.normal_(param, std=1 / param.shape[0], generator=generator)
    else:
        bound = param.shape[1] ** -0.5
        nn.init.uniform_(param, -bound, bound, generator=generator)
