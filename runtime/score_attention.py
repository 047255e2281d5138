"""Attention whose scores of all pairs of places exist: what flash kernels are there to avoid, and what other frameworks still run.

``eager`` is written out as in Hugging Face's ``eager_attention_forward``, ``math`` is torch's own composite (what
``scaled_dot_product_attention`` falls back to). ``estimator.ops.attention`` mirrors both. Heads are put first by a copy, in which
key and value heads are repeated where queries share them, so that every product reads what lies in one piece.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """``softmax(scale * q @ k.T + mask) @ v``, the softmax in fp32. ``q`` ``[B, S, H, D]``, ``k``, ``v`` ``[B, T, KV, D]``; returns
    ``q``'s shape."""
    groups = q.shape[2] // k.shape[2]
    out = _written_out(_heads_first(q, 1), _heads_first(k, groups), _heads_first(v, groups), causal, scale)
    return _heads_last(out, len(q))


def math_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """The same by torch's composite, which widens 16-bit operands to fp32."""
    groups, batch = q.shape[2] // k.shape[2], len(q)
    out = _composite(_heads_first(q, 1), _heads_first(k, groups), _heads_first(v, groups), batch, causal, scale)
    return _heads_last(out, batch)


def _written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    weights = torch.bmm(q, k.mT) * scale
    if causal:
        weights = weights + _causal_mask(weights)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights, v)


def _composite(q: Tensor, k: Tensor, v: Tensor, batch: int, causal: bool, scale: float) -> Tensor:
    q, k, v = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, causal, scale=scale)[0]
    return out.flatten(0, 1)


def _causal_mask(scores: Tensor) -> Tensor:
    """``[S, T]``: minus infinity for what lies ahead."""
    return torch.full(scores.shape[1:], float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)


class _HeadsFirst(torch.autograd.Function):
    """``[B, S, KV, D]`` to ``[B * H, S, D]``, every head ``groups`` times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        ctx.batch, ctx.groups = len(x), groups
        repeated = x.transpose(1, 2).unsqueeze(2).expand(-1, -1, groups, -1, -1)
        return repeated.clone(memory_format=torch.contiguous_format).flatten(0, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].view(ctx.batch, -1, ctx.groups, *grads[0].shape[1:])
        grad = grad.sum(2) if ctx.groups > 1 else grad.squeeze(2)
        return grad.transpose(1, 2).clone(memory_format=torch.contiguous_format), None


class _HeadsLast(torch.autograd.Function):
    """``[B * H, S, D]`` to ``[B, S, H, D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: int) -> Tensor:
        return x.unflatten(0, (batch, -1)).transpose(1, 2).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1), None


_heads_first = _HeadsFirst.apply
_heads_last = _HeadsLast.apply
