"""Inside ``as_gpu`` operators on ``meta`` tensors are those that CUDA runs, where torch would take others.

torch's composite operators choose by device: on ``meta`` attention is written out, dropout draws a mask in the
activations' dtype, RMSNorm and recurrent networks are many small operators, each with tensors of its own that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from runtime.tracing.recorder import norm, note
from runtime.tracing.rnn import gru, lstm, rnn_relu, rnn_tanh

_aten = torch.ops.aten
_MAX_FLASH_HEAD = 256
"""Widest head that torch's flash kernels take."""
_HEAD_ALIGNMENT, _MASK_ALIGNMENT = 8, 16
"""Elements to which torch pads heads, and rows of a mask for its memory-efficient kernel."""


@contextmanager
def as_gpu(attention: str) -> Iterator[None]:
    """``attention``: ``Strategy.attention``; ``flash`` is torch's own order of choice. Not for two threads at once."""
    if attention == "eager":
        raise InputError(
            "attention is 'eager' for a traced module, which says itself how it attends; allowed: flash, efficient, math"
        )
    library = torch.library.Library("aten", "IMPL")
    kernels: dict[str, Callable[..., Any]] = {"dropout": _dropout}
    if attention != "math":
        kernels["scaled_dot_product_attention"] = lambda *args, **kwargs: _attention(attention, *args, **kwargs)
    if hasattr(_aten, "_fused_rms_norm"):
        kernels["rms_norm"] = _rms_norm
    kernels |= {"lstm.input": lstm, "gru.input": gru, "rnn_tanh.input": rnn_tanh, "rnn_relu.input": rnn_relu}
    try:
        for name, kernel in kernels.items():
            library.impl(name, kernel, "AutogradMeta")
        yield
    finally:
        library._destroy()


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """CUDA's keeps a mask of one byte for each element."""
    return _aten.native_dropout(x, p, train)[0] if train and 0 < p < 1 and x.numel() else _plain_dropout(x, p, train)


def _plain_dropout(x: Tensor, p: float, train: bool) -> Tensor:
    return x if p == 0 or not train or not x.numel() else x * torch.zeros((), dtype=x.dtype, device=x.device)


class _RmsNorm(torch.autograd.Function):
    """CUDA's fused kernel: keeps its input and one fp32 for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, n_dims: int) -> Tensor:
        y = torch.empty_like(x)
        rows = torch.empty(x.shape[: x.dim() - n_dims], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, rows)
        note(norm("rms_norm", (x, y)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        dx = torch.empty_like(x)
        note(norm("rms_norm_backward", (x, grad, dx)))
        return dx, None if weight is None else torch.empty_like(weight), None


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RmsNorm.apply(x, weight, len(shape))


def _attention(
    choice: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel that CUDA chooses: flash, memory-efficient, all scores (torch's ``sdp_utils.cpp``)."""
    n_heads = {x.shape[-3] for x in (k, v)} | ({q.shape[-3]} if q.dim() == 4 else set())
    usual = q.dim() == k.dim() == v.dim() == 4 and q.shape[-1] == k.shape[-1] == v.shape[-1]
    low = q.dtype in (torch.float16, torch.bfloat16)
    if choice == "flash" and usual and low and attn_mask is None and q.shape[-1] <= _MAX_FLASH_HEAD:
        return _flash(q, k, v, dropout_p, is_causal, scale)
    if usual and len(n_heads) == 1 and q.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return _efficient(q, k, v, attn_mask, dropout_p, is_causal, scale)
    return _aten._scaled_dot_product_attention_math(
        q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    head = q.shape[-1]
    scale = head**-0.5 if scale is None else scale
    if missing := -head % _HEAD_ALIGNMENT:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    out = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return out[..., :head] if missing else out


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    if mask is not None:
        mask = _bias(mask, q, k)
    keeps_lse = any(x.requires_grad for x in (q, k, v) if x is not None)
    return _aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, keeps_lse, dropout_p, is_causal, scale=scale
    )[0]  # fmt: skip


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask as the kernel takes it: added to the scores, rows aligned, one for every head without a copy."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    length = mask.shape[-1]
    if missing := -length % _MASK_ALIGNMENT:
        mask = F.pad(mask, (0, missing))[..., :length]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
