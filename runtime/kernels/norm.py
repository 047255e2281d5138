"""RMSNorm and LayerNorm over the last dim, forward and backward, with the residual addition before them if wanted.

Kept for the backward pass: what was normalised, the weight, and one fp32 (LayerNorm: two) per row, by the kernels and in plain
torch alike. The kernels compute in fp32 and round once; weight and bias gradients are summed in two stages in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from estimator.errors import invalid
from estimator.ops.kernels.norm import Rows, backward_blocks, row_threads
from runtime.kernels import loader
from runtime.kernels.columns import sum_columns
from runtime.kernels.dropout import dropped_sum
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name, widened
from runtime.kernels.philox import Dropout, draw_seed, dropout_of

MAX_WIDTH = 16_384
"""Widest row that the kernels take."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang & Sennrich 2019). ``x`` ``[..., D]``, ``weight`` ``[D]``.

    Any of fp32, bf16, fp16 for each; returns ``x``'s dtype. Raises ``InputError`` for D above 16,384 on a GPU.
    """
    if not loader.uses_kernel("rms_norm", x):
        return rms_norm_reference(x, weight, eps)
    return _norm(x, None, weight, None, eps, _RMS)[0]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in plain torch, with as little memory as eager operators allow. Rounds to ``x``'s dtype before the weight
    and after it."""
    return _rms_norm_reference(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` (Ba et al. 2016); ``weight``, ``bias`` ``[D]``. Else as ``rms_norm``."""
    if not loader.uses_kernel("layer_norm", x):
        return layer_norm_reference(x, weight, bias, eps)
    return _norm(x, None, weight, bias, eps, _LAYER)[0]


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``layer_norm`` in plain torch: torch's own operator where all dtypes are one."""
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = widened(x)
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt() * widened(weight)
    return (y if bias is None else y + widened(bias)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, probability: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``rms_norm(h)`` and ``h``, where ``h = residual + dropout(x)`` rounded to ``x``'s dtype (see ``dropout_residual``)."""
    if not loader.uses_kernel("rms_norm", x):
        return add_rms_norm_reference(x, residual, weight, eps, probability, seed)
    return _norm(x, residual, weight, None, eps, _Variant(True, dropout_of(probability)), seed)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, probability: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in plain torch: ``dropout_residual_reference``, then ``rms_norm_reference``."""
    h = dropped_sum(x, residual, dropout_of(probability), seed)
    return rms_norm_reference(h, weight, eps), h


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, probability: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``layer_norm(h)`` and ``h``, where ``h = residual + dropout(x)`` rounded to ``x``'s dtype."""
    if not loader.uses_kernel("layer_norm", x):
        return add_layer_norm_reference(x, residual, weight, bias, eps, probability, seed)
    return _norm(x, residual, weight, bias, eps, _Variant(False, dropout_of(probability)), seed)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, probability: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``add_layer_norm`` in plain torch: ``dropout_residual_reference``, then ``layer_norm_reference``."""
    h = dropped_sum(x, residual, dropout_of(probability), seed)
    return layer_norm_reference(h, weight, bias, eps), h


class _RmsNormReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        y = wide * inverse_rms if wide.dtype == x.dtype else wide.mul_(inverse_rms).to(x.dtype)
        return y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad_y,) = grads
        x, weight, inverse_rms = ctx.saved_tensors
        narrow = inverse_rms.dtype != x.dtype
        x_hat = widened(x).mul_(inverse_rms) if narrow else x * inverse_rms
        product = x_hat * grad_y
        wanted = ctx.needs_input_grad[1]
        grad_weight = product.reshape(-1, weight.numel()).sum(0).to(weight.dtype) if wanted else None
        mean = product.mul_(weight).mean(-1, keepdim=True)
        del product
        grad_x = x_hat.mul_(mean).neg_()
        grad_x.add_(grad_y * weight) if narrow else grad_x.addcmul_(grad_y, weight)
        return grad_x.mul_(inverse_rms).to(x.dtype), grad_weight, None


# ---- launchers --------------------------------------------------------------------------------------------------------


class _Variant(NamedTuple):
    rms: bool
    dropout: Dropout = Dropout(0)


_RMS, _LAYER = _Variant(True), _Variant(False)


@functools.cache
def _forward_kernel(types: tuple[torch.dtype, torch.dtype], pack: int, width: int, rows: Rows, **flags: int) -> Kernel:
    return kernel(
        "norm_forward", "norm_forward", X_TYPE=type_name(types[0]), W_TYPE=type_name(types[1]), WIDTH=width,
        PACK=pack, LANES=rows.lanes, THREADS=rows.threads, **flags,
    )  # fmt: skip


@functools.cache
def _backward_kernel(types: tuple[torch.dtype, torch.dtype], pack: int, width: int, rows: Rows, **flags: int) -> Kernel:
    return kernel(
        "norm_backward", "norm_backward", X_TYPE=type_name(types[0]), W_TYPE=type_name(types[1]), WIDTH=width,
        PACK=pack, LANES=rows.lanes, THREADS=rows.threads, **flags,
    )  # fmt: skip


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
        variant: _Variant, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        width = weight.numel()
        if not 0 < width <= MAX_WIDTH or x.shape[-1] != width:
            raise invalid("width of a norm", tuple(x.shape), f"[..., {width}], at most {MAX_WIDTH}")
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        n_rows = x.numel() // width
        y = torch.empty_like(x)
        h = None if residual is None else torch.empty_like(x)
        mean, inverse = (
            None if absent else torch.empty(n_rows, dtype=torch.float32, device=x.device)
            for absent in (variant.rms, False)
        )
        pack = loader.pack_width(x, residual, weight, bias, y, h, row=width)
        rows = row_threads(width, pack, chip(x.device).tile.row_elements)
        compiled = _forward_kernel(
            (x.dtype, weight.dtype), pack, width, rows, RMS=int(variant.rms), BIAS=int(bias is not None),
            RESIDUAL=int(residual is not None), DROPOUT=int(seed is not None),
        )  # fmt: skip
        grid = min(ceil_div(n_rows, rows.per_block), 2**31 - 1)
        launch(
            compiled, grid, rows.threads, x, residual, weight, bias, h, y, mean, inverse, n_rows, float(eps), seed,
            variant.dropout.threshold, variant.dropout.scale,
        )  # fmt: skip
        ctx.save_for_backward(x if h is None else h, weight, mean, inverse, seed)
        ctx.variant, ctx.adds, ctx.bias_dtype = variant, h is not None, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, mean, inverse, seed = ctx.saved_tensors
        variant: _Variant = ctx.variant
        width = weight.numel()
        n_rows = h.numel() // width
        grad_y = torch.zeros_like(h) if grads[0] is None else grads[0].contiguous()
        grad_sum = None if grads[1] is None else grads[1].contiguous()
        grad_h = torch.empty_like(h)
        grad_x = None if seed is None else torch.empty_like(h)
        pack = loader.pack_width(grad_y, grad_sum, h, weight, row=width)
        rows = row_threads(width, pack, chip(h.device).tile.row_elements_backward)
        blocks = backward_blocks(n_rows, rows, chip(h.device))
        partial_weight, partial_bias = (
            torch.empty(blocks, width, dtype=torch.float32, device=h.device) if present else None
            for present in (True, ctx.bias_dtype is not None)
        )
        reload = rows.lanes > 512
        compiled = _backward_kernel(
            (h.dtype, weight.dtype), pack, width, rows, RMS=int(variant.rms), BIAS=int(partial_bias is not None),
            GRAD_SUM=int(grad_sum is not None), DROPOUT=int(seed is not None), RELOAD=int(reload),
        )  # fmt: skip
        launch(
            compiled, blocks, rows.threads, grad_y, grad_sum, h, weight, mean, inverse, grad_h, grad_x, partial_weight,
            partial_bias, n_rows, seed, variant.dropout.threshold, variant.dropout.scale,
            shared_bytes=4 * width if reload and partial_bias is not None else 0,
        )  # fmt: skip
        assert partial_weight is not None
        wanted = ctx.needs_input_grad  # frozen ones' partial sums are made and not summed
        grad_weight = sum_columns(partial_weight, weight.dtype) if wanted[2] else None
        grad_bias = sum_columns(partial_bias, ctx.bias_dtype) if partial_bias is not None and wanted[3] else None
        grad_residual = grad_h if ctx.adds else None
        return grad_h if grad_x is None else grad_x, grad_residual, grad_weight, grad_bias, None, None, None


def _norm_of(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, variant: _Variant,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if variant.dropout.threshold == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    return _Norm.apply(x, residual, weight, bias, eps, variant, seed)


_norm = loader.outside_compile(_norm_of)
_rms_norm_reference = loader.outside_compile(_RmsNormReference.apply)
