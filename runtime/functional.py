"""The operators of the reference models: one meaning on all devices, kernels on GPUs, plain torch elsewhere.

What each keeps for its backward pass is mirrored by ``estimator.ops.graph``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.biased_attention import biased_attention
from runtime.kernels import activation, norm
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from runtime.kernels.loader import uses_kernel
from runtime.kernels.rotary import rotate
from runtime.remake import note, remakable

__all__ = [
    "add_layer_norm", "add_rms_norm", "attention", "biased_attention", "gated_activate", "layer_norm", "linear_activate",
    "linear_cross_entropy", "rms_norm", "rotate",
]  # fmt: skip

rms_norm = remakable("norms", norm.rms_norm)
layer_norm = remakable("norms", norm.layer_norm)
gated_activate = remakable("activation", activation.gated_activate)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``rms_norm(h)`` and ``h``, where ``h = residual + x``."""
    y, h = norm.add_rms_norm(x, residual, weight, eps)
    note("norms", y, norm.rms_norm, h, weight, eps)
    return y, h


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``layer_norm(h)`` and ``h``, where ``h = residual + x``."""
    y, h = norm.add_layer_norm(x, residual, weight, bias, eps)
    note("norms", y, norm.layer_norm, h, weight, bias, eps)
    return y, h


def activate(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """``activation(x + bias)``."""
    y = activation.activate(x, name, bias)
    if name != "relu" or uses_kernel("activation", x):  # torch's keeps its output
        note("activation", y, activation.activate, x, name, bias)
    return y


def linear_activate(
    h: Tensor, weight: Tensor, bias: Tensor | None, name: str, columns: Callable[..., tuple[Tensor, ...]] | None = None
) -> Tensor:
    """``activation(h @ weight.T + bias)``. ``h`` ``[..., D]``, ``weight`` ``[F, D]``, ``bias`` ``[F]`` or ``None``.

    The kernel adds the bias and sums its gradient on the way; plain torch leaves the addition to the matrix product.
    ``columns`` multiplies, where ranks share the layer (``runtime.parallel.layers``).
    """
    later = bias if uses_kernel("activation", h) else None
    now = bias if later is None else None
    (product,) = columns(h, [(weight, now)]) if columns is not None else (F.linear(h, weight, now),)
    return activate(product, name, later)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """Attention by torch's flash kernels. ``q`` ``[B, S, H, D]``, ``k``, ``v`` ``[B, S, KV, D]``; returns ``q``'s shape.

    ``causal``: of each place to those up to it, else to all. ``scale`` of the scores, by default ``D ** -0.5``.

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
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)[0]
    elif grouped or q.is_meta:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2)
