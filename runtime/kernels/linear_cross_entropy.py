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
from estimator.ops.operator import Op
from runtime.context import logits_memory
from runtime.kernels import loader
from runtime.kernels.cross_entropy import (
    DEFAULTS,
    LossOptions,
    Rows,
    cross_entropy_reference,
    early_normaliser,
    normaliser_of,
    scale_in_place,
    sum_of,
)
from runtime.kernels.loader import ceil_div

_LEAST_CHUNK_ROWS = 1024
_LINE_BYTES = 128


def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions = DEFAULTS,
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy (see ``LossOptions``) of ``h @ weight.T + bias``; returns fp32 ``[]``.

    ``h`` ``[..., D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]`` or ``None``, all of one dtype (fp32, bf16, fp16); ``labels``
    ``[...]`` int64. On a GPU at most ``chunk_rows`` rows of logits exist at a time (default: ``default_chunk_rows``) and
    the backward pass can run once. The weight's gradient is added up over chunks in the weight's dtype. Raises
    ``InputError`` for shapes and dtypes that do not fit and for reduction "none".
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
        return linear_cross_entropy_reference(h, weight, bias, labels, options, chunk_rows)
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
    """``linear_cross_entropy`` in plain torch, all logits at once."""
    with logits_memory():
        return cross_entropy_reference(F.linear(h, weight, bias), labels, options)


def default_chunk_rows(n_rows: int, width: int, vocab_size: int) -> int:
    """Rows of a chunk whose logits take about as much as the hidden states (Liger-Kernel's rule), but no fewer than 1024,
    below which reading the weight again for every chunk costs more than the products."""
    rows = max(_LEAST_CHUNK_ROWS, ceil_div(n_rows * width, vocab_size))
    return max(1, min(n_rows, 1 << (rows - 1).bit_length()))


def cost(
    shape: tuple[int, int, int], dtype: str, itemsize: int, *, bias: bool = False, chunk_rows: int | None = None
) -> tuple[list[Op], list[Op]]:
    """Forward and backward of one call on ``(rows, D, V)`` with gradients of everything, reduction "mean", no row ignored and
    a loss whose own gradient is 1 (the backward pass then reads a factor and nothing else); bf16 or fp32.

    The bias's gradient is one sum over each chunk in plain torch.
    """
    n_rows, width, vocab_size = shape
    rows = chunk_rows or default_chunk_rows(n_rows, width, vocab_size)
    loss = Op("linear_cross_entropy", "loss", False, dtype, 0, 12 * n_rows + 16, launches=2)
    forward = [loss]
    for start in range(0, n_rows, rows):
        here = min(rows, n_rows - start)
        logits = here * vocab_size * itemsize
        h, w = here * width * itemsize, vocab_size * width * itemsize
        flops = 2 * here * width * vocab_size
        moved = 2 * logits + 12 * here + 4
        forward += [
            Op("head", "matmul", False, dtype, flops, h + w + logits + bias * vocab_size * itemsize, (1, here, vocab_size, width)),
            Op("cross_entropy", "loss", False, dtype, 8 * here * vocab_size, moved),
            Op("head_grad_input", "matmul", True, dtype, flops, logits + w + h, (1, here, width, vocab_size)),
            Op("head_grad_weight", "matmul", True, dtype, flops, logits + h + w * (2 if start else 1), (1, vocab_size, width, here)),
        ]  # fmt: skip
        if bias:
            moved = logits + vocab_size * (12 if start else 4)
            forward.append(
                Op("head_grad_bias", "elementwise", True, dtype, here * vocab_size, moved, launches=2 if start else 1)
            )
    n = 3 if bias else 2
    return forward, [Op("linear_cross_entropy_backward", "loss", True, dtype, 0, 4 * n, launches=n)]


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
    line = _LINE_BYTES // like.itemsize
    stride = ceil_div(vocab_size, line) * line
    return torch.empty(rows, stride, dtype=like.dtype, device=like.device)[:, :vocab_size]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions, chunk_rows: int,
        wanted: _Wanted,
    ) -> Tensor:  # fmt: skip
        flat, labels = h.reshape(labels.numel(), weight.shape[1]).contiguous(), labels.reshape(-1).contiguous()
        n, vocab_size = len(flat), len(weight)
        scale = _product_scale(h.dtype, n)
        grad_h = torch.empty_like(flat) if wanted.h else None
        # Without a row the loop below fills none of these.
        grad_weight = (
            (torch.empty if n else torch.zeros)(weight.shape, dtype=h.dtype, device=h.device) if wanted.weight else None
        )
        sums = torch.zeros(vocab_size, dtype=torch.float32, device=h.device) if wanted.bias else None
        with logits_memory():
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
                tops, exponentials = torch.empty_like(losses[: len(some_h)]), torch.empty_like(losses[: len(some_h)])
                rows.losses(losses[start:], tops, exponentials)
                continue
            rows.losses_and_gradients(losses[start:], now)
            if grad_h is not None:
                torch.mm(logits, weight, out=grad_h[start : start + chunk_rows])
            if grad_weight is not None:
                torch.addmm(
                    grad_weight, logits.t(), some_h, beta=1 if start else 0, alpha=scale, out=grad_weight
                )  # fmt: skip
            if sums is not None:
                sums += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_h, grad_weight, sums, later)
        ctx.scale, ctx.shape, ctx.dtype = scale, h.shape, h.dtype
        return sum_of(losses, normaliser)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight, sums, later = ctx.saved_tensors
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
