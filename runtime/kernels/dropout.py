"""Dropout of a branch and its addition to the residual stream, in one pass. Kept for the backward pass: 8 bytes of seed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.kernels import loader
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name, widened
from runtime.kernels.philox import Dropout, draw_seed, dropout_of, factors


def dropout_residual(x: Tensor, residual: Tensor, probability: float, seed: Tensor | None = None) -> Tensor:
    """``residual + dropout(x)``; both of one shape and dtype. ``seed`` int64 ``[1]`` on their device (default: drawn anew).

    Elements are dropped with ``probability`` (in steps of 2^-16) and the others scaled by 1 / (1 - probability), in
    fp32, rounded once. The same seed drops the same elements on every device. Raises ``InputError`` for a probability
    outside [0, 1).
    """
    dropout = dropout_of(probability)
    if not loader.uses_kernel("dropout_residual", x):
        return dropout_residual_reference(x, residual, probability, seed)
    if dropout.threshold == 0:
        return x + residual
    return _dropout(x, residual, draw_seed(x.device) if seed is None else seed, dropout)


def dropout_residual_reference(x: Tensor, residual: Tensor, probability: float, seed: Tensor | None = None) -> Tensor:
    """``dropout_residual`` in plain torch."""
    return dropped_sum(x, residual, dropout_of(probability), seed)


def dropped_sum(x: Tensor, residual: Tensor, dropout: Dropout, seed: Tensor | None) -> Tensor:
    """``residual + dropout(x)`` in plain torch, rounded once: one addition where nothing is dropped."""
    if not dropout.threshold:
        return residual + x
    factor = factors(x.numel(), dropout, draw_seed(x.device) if seed is None else seed).view(x.shape)
    branch = torch.where(factor != 0, widened(x) * factor, 0)
    return (widened(residual) + branch).to(x.dtype)


# ---- launchers --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(function: str, dtype: torch.dtype, pack: int, device: torch.device) -> Kernel:
    tile = chip(device).tile
    return kernel("dropout", function, X_TYPE=type_name(dtype), PACK=pack, THREADS=tile.threads, UNROLL=tile.unroll)


def _launch(function: str, tensors: tuple[Tensor, ...], seed: Tensor, dropout: Dropout) -> None:
    first = tensors[0]
    tile = chip(first.device).tile
    pack = loader.pack_width(*tensors)
    grid = ceil_div(first.numel(), pack * tile.threads * tile.unroll)
    compiled = _kernel(function, first.dtype, pack, first.device)
    launch(compiled, grid, tile.threads, *tensors, seed, first.numel(), dropout.threshold, dropout.scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, seed: Tensor, dropout: Dropout) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout = dropout
        x, residual = x.contiguous(), residual.contiguous()
        y = torch.empty_like(x)
        _launch("dropout_forward", (x, residual, y), seed, dropout)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        grad_x = torch.empty_like(grad_y)
        _launch("dropout_backward", (grad_y, grad_x), seed, ctx.dropout)
        return grad_x, grads[0], None, None


_dropout = loader.outside_compile(_Dropout.apply)
