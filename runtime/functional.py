"""The operators of the reference models that are worth a kernel of their own, in plain torch.

Every function here has one signature and one meaning on all devices; fused CUDA kernels replace the bodies on GPUs.
What each keeps for its backward pass is mirrored by ``estimator.ops.graph``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.context import logits_memory


class _RmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        inverse_rms = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        y = x32 * inverse_rms if x32 is x else x32.mul_(inverse_rms).to(x.dtype)
        return y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_y,) = grads
        x, weight, inverse_rms = ctx.saved_tensors
        x_hat = x.float() * inverse_rms if x.dtype == torch.float32 else x.float().mul_(inverse_rms)
        product = x_hat * grad_y
        rows = product.numel() // weight.numel()
        grad_weight = product.view(rows, -1).sum(0).to(weight.dtype)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        del product
        grad_x = x_hat.mul_(mean).neg_()
        grad_x.addcmul_(grad_y, weight) if x.dtype == torch.float32 else grad_x.add_(grad_y * weight)
        return grad_x.mul_(inverse_rms).to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim. ``x`` ``[..., D]``, ``weight`` ``[D]``, any float dtype; returns ``x``'s shape and dtype."""
    return _RmsNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    """Rotates pairs (i, i + R/2) of the first R channels of every head (Su et al. 2021, half layout)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, sign=-1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half].copy_(first).mul_(cos).addcmul_(second, sin, value=-sign)
    out[..., half : 2 * half].copy_(second).mul_(cos).addcmul_(first, sin, value=sign)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. ``x`` ``[B, S, H, D]``; ``cos``, ``sin`` ``[S, R/2]`` of the same dtype."""
    return _Rotate.apply(x, cos, sin)


_ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activate(x: Tensor, name: str) -> Tensor:
    """Activation by its ``ModelSpec`` name; same shape and dtype."""
    return _ACTIVATIONS[name](x)


def _activation_grad(grad: Tensor, x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if name == "gelu_tanh" else "none")


class _Gated(torch.autograd.Function):
    """activation(gate) * up, keeping only gate and up (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return activate(gate, name).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = activate(gate, ctx.name).mul_(grads[0])
        return _activation_grad(grads[0] * up, gate, ctx.name), grad_up, None


def gated_activate(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """``activation(gate) * up``; both ``[..., F]``."""
    return _Gated.apply(gate, up, name)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's flash kernels. ``q`` ``[B, S, H, D]``, ``k``, ``v`` ``[B, S, KV, D]``; returns ``q``'s shape.

    The kernel is named, not left to torch's choice, because what it keeps for the backward pass is part of the forecast.
    Flash attention takes fp16 and bf16 and groups of query heads; on the CPU, and for fp32 (which CUDA gives to its
    memory-efficient kernel), key and value heads are copied to every query head instead.
    """
    groups = q.shape[2] // k.shape[2]
    grouped = q.device.type != "cpu" and q.dtype != torch.float32
    if groups > 1 and not grouped:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
    elif grouped or q.is_meta:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Mean cross-entropy of ``h @ weight.T + bias`` in fp32. ``h`` ``[B, S, D]``, ``weight`` ``[V, D]``, ``labels`` ``[B, S]`` int64."""
    with logits_memory():
        logits = F.linear(h, weight, bias).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten())
