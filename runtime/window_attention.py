"""Flash attention with a window, with sinks, or both (GPT-OSS): what torch's differentiable operators do not take.

A sink is one more key of a head whose score is learned and whose value is zero: it changes the log-sum-exp of every row, and scales
its result. Flash attention's backward pass (Dao 2023, section 3) makes all scores again from the log-sum-exp, so that it is right
for what it is given: the scaled result and the log-sum-exp with the sink.
``estimator.ops.window`` mirrors both functions. Shapes: B batch, S sequence, H query heads, KV key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from estimator.errors import InputError
from runtime.recompute import kept

_aten = torch.ops.aten


class _How(NamedTuple):
    """``window``: places that each attends to, itself among them; 0: all before it."""

    window: int
    scale: float


def window_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, window: int, scale: float) -> Tensor:
    """Causal attention to the last ``window`` places. ``q`` ``[B, S, H, D]``, ``k`` and ``v`` ``[B, S, KV, D]`` (on a CPU, KV = H);
    ``sinks`` ``[H]``; returns ``q``'s shape. Raises ``InputError`` for fp32 on a GPU, whose flash kernel there is none."""
    if q.device.type != "cpu" and q.dtype == torch.float32:
        raise InputError(
            "dtype is 'fp32', but the model's attention has a window or sinks, for which GPUs have flash kernels in 16 bits alone; "
            "allowed: bf16 or fp16"
        )
    return _WindowAttention.apply(q, k, v, sinks, _How(window, scale))  # type: ignore[no-any-return]


class _WindowAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: ``q``, ``k``, ``v``, the result and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How) -> Tensor:
        out, lse, *seeds = kept(lambda: _attend(q, k, v, sinks, how))
        ctx.how = how
        ctx.save_for_backward(q, k, v, sinks, out, lse, *seeds)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, *seeds = ctx.saved_tensors
        of_sinks = None if sinks is None else _of_sinks(grads[0], sinks, out, lse)
        return *_attend_backward(grads[0], (q, k, v), out, lse, tuple(seeds), ctx.how), of_sinks, None


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How) -> tuple[Tensor, ...]:
    """The result ``[B, S, H, D]``, its log-sum-exp ``[B, H, S]`` in fp32, and what a GPU's backward pass wants beside."""
    if q.device.type == "cpu":
        by_head = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *by_head, 0.0, not how.window, attn_mask=_mask(q, how.window), scale=how.scale
        )
        out, seeds = out.transpose(1, 2), ()
    else:
        sizes = q.shape[1], k.shape[1]
        left, right = _window(how)
        out, lse, *seeds, _ = _aten._flash_attention_forward(
            q,
            k,
            v,
            None,
            None,
            *sizes,
            0.0,
            True,
            False,
            scale=how.scale,
            window_size_left=left,
            window_size_right=right,
        )
    if sinks is not None:
        share = (lse - sinks.float()[:, None]).sigmoid_()  # what is left to the other keys
        out.mul_(share.transpose(1, 2).unsqueeze(-1).to(out.dtype))
        torch.logaddexp(lse, sinks.float()[:, None], out=lse)
    return out, lse, *seeds


def _attend_backward(
    grad: Tensor, heads: tuple[Tensor, ...], out: Tensor, lse: Tensor, seeds: tuple[Tensor, ...], how: _How
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, laid out as they are."""
    if grad.device.type == "cpu":
        grad, *heads_first, out = (x.transpose(1, 2) for x in (grad, *heads, out))
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            *heads_first,
            out,
            lse,
            0.0,
            not how.window,
            attn_mask=_mask(grad.transpose(1, 2), how.window),
            scale=how.scale,
        )
        return tuple(x.transpose(1, 2) for x in grads)
    sizes = heads[0].shape[1], heads[1].shape[1]
    left, right = _window(how)
    return tuple(
        _aten._flash_attention_backward(
            grad, *heads, out, lse, None, None, *sizes, 0.0, True, *seeds, scale=how.scale, window_size_left=left,
            window_size_right=right,
        )
    )  # fmt: skip


def _of_sinks(grad: Tensor, sinks: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Gradient ``[H]``: a sink's share of every row, times what that row's result is worth, which it gave nothing to."""
    worth = (grad * out).sum(-1, dtype=torch.float32).transpose(1, 2)
    share = (sinks.float()[:, None] - lse).exp_()
    return share.mul_(worth).sum((0, 2)).neg_().to(sinks.dtype)


def _window(how: _How) -> tuple[int | None, int | None]:
    """As the kernels count it: places to the left and to the right."""
    return (how.window - 1, 0) if how.window else (None, None)


def _mask(q: Tensor, window: int) -> Tensor | None:
    """``[S, S]``: minus infinity for what is not attended to; none where nothing but the future is not."""
    if not window:
        return None
    seq_len = q.shape[1]
    mask = torch.full((seq_len, seq_len), float("-inf"), dtype=q.dtype, device=q.device)
    return mask.triu_(1).add_(torch.full_like(mask, float("-inf")).tril_(-window))
