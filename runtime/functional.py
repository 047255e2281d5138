"""The operators of the reference models: one meaning on all devices, kernels on GPUs, plain torch elsewhere.

What each keeps for its backward pass is mirrored by ``estimator.ops.graph``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from estimator.job.framework import AttentionKernel
from runtime import clamped
from runtime.biased_attention import biased_attention
from runtime.kernels import activation, norm
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from runtime.kernels.loader import uses_kernel
from runtime.kernels.rotary import rotate
from runtime.remake import note, remakable
from runtime.score_attention import eager_attention, math_attention
from runtime.window_attention import window_attention

__all__ = [
    "add_layer_norm", "add_rms_norm", "attending_by", "attention", "biased_attention", "clamped_activate", "gated_activate", "layer_norm",
    "linear_activate", "linear_cross_entropy", "rms_norm", "rotate",
]  # fmt: skip

rms_norm = remakable("norms", norm.rms_norm)
layer_norm = remakable("norms", norm.layer_norm)
gated_activate = remakable("activation", activation.gated_activate)
clamped_activate = remakable("activation", clamped.clamped_activate)


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
    h: Tensor, weight: Tensor, bias: Tensor | None, name: str, columns: Callable[..., Sequence[Tensor]] | None = None
) -> Tensor:
    """``activation(h @ weight.T + bias)``. ``h`` ``[..., D]``, ``weight`` ``[F, D]``, ``bias`` ``[F]`` or ``None``.

    The kernel adds the bias and sums its gradient on the way; plain torch leaves the addition to the matrix product.
    ``columns`` multiplies, where ranks share the layer (``runtime.parallel.layers``).
    """
    later = bias if uses_kernel("activation", h) else None
    now = bias if later is None else None
    (product,) = columns(h, [(weight, now)]) if columns is not None else (F.linear(h, weight, now),)
    return activate(product, name, later)


_attention_kernel: AttentionKernel = "flash"


@contextmanager
def attending_by(kernel: AttentionKernel) -> Iterator[None]:
    """Inside, ``attention`` is what ``Strategy.attention`` calls ``kernel``."""
    global _attention_kernel
    before, _attention_kernel = _attention_kernel, kernel
    try:
        yield
    finally:
        _attention_kernel = before


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int = 0, sinks: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Attention. ``q`` ``[B, S, H, D]``, ``k``, ``v`` ``[B, S, KV, D]``; returns ``q``'s shape.

    ``causal``: of each place to those up to it, else to all; of these to the last ``window`` (0: to all), itself among them.
    ``scale`` of the scores, by default ``D ** -0.5``. ``sinks`` ``[H]``: the score of a key that gives nothing. Raises ``InputError``
    where the kernel has no window or sinks.
    """
    kernel = _attention_kernel
    if 0 < window < q.shape[1] or sinks is not None:
        if kernel != "flash":
            raise InputError(
                f"attention is {kernel!r}, but the model's has a window or sinks, which only flash attention has here; allowed: flash"
            )
        if q.device.type == "cpu":
            k, v = _for_every_head(q, k, v)
        window = window if window < q.shape[1] else 0
        return window_attention(q, k, v, sinks, window=window, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    if kernel == "flash":
        return _flash_attention(q, k, v, causal=causal, scale=scale)
    if kernel == "efficient":
        return _efficient_attention(q, k, v, causal=causal, scale=scale)
    attend = eager_attention if kernel == "eager" else math_attention
    return attend(q, k, v, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """By torch's flash kernels.

    The kernel is named, not left to torch's choice, because what it keeps for the backward pass is part of the forecast.
    Flash attention takes fp16 and bf16 and groups of query heads; on the CPU, and for fp32 (which CUDA gives to its
    memory-efficient kernel), key and value heads are copied to every query head instead.
    """
    grouped = q.device.type != "cpu" and q.dtype != torch.float32
    if not grouped:
        k, v = _for_every_head(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)[0]
    elif grouped or q.is_meta:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def _efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """By torch's memory-efficient kernel (of xFormers), which a GPU alone has and which knows no groups of query heads."""
    if q.device.type == "cpu":
        raise InputError("attention is 'efficient', a kernel that a CPU has not; allowed: flash, math, eager")
    k, v = _for_every_head(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[
        0
    ].transpose(1, 2)


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value heads copied to every query head."""
    groups = q.shape[2] // k.shape[2]
    return (k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)) if groups > 1 else (k, v)
