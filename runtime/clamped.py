"""GPT-OSS's gated activation: ``(up + 1) * gate * sigmoid(1.702 * gate)`` of a clamped gate and a clamped ``up``, in plain torch.

Keeps both of what goes in, as its kernels' neighbours do. ``estimator.ops.experts`` mirrors its temporaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.kernels import loader

STEEPNESS = 1.702
"""Of the sigmoid that is nearly GELU's (Hendrycks & Gimpel 2016)."""


def clamped_activate(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """``gate`` and ``up`` of one shape and dtype; ``gate`` is at most ``limit``, ``up`` within ``limit`` of zero."""
    return _activate(gate, up, limit)


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        out = gate.clamp(max=limit)
        other = (out * STEEPNESS).sigmoid_()
        out.mul_(other)
        return out.mul_(torch.clamp(up, -limit, limit, out=other).add_(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), limit = ctx.saved_tensors, ctx.limit
        grad_up = gate.clamp(max=limit)
        share = (grad_up * STEEPNESS).sigmoid_()
        # of x * sigmoid(a x): sigmoid * (1 + a x (1 - sigmoid))
        grad_gate = (1 - share).mul_(grad_up).mul_(STEEPNESS).add_(1).mul_(share).mul_(grads[0])
        grad_up.mul_(share).mul_(grads[0])
        grad_gate.mul_(torch.clamp(up, -limit, limit, out=share).add_(1))
        grad_gate.masked_fill_(gate > limit, 0)
        grad_up.masked_fill_(torch.abs(up, out=share) > limit, 0)
        return grad_gate, grad_up, None


_activate = loader.outside_compile(_Clamped.apply)
