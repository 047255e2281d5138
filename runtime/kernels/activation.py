"""Activations: ``activation(x + bias)`` and ``activation(gate) * up``, forward and backward in one pass each.

Kept for the backward pass: the inputs (and the bias); the activation is computed again.
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
from estimator.ops.operator import Op
from runtime.kernels import loader
from runtime.kernels.columns import sum_columns
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name, widened


class _Activation(NamedTuple):
    code: int
    """``ACT`` in ``activation.cuh``."""
    reference: Callable[[Tensor], Tensor]
    flops: tuple[int, int]
    """Operations per element, value and slope; a transcendental function or a division counts as one."""


ACTIVATIONS = {
    "silu": _Activation(0, F.silu, (5, 9)),
    "gelu": _Activation(1, F.gelu, (4, 10)),
    "gelu_tanh": _Activation(2, lambda x: F.gelu(x, approximate="tanh"), (9, 15)),
    "relu": _Activation(3, F.relu, (1, 1)),
    "relu_squared": _Activation(4, lambda x: F.relu(x).square(), (2, 2)),
}


def activate(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """``activation(x + bias)``. ``x`` ``[..., F]`` fp32, bf16 or fp16; ``bias`` ``[F]`` of the same dtype or ``None``.

    Computed in fp32 and rounded once. Raises ``InputError`` for an unknown ``name``.
    """
    require_choice("activation", name, ACTIVATIONS)
    if not loader.uses_kernel("activation", x):
        return activate_reference(x, name, bias)
    return _biased(x, bias, name) if bias is not None else _plain(x, name)


def activate_reference(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """``activate`` in plain torch."""
    shifted = widened(x) if bias is None else widened(x) + widened(bias)
    return ACTIVATIONS[name].reference(shifted).to(x.dtype)


def gated_activate(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """``activation(gate) * up`` (Shazeer 2020: SwiGLU, GeGLU, ReGLU); both ``[..., F]`` of one dtype.

    Computed in fp32 and rounded once. Raises ``InputError`` for an unknown ``name``.
    """
    require_choice("activation", name, ACTIVATIONS)
    if not loader.uses_kernel("gated_activation", gate):
        return gated_activate_reference(gate, up, name)
    return _gated(gate, up, name)


def gated_activate_reference(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """``gated_activate`` in plain torch."""
    return (ACTIVATIONS[name].reference(widened(gate)) * widened(up)).to(gate.dtype)


def cost(name: str, numel: int, dtype: str, itemsize: int, *, gated: bool, bias: int = 0) -> tuple[Op, Op]:
    """Forward and backward of one call on ``numel`` elements, with a ``bias`` of that many elements (0: none)."""
    value, slope = ACTIVATIONS[name].flops
    n_bytes = numel * itemsize
    if gated:
        return (
            Op("gated_activation", "elementwise", False, dtype, (value + 1) * numel, 3 * n_bytes),
            Op("gated_activation_backward", "elementwise", True, dtype, (slope + 3) * numel, 5 * n_bytes),
        )
    extra = 1 if bias else 0
    return (
        Op("activation", "elementwise", False, dtype, (value + extra) * numel, 2 * n_bytes + bias * itemsize),
        Op(
            "activation_backward", "elementwise", True, dtype, (slope + 1 + 2 * extra) * numel,
            3 * n_bytes + 2 * bias * itemsize, launches=1 + extra,
        ),
    )  # fmt: skip


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


class _Slabs(NamedTuple):
    """How the threads of a biased kernel lie over ``[rows, width]``."""

    threads: int
    column_threads: int
    grid: tuple[int, int]

    @property
    def n_partial(self) -> int:
        """Rows of the partial bias gradient."""
        return self.grid[1] * (self.threads // self.column_threads)


def _slabs(rows: int, width: int, pack: int, device: torch.device) -> _Slabs:
    here = chip(device)
    threads = here.tile.threads
    packs = ceil_div(width, pack)
    column_threads = min(threads, 1 << max(0, packs - 1).bit_length())
    columns = ceil_div(packs, column_threads)
    most = ceil_div(rows, threads // column_threads * here.tile.unroll)
    wanted = ceil_div(here.persistent_blocks(threads), columns)
    return _Slabs(threads, column_threads, (columns, max(1, min(most, wanted, 65535))))


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
        slabs = _slabs(rows, width, pack, x.device)
        compiled = _biased_kernel("biased_forward", name, x.dtype, pack, slabs.column_threads, x.device)
        launch(compiled, slabs.grid, slabs.threads, x, bias, y, rows, width)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, bias = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        grad_x = torch.empty_like(x)
        width = bias.numel()
        rows = x.numel() // max(1, width)
        pack = loader.pack_width(x, bias, grad_y, grad_x, row=width)
        slabs = _slabs(rows, width, pack, x.device)
        partial = torch.empty(slabs.n_partial, width, dtype=torch.float32, device=x.device)
        compiled = _biased_kernel("biased_backward", ctx.name, x.dtype, pack, slabs.column_threads, x.device)
        launch(compiled, slabs.grid, slabs.threads, grad_y, x, bias, grad_x, partial, rows, width)
        return grad_x, sum_columns(partial, bias.dtype), None


_plain = loader.outside_compile(_Plain.apply)
_biased = loader.outside_compile(_Biased.apply)
_gated = loader.outside_compile(_Gated.apply)
