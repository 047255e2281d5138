"""Head and cross-entropy together, in chunks of rows: all logits are never there at once.

Chunk by chunk: logits, losses and the logits' gradients over them (``cross_entropy.cu``), and from these the gradients of
hidden states, weight and bias, all in the forward pass, as Liger-Kernel does (Hsu et al. 2024, section 3.2). The backward
pass scales them by the loss's own gradient. Kept for it: those gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import invalid, require_int
from estimator.ops.kernels.linear_cross_entropy import default_chunk_rows, logits_stride
from runtime.context import last_of_logits, logits_memory
from runtime.kernels import loader
from runtime.kernels.cross_entropy import (
    DEFAULTS,
    LossOptions,
    Rows,
    cross_entropy,
    cross_entropy_reference,
    early_normaliser,
    normaliser_of,
    scale_in_place,
    sum_of,
)
from runtime.kernels.loader import widened


def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions = DEFAULTS,
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy (see ``LossOptions``) of ``h @ weight.T + bias``; returns fp32 ``[]``.

    ``h`` ``[..., D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]`` or ``None``, all of one dtype (fp32, bf16, fp16); ``labels``
    ``[...]`` int64. On a GPU at most ``chunk_rows`` rows of logits exist at a time (default: ``default_chunk_rows``) and
    the backward pass can run once; with this kernel switched off ``cross_entropy`` works on all logits at once. The weight's
    gradient is added up over chunks in the weight's dtype. Raises ``InputError`` for shapes and dtypes that do not fit
    and for reduction "none".
    """
    if weight.ndim != 2 or h.shape[-1:] != weight.shape[1:] or h.shape[:-1] != labels.shape:
        allowed = "h [..., D], weight [V, D], labels [...]"
        raise invalid("shapes of h, weight, labels", tuple(map(tuple, (h.shape, weight.shape, labels.shape))), allowed)
    if labels.dtype != torch.int64:
        raise invalid("dtype of labels", labels.dtype, "torch.int64")
    if options.reduction == "none":
        raise invalid(
            "reduction", "none", "mean or sum: gradients of the weight are computed before the loss's is known"
        )
    if chunk_rows is not None:
        require_int("chunk_rows", chunk_rows)
    if not loader.uses_kernel("linear_cross_entropy", h):
        if not loader.uses_kernel("cross_entropy", h):
            return linear_cross_entropy_reference(h, weight, bias, labels, options, chunk_rows)
        with logits_memory():
            return cross_entropy(F.linear(h, weight, bias), labels, options)
    if not weight.dtype == h.dtype == (h if bias is None else bias).dtype:
        raise invalid(
            "dtype of weight, bias", tuple(t.dtype for t in (weight, bias) if t is not None), f"that of h, {h.dtype}"
        )
    present = torch.is_grad_enabled()
    wanted = _Wanted(*(t is not None and t.requires_grad and present for t in (h, weight, bias)))
    rows = chunk_rows or default_chunk_rows(labels.numel(), weight.shape[1], weight.shape[0])
    return _linear(h, weight, bias, labels, options, rows, wanted)


def linear_cross_entropy_reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions = DEFAULTS,
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """``linear_cross_entropy`` in plain torch, all logits at once, in fp32 (those in ``h``'s dtype do not outlive their copy)."""
    with logits_memory():
        logits = widened(F.linear(h, weight, bias))
        return cross_entropy_reference(logits, labels, options)


# ---- launchers --------------------------------------------------------------------------------------------------------


class _Wanted(NamedTuple):
    h: bool
    weight: bool
    bias: bool


def _product_scale(dtype: torch.dtype, n_rows: int) -> float:
    """What the weight's fp16 gradient is multiplied by while it is a sum over rows, not yet a mean: a power of two that
    leaves as much room above as below."""
    return 2.0 ** -(n_rows.bit_length() // 2) if dtype == torch.float16 else 1.0


def _chunk_buffer(rows: int, vocab_size: int, like: Tensor) -> Tensor:
    """Logits ``[rows, V]`` whose rows start at cache lines, so that products of an odd vocabulary stay fast."""
    stride = logits_stride(vocab_size, like.itemsize)
    return torch.empty(rows, stride, dtype=like.dtype, device=like.device)[:, :vocab_size]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions, chunk_rows: int,
        wanted: _Wanted,
    ) -> Tensor:  # fmt: skip
        with logits_memory():
            labels = labels.reshape(-1).contiguous()
            n, vocab_size = len(labels), len(weight)
            flat = h.reshape(n, weight.shape[1]).contiguous()
            scale = _product_scale(h.dtype, n)
            empty = torch.empty if n else torch.zeros  # without a row the loop below fills none of the gradients
            grad_h = torch.empty_like(flat) if wanted.h else None
            grad_weight = empty(weight.shape, dtype=h.dtype, device=h.device) if wanted.weight else None
            sums = empty(vocab_size, dtype=torch.float32, device=h.device) if wanted.bias else None
            buffer = _chunk_buffer(min(n, chunk_rows), vocab_size, h)
            losses = torch.empty(n, dtype=torch.float32, device=h.device)
            normaliser = normaliser_of(labels, options)
            now, later = early_normaliser(h.dtype, normaliser)
            for start in range(0, n, chunk_rows):
                some_h, some_labels = flat[start : start + chunk_rows], labels[start : start + chunk_rows]
                logits = buffer[: len(some_h)]
                if bias is None:
                    torch.mm(some_h, weight.t(), out=logits)
                else:
                    torch.addmm(bias, some_h, weight.t(), out=logits)
                rows = Rows(logits, some_labels, options)
                if not any(wanted):
                    tops, exponentials = (torch.empty_like(losses[: len(some_h)]) for _ in range(2))
                    rows.losses(losses[start:], tops, exponentials)
                    continue
                rows.losses_and_gradients(losses[start:], now)
                if grad_h is not None:
                    torch.mm(logits, weight, out=grad_h[start : start + chunk_rows])
                if grad_weight is not None:
                    beta = 1 if start else 0
                    torch.addmm(grad_weight, logits.t(), some_h, beta=beta, alpha=scale, out=grad_weight)
                if sums is not None and start == 0:
                    torch.sum(logits, 0, dtype=torch.float32, out=sums)
                elif sums is not None:
                    sums += logits.sum(0, dtype=torch.float32)
            if grad_h is not None:
                last_of_logits(grad_h)
            ctx.save_for_backward(grad_h, grad_weight, sums, later)
            ctx.scale, ctx.shape, ctx.dtype = scale, h.shape, h.dtype
            return sum_of(losses, normaliser)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight, sums, later = ctx.saved_tensors
        with logits_memory():
            factor = grads[0].float()
            if later is not None:
                factor = factor * later
            if grad_h is not None:
                scale_in_place(grad_h, factor)
            if grad_weight is not None:
                scale_in_place(grad_weight, factor if ctx.scale == 1 else factor / ctx.scale)
            if sums is not None:
                scale_in_place(sums, factor)
            for tensor in (grad_h, grad_weight, sums):
                if tensor is not None:
                    torch.autograd.graph.increment_version(tensor)
            grad_bias = None if sums is None else sums.to(ctx.dtype)
        return None if grad_h is None else grad_h.view(ctx.shape), grad_weight, grad_bias, None, None, None, None


_linear = loader.outside_compile(_LinearCrossEntropy.apply)
