"""The operators of the reference models: one meaning on all devices, kernels on GPUs, plain torch elsewhere.

What each keeps for its backward pass is mirrored by ``estimator.ops.graph``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.activation import activate, gated_activate
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from runtime.kernels.loader import uses_kernel
from runtime.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from runtime.kernels.rotary import rotate

__all__ = [
    "add_layer_norm", "add_rms_norm", "attention", "gated_activate", "layer_norm", "linear_activate",
    "linear_cross_entropy", "rms_norm", "rotate",
]  # fmt: skip


def linear_activate(h: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """``activation(h @ weight.T + bias)``. ``h`` ``[..., D]``, ``weight`` ``[F, D]``, ``bias`` ``[F]`` or ``None``.

    The kernel adds the bias and sums its gradient on the way; plain torch leaves the addition to the matrix product.
    """
    if bias is not None and uses_kernel("activation", h):
        return activate(F.linear(h, weight), name, bias)
    return activate(F.linear(h, weight, bias), name)


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
