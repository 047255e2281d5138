"""Activations: ``activation(x + bias)`` and ``activation(gate) * up``, forward and backward in one pass each.

Kept for the backward pass: the inputs (and the bias); the activation is computed again. The kernels compute in fp32 and round
once, plain torch rounds each operation to the inputs' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from estimator.errors import require_choice
from estimator.ops.kernels.activation import slabs
from runtime.kernels import loader
from runtime.kernels.columns import sum_columns
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name


class _Activation(NamedTuple):
    code: int
    """``ACT`` in ``activation.cuh``."""
    reference: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    """Gradient of ``x`` from that of the value and ``x``."""


_aten = torch.ops.aten

ACTIVATIONS = {
    "silu": _Activation(0, F.silu, _aten.silu_backward),
    "gelu": _Activation(1, F.gelu, _aten.gelu_backward),
    "gelu_tanh": _Activation(
        2, lambda x: F.gelu(x, approximate="tanh"), lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh")
    ),
    "relu": _Activation(3, F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "relu_squared": _Activation(4, lambda x: F.relu(x).square(), lambda grad, x: F.relu(x).mul_(grad).mul_(2)),
}


def activate(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """``activation(x + bias)``. ``x`` ``[..., F]`` fp32, bf16 or fp16; ``bias`` ``[F]`` of the same dtype or ``None``.

    Raises ``InputError`` for an unknown ``name``.
    """
    require_choice("activation", name, ACTIVATIONS)
    if not loader.uses_kernel("activation", x):
        return activate_reference(x, name, bias)
    return _biased(x, bias, name) if bias is not None else _plain(x, name)


def activate_reference(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """``activate`` in plain torch."""
    return ACTIVATIONS[name].reference(x if bias is None else x + bias)


def gated_activate(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """``activation(gate) * up`` (Shazeer 2020: SwiGLU, GeGLU, ReGLU); both ``[..., F]`` of one dtype.

    Raises ``InputError`` for an unknown ``name``.
    """
    require_choice("activation", name, ACTIVATIONS)
    if not loader.uses_kernel("gated_activation", gate):
        return gated_activate_reference(gate, up, name)
    return _gated(gate, up, name)


def gated_activate_reference(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """``gated_activate`` in plain torch."""
    return _gated_reference(gate, up, name)


class _GatedReference(torch.autograd.Function):
    """Eager operators would keep the activation and ``up``'s product too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return ACTIVATIONS[name].reference(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        activation = ACTIVATIONS[ctx.name]
        grad_up = activation.reference(gate).mul_(grads[0])
        return activation.slope(grads[0] * up, gate), grad_up, None


# ---- launchers --------------------------------------------------------------------------------------------------------


@functools.cache
def _flat_kernel(function: str, activation: str, dtype: torch.dtype, pack: int, device: torch.device) -> Kernel:
    tile = chip(device).tile
    return kernel(
        "activation", function, X_TYPE=type_name(dtype), ACT=ACTIVATIONS[activation].code,
        PACK=pack, THREADS=tile.threads, UNROLL=tile.unroll,
    )  # fmt: skip


def _launch_flat(function: str, activation: str, *tensors: Tensor) -> None:
    """``tensors`` are contiguous, of one dtype and one size."""
    first = tensors[0]
    tile = chip(first.device).tile
    pack, head = loader.pack_width_and_head(*tensors)
    grid = ceil_div(first.numel() + head, pack * tile.threads * tile.unroll)
    compiled = _flat_kernel(function, activation, first.dtype, pack, first.device)
    launch(compiled, grid, tile.threads, *tensors, first.numel(), head)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name = name
        y = torch.empty_like(x)
        _launch_flat("plain_forward", name, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        _launch_flat("plain_backward", ctx.name, grads[0].contiguous(), x, grad_x)
        return grad_x, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.name = name
        y = torch.empty_like(gate)
        _launch_flat("gated_forward", name, gate, up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _launch_flat("gated_backward", ctx.name, grads[0].contiguous(), gate, up, grad_gate, grad_up)
        return grad_gate, grad_up, None


@functools.cache
def _biased_kernel(
    function: str, activation: str, dtype: torch.dtype, pack: int, column_threads: int, device: torch.device
) -> Kernel:
    tile = chip(device).tile
    return kernel(
        "biased_activation", function, X_TYPE=type_name(dtype), ACT=ACTIVATIONS[activation].code,
        PACK=pack, THREADS=tile.threads, UNROLL=tile.unroll, COLUMN_THREADS=column_threads,
    )  # fmt: skip


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, name: str) -> Tensor:
        x, bias = x.contiguous(), bias.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.name = name
        y = torch.empty_like(x)
        width = bias.numel()
        rows = x.numel() // max(1, width)
        pack = loader.pack_width(x, bias, y, row=width)
        here = slabs(rows, width, pack, chip(x.device))
        compiled = _biased_kernel("biased_forward", name, x.dtype, pack, here.column_threads, x.device)
        launch(compiled, here.grid, here.threads, x, bias, y, rows, width)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        grad_x = torch.empty_like(x)
        width = bias.numel()
        rows = x.numel() // max(1, width)
        pack = loader.pack_width(x, bias, grad_y, grad_x, row=width)
        here = slabs(rows, width, pack, chip(x.device))
        partial = torch.empty(here.n_partial, width, dtype=torch.float32, device=x.device)
        compiled = _biased_kernel("biased_backward", ctx.name, x.dtype, pack, here.column_threads, x.device)
        launch(compiled, here.grid, here.threads, grad_y, x, bias, grad_x, partial, rows, width)
        return grad_x, sum_columns(partial, bias.dtype) if ctx.needs_input_grad[1] else None, None


_plain = loader.outside_compile(_Plain.apply)
_biased = loader.outside_compile(_Biased.apply)
_gated = loader.outside_compile(_Gated.apply)
_gated_reference = loader.outside_compile(_GatedReference.apply)
