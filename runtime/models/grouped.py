"""Matrix products of consecutive rows with one expert's weights after another's.

Shapes: N slots, E experts, I and O widths of what goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.kernels import loader
from runtime.models.routing import empty_slots
from runtime.parallel.late import add_gradient, later


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int] | None) -> Tensor:
    """Rows of ``x`` ``[N, I]`` times their expert's matrix of ``weight`` ``[E, O, I]``, plus its row of ``bias`` ``[E, O]``.

    ``bounds`` are the E + 1 places where an expert's rows begin and the last one's end. ``None``: all have equally many, and one row
    more, which is nobody's, stays zero in both directions.
    """
    return _linear(x, weight, bias, bounds)


def _rows_of(bounds: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert with its rows."""
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        yield expert, slice(start, stop)


def _even(x: Tensor, n_experts: int) -> Tensor:
    """``[E, C, width]`` of ``[E * C + 1, width]``."""
    return x[:-1].unflatten(0, (n_experts, -1))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int] | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds, ctx.weight, ctx.bias = bounds, weight, bias
        n_experts = len(weight)
        out = empty_slots(x, weight.shape[1], len(x), bounds is not None)
        if bounds is None:
            of_experts = _even(out, n_experts)
            torch.bmm(_even(x, n_experts), weight.transpose(1, 2), out=of_experts)
            if bias is not None:
                of_experts += bias[:, None]
            return out
        for expert, rows in _rows_of(bounds):
            if bias is None:
                torch.mm(x[rows], weight[expert].t(), out=out[rows])
            else:
                torch.addmm(bias[expert], x[rows], weight[expert].t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad_y,), bounds, n_experts = grads, ctx.bounds, len(weight)
        grad_x = empty_slots(x, x.shape[1], len(x), bounds is not None)
        if bounds is None:
            torch.bmm(_even(grad_y, n_experts), weight, out=_even(grad_x, n_experts))
        else:
            for expert, rows in _rows_of(bounds):
                torch.mm(grad_y[rows], weight[expert], out=grad_x[rows])
        if later(partial(_add_gradients, x, grad_y, ctx.weight, ctx.bias, bounds)):
            return grad_x, None, None, None
        return grad_x, *_gradients(x, grad_y, weight, ctx.bias, bounds), None


def _gradients(
    x: Tensor, grad_y: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """Of ``weight`` and ``bias``."""
    grad_weight, grad_bias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    if bounds is None:
        of_experts = _even(grad_y, len(weight))
        torch.bmm(of_experts.transpose(1, 2), _even(x, len(weight)), out=grad_weight)
        if grad_bias is not None:
            torch.sum(of_experts, 1, out=grad_bias)
        return grad_weight, grad_bias
    for expert, rows in _rows_of(bounds):
        torch.mm(grad_y[rows].t(), x[rows], out=grad_weight[expert])  # zeros where no token came
        if grad_bias is not None:
            torch.sum(grad_y[rows], 0, out=grad_bias[expert])
    return grad_weight, grad_bias


@torch.no_grad()
def _add_gradients(
    x: Tensor, grad_y: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int] | None
) -> None:  # fmt: skip
    """What a backward pass has put off."""
    grad_weight, grad_bias = _gradients(x, grad_y, weight, bias, bounds)
    add_gradient(weight, grad_weight)
    if bias is not None and grad_bias is not None:
        add_gradient(bias, grad_bias)


_linear = loader.outside_compile(_Linear.apply)
