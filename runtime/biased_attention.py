"""Attention with a trained number for every pair of places, added to the scores: T5's relative positions.

Flash attention takes no such bias. On GPUs torch's memory-efficient kernel does (Rabe & Staats 2021; of xFormers), elsewhere plain
torch does the same with all scores at once. Kept for the backward pass: queries, keys, values, bias, result and one fp32 per row
and head, from which the scores are computed again; ``estimator.ops.encoder_decoder`` mirrors it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.kernels.loader import outside_compile


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``softmax(q @ k.T + bias) @ v`` for each head, not scaled. ``q`` ``[B, S, H, D]``, ``k``, ``v`` ``[B, T, H, D]``, ``bias``
    ``[H, S, T]`` whose rows start at multiples of 8 elements, all of one dtype; returns ``q``'s shape."""
    return _attention(q, k, v, bias)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        attend = _plain_forward if q.device.type == "cpu" else _efficient_forward
        out, statistics = attend(q, k, v, bias)
        ctx.save_for_backward(q, k, v, bias, out, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, bias, out, *statistics = ctx.saved_tensors
        attend = _plain_backward if q.device.type == "cpu" else _efficient_backward
        return attend(grads[0], (q, k, v, bias, out), statistics)


_attention = outside_compile(_BiasedAttention.apply)


# ---- torch's memory-efficient kernel ----------------------------------------------------------------------------------


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out, *statistics = torch.ops.aten._scaled_dot_product_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias.expand(len(q), -1, -1, -1), True, scale=1.0
    )
    return out.transpose(1, 2), tuple(statistics)


def _efficient_backward(
    grad: Tensor, kept: tuple[Tensor, ...], statistics: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, bias, out = kept
    grad_q, grad_k, grad_v, grad_bias = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias.expand(len(q), -1, -1, -1),
        out.transpose(1, 2), *statistics, 0.0, [True] * 4, scale=1.0,
    )  # fmt: skip
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_bias.sum(0)


# ---- plain torch ------------------------------------------------------------------------------------------------------


def _heads_first(x: Tensor) -> Tensor:
    """``[B, S, H, D]`` as ``[B * H, S, D]``."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    """``[B * H, S, D]`` as ``like``, ``[B, S, H, D]``."""
    return x.view(len(like), -1, *x.shape[1:]).transpose(1, 2).contiguous()


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """fp32 ``[B * H, S, T]`` of ``_heads_first`` queries and keys."""
    scores = torch.bmm(q, k.mT)
    scores.view(-1, *bias.shape).add_(bias)
    return scores.float()


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    scores = _scores(_heads_first(q), _heads_first(k), bias)
    lse = scores.logsumexp(-1, keepdim=True)
    shares = scores.sub_(lse).exp_().to(v.dtype)
    del scores
    return _heads_last(torch.bmm(shares, _heads_first(v)), q), (lse,)


def _plain_backward(
    grad: Tensor, kept: tuple[Tensor, ...], statistics: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations of Dao 2023, section 3.1.2, for all blocks at once."""
    q, k, v, bias, out = kept
    (lse,) = statistics
    row_sums = _heads_first(grad * out).sum(-1, keepdim=True, dtype=torch.float32)
    of_q, of_k, of_grad = _heads_first(q), _heads_first(k), _heads_first(grad)
    shares = _scores(of_q, of_k, bias).sub_(lse).exp_()
    grad_v = _heads_last(torch.bmm(shares.to(grad.dtype).mT, of_grad), v)
    grad_scores = torch.bmm(of_grad, _heads_first(v).mT).float().sub_(row_sums).mul_(shares).to(grad.dtype)
    del shares
    grad_bias = grad_scores.view(-1, *bias.shape).sum(0)
    return (
        _heads_last(torch.bmm(grad_scores, of_k), q), _heads_last(torch.bmm(grad_scores.mT, of_q), k), grad_v, grad_bias,
    )  # fmt: skip
