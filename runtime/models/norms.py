"""Norms of the reference models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from estimator.job.model import ModelSpec
from runtime import functional


class RmsNorm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``residual + x``, and that sum."""
        return functional.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dim."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``residual + x``, and that sum."""
        return functional.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def make_norm(spec: ModelSpec) -> RmsNorm | LayerNorm:
    """A norm of the residual stream."""
    if spec.norm == "rmsnorm":
        return RmsNorm(spec.d_model, spec.norm_eps)
    return LayerNorm(spec.d_model, spec.norm_eps, spec.norm_bias)
