"""Tensor parallelism: ranks that share every layer (Shoeybi et al. 2019), with sequence parallelism between layers
(Korthikanti et al. 2022).

Each rank has a part of the heads, of the MLP's channels and of the vocabulary. The residual stream is the same on all ranks,
or, with sequence parallelism, split by tokens: of all ``B * S`` tokens of a micro-batch in their order each rank has an equal
run, so that gathering them needs no reordering. What is gathered for a projection is not kept: backward gathers it again
while it multiplies by the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.sharding.tensor import SPLIT_DIM, share, split_of
from estimator.sharding.units import Split, Unit
from runtime.comm import Communicator
from runtime.context import managed_memory
from runtime.parallel.context import WholeContext
from runtime.parallel.experts import WholeExperts
from runtime.parallel.late import add_gradient, later
from runtime.parallel.layers import Weights, WholeLayers
from runtime.parallel.split import Sharers
from runtime.parallel.started import started
from runtime.parallel.vocabulary import VocabularyEmbedding, VocabularyLoss
from runtime.recompute import summands


class TensorParallel(WholeLayers):
    """The layers of one of the ranks that share them."""

    def __init__(
        self, comm: Communicator, *, sequence: bool, context: WholeContext | None = None, experts: WholeExperts | None = None
    ) -> None:  # fmt: skip
        super().__init__(context, experts)
        self.comm, self.sequence = comm, sequence
        self.span = comm.mesh.span("tp")
        self.size, self.place = self.span.size, self.span.place(comm.rank)
        self.tokens: tuple[int, ...] = ()
        """Batch and sequence of the micro-batch that goes through."""
        comm.join_span("tensor", self.span)

    def share(self, size: int) -> int:
        return share(size, self.size)

    def mark(self, model: nn.Module, units: Sequence[Unit]) -> None:
        for unit in units:
            for param in unit.params:
                if param.name in SPLIT_DIM:
                    held = model.get_parameter(f"{unit.name}.{param.name}")
                    held.part = split_of(param.name, param.shape, self.size, self.experts.size)  # type: ignore[attr-defined]

    def sharers(self, split: Split) -> Sharers:
        return self if split.axis == "tp" else super().sharers(split)

    def begin(self, batch: Sequence[int]) -> tuple[int, ...]:
        self.tokens = tuple(batch)
        return (math.prod(batch) // self.size,) if self.sequence else self.tokens

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        self.begin(ids.shape)
        return VocabularyEmbedding.apply(ids, table, self)  # type: ignore[no-any-return]

    def positions(self, ids: Tensor) -> Tensor:
        if not self.sequence:
            return super().positions(ids)
        n = ids.numel() // self.size
        own = torch.arange(self.place * n, (self.place + 1) * n, device=ids.device) % ids.shape[1]
        return super().positions(ids)[own]

    def columns(self, x: Tensor, layers: Sequence[Weights]) -> tuple[Tensor, ...]:
        weights, biases = zip(*layers, strict=True)
        return _Columns.apply(x, self, *weights, *biases)  # type: ignore[no-any-return]

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with summands():
            partial = F.linear(x.reshape(-1, x.shape[-1]), weight)
        out = _ToStream.apply(partial, bias, self)
        return out if self.sequence else out.view(*self.tokens, -1)  # type: ignore[no-any-return]

    def enter(self, x: Tensor) -> Tensor:
        return _FromStream.apply(x, self)  # type: ignore[no-any-return]

    def leave(self, y: Tensor, like: Tensor) -> Tensor:
        return _ToStream.apply(y, None, self).view_as(like)  # type: ignore[no-any-return]

    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        return x.view(*self.tokens, -1, head_dim)

    def of_heads(self, weight: Tensor) -> Tensor:
        """Its gradient is the sum over all ranks' heads; with sequence parallelism the step's last reduction adds it up."""
        return weight if self.sequence else _SummedGradient.apply(weight, self)  # type: ignore[no-any-return]

    def loss(self, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocab_size: int) -> Tensor:
        return VocabularyLoss.apply(h, weight, bias, labels, vocab_size, self)  # type: ignore[no-any-return]

    # ---- between ranks --------------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> tuple[Tensor, Any]:
        """Room for the tokens of all ranks, ``[rows, D]``, and what to wait for until they are in it. ``x`` ``[rows / size, D]``."""
        full = torch.empty(x.shape[0] * self.size, *x.shape[1:], dtype=x.dtype, device=x.device)
        with managed_memory():
            return full, started(lambda whole, own: self.comm.all_gather(whole, own, self.span, "tensor"), full, x)

    def scatter_sum(self, full: Tensor) -> tuple[Tensor, Any]:
        """This rank's tokens of the sum over ranks of ``full`` ``[rows, D]``, once what comes with it has been waited for."""
        own = torch.empty(full.shape[0] // self.size, *full.shape[1:], dtype=full.dtype, device=full.device)
        with managed_memory():
            return own, started(
                lambda part, whole: self.comm.reduce_scatter(part, whole, self.span, "tensor"), own, full
            )

    def sum(self, full: Tensor) -> Any:
        """Starts to make ``full`` the sum over ranks, in place; what to wait for."""
        with managed_memory():
            return started(lambda total: self.comm.all_reduce(total, self.span, "tensor"), full)

    def to_stream(self, partial: Tensor) -> Tensor:
        """The sum over ranks of ``partial`` ``[rows, D]``, as the residual stream holds it (in place where that is all of it)."""
        result, work = self.scatter_sum(partial) if self.sequence else (partial, self.sum(partial))
        self.wait(work)
        return result

    def from_stream(self, x: Tensor) -> Tensor:
        """``[rows, D]`` of what the residual stream holds."""
        if not self.sequence:
            return x.reshape(-1, x.shape[-1])
        full, work = self.gather(x)
        self.wait(work)
        return full


class _Columns(torch.autograd.Function):
    """Projections that share their input; keeps that as the residual stream holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorParallel, *params: Tensor | None) -> tuple[Tensor, ...]:
        n = len(params) // 2
        weights, biases = params[:n], params[n:]
        full = tensor.from_stream(x)
        outputs = tuple(
            torch.mm(full, w.t()) if b is None else torch.addmm(b, full, w.t())  # type: ignore[union-attr]
            for w, b in zip(weights, biases, strict=True)
        )
        ctx.save_for_backward(x, *weights)
        ctx.tensor, ctx.weights, ctx.biases = tensor, weights, biases
        lead = tensor.tokens
        return tuple(y.view(*lead, -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensor: TensorParallel = ctx.tensor
        x, *weights = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        is_late = later(partial(_add_gradients, tensor, x, flat, ctx.weights, ctx.biases))
        gathers = tensor.sequence and not is_late
        full, gathering = tensor.gather(x) if gathers else (x.reshape(-1, x.shape[-1]), None)
        grad_full = torch.mm(flat[0], weights[0])
        for grad, weight in zip(flat[1:], weights[1:], strict=True):
            torch.addmm(grad_full, grad, weight, out=grad_full)
        tensor.wait(gathering)
        grad_x, work = tensor.scatter_sum(grad_full) if tensor.sequence else (grad_full, tensor.sum(grad_full))
        none: list[Tensor | None] = [None] * len(flat)
        grad_weights = none if is_late else [grad.t() @ full for grad in flat]
        grad_biases = (
            none if is_late else [None if b is None else grad.sum(0) for grad, b in zip(flat, ctx.biases, strict=True)]
        )
        tensor.wait(work)
        return grad_x.view(x.shape), None, *grad_weights, *grad_biases


@torch.no_grad()
def _add_gradients(
    tensor: TensorParallel, x: Tensor, grads: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """What ``_Columns`` has put off."""
    full = tensor.from_stream(x)
    for grad, weight, bias in zip(grads, weights, biases, strict=True):
        add_gradient(weight, grad.t() @ full)
        if bias is not None:
            add_gradient(bias, grad.sum(0))


class _ToStream(torch.autograd.Function):
    """The sum over ranks of ``partial`` ``[rows, D]``, where all of it stays in its place, and a bias."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, bias: Tensor | None, tensor: TensorParallel) -> Tensor:
        out = tensor.to_stream(partial)
        if bias is not None:
            out.add_(bias)
        if not tensor.sequence:
            ctx.mark_dirty(partial)
        ctx.tensor, ctx.has_bias = tensor, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad = grads[0]
        full = ctx.tensor.from_stream(grad)
        return full, grad.sum(0) if ctx.has_bias else None, None


class _FromStream(torch.autograd.Function):
    """``[rows, width]`` of what the residual stream holds; ranks' gradients of it are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor, ctx.shape = tensor, x.shape
        return tensor.from_stream(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.tensor.to_stream(grads[0].contiguous()).view(ctx.shape), None  # nobody else has the gradient


class _SummedGradient(torch.autograd.Function):
    """The same tensor, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor = tensor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()  # of one norm's backward pass: nobody else has it
        ctx.tensor.wait(ctx.tensor.sum(grad))
        return grad, None
