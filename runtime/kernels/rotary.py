"""Rotary position embedding (Su et al. 2021), in place or not. Nothing is kept for the backward pass but the tables."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from estimator.errors import invalid
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name, widened


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, in_place: bool = False) -> Tensor:
    """Turns the first R channels of every head by the angles of its position; the others stay.

    ``x`` ``[B, S, H, D]``, any strides between heads (a part of a fused projection, say) but channels side by side; ``cos`` and ``sin``
    ``[S, R/2]``, of ``x``'s dtype or fp32. Pairs are (i, i + R/2), or (2i, 2i + 1) when ``interleaved``. The kernel
    computes in fp32 and rounds once. Returns ``x``'s shape: a new contiguous tensor, or ``x`` itself when ``in_place``.
    """
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != x.shape[1] or 2 * cos.shape[1] > x.shape[-1]:
        raise invalid("shape of cos, sin", (*cos.shape, *sin.shape), f"[{x.shape[1]}, at most {x.shape[-1] // 2}] each")
    if not loader.uses_kernel("rotary", x):
        return rotate_reference(x, cos, sin, interleaved=interleaved, in_place=in_place)
    return _rotate(x, cos.contiguous(), sin.contiguous(), interleaved, in_place)


def rotate_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, in_place: bool = False
) -> Tensor:
    """``rotate`` in plain torch. Pairs (i, i + R/2) into a new tensor, with tables of ``x``'s dtype: in that dtype, with no
    temporary tensor; else in fp32, rounded once."""
    if not interleaved and not in_place and cos.dtype == sin.dtype == x.dtype:
        return _rotate_reference(x, cos, sin)
    half = cos.shape[-1]
    c, s = widened(cos)[:, None, :], widened(sin)[:, None, :]
    pairs = widened(x[..., : 2 * half])
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    turned = (a * c - b * s, b * c + a * s)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    if in_place:
        x[..., : 2 * half] = out.to(x.dtype)
        return x
    return torch.cat((out.to(x.dtype), x[..., 2 * half :]), dim=-1)


class _RotateReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half].copy_(first).mul_(cos).addcmul_(second, sin, value=-direction)
    out[..., half : 2 * half].copy_(second).mul_(cos).addcmul_(first, sin, value=direction)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


# ---- launchers --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(
    dtype: torch.dtype, table: torch.dtype, heads: int, half: int, copied: int, interleaved: bool, pack: int,
    device: torch.device,
) -> Kernel:  # fmt: skip
    tile = chip(device).tile
    return kernel(
        "rotary", "rotate", X_TYPE=type_name(dtype), TABLE_TYPE=type_name(table), HEADS=heads, HALF=half, COPIED=copied,
        INTERLEAVED=int(interleaved), PACK=pack, THREADS=tile.threads, UNROLL=tile.unroll,
    )  # fmt: skip


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> None:
    batch, seq_len, heads, head_dim = x.shape
    half = cos.shape[-1]
    copied = 0 if out is x else head_dim - 2 * half
    if half + copied == 0:
        return
    pack = loader.pack_width(x, out, cos, sin)
    sizes = (half, copied, *x.stride()[:3], *out.stride()[:3])
    while any(size % pack for size in sizes):
        pack //= 2
    tile = chip(x.device).tile
    items = seq_len * heads * (half + copied) // pack
    grid = (ceil_div(items, tile.threads * tile.unroll), min(batch, 65535))
    compiled = _kernel(x.dtype, cos.dtype, heads, half, copied, interleaved, pack, x.device)
    launch(
        compiled, grid, tile.threads, x, out, cos, sin, batch, seq_len, *x.stride()[:3], *out.stride()[:3], direction
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        if in_place and x.stride(-1) != 1:
            raise invalid("stride of the channels of x", x.stride(-1), "1 for a rotation in place")
        if in_place:
            ctx.mark_dirty(x)
            out = x
        else:
            x = x if x.stride(-1) == 1 else x.contiguous()
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _turn(x, out, cos, sin, interleaved, 1.0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _turn(grad, grad_x, cos, sin, ctx.interleaved, -1.0)
        return grad_x, None, None, None, None


_rotate = loader.outside_compile(_Rotate.apply)
_rotate_reference = loader.outside_compile(_RotateReference.apply)
