"""Embedding and loss over a vocabulary of which each tensor-parallel rank has a part (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.ops.kernels.linear_cross_entropy import default_chunk_rows
from runtime.context import last_of_logits, logits_memory, managed_memory
from runtime.kernels.cross_entropy import DEFAULTS
from runtime.parallel.started import started

if TYPE_CHECKING:
    from runtime.parallel.tensor import TensorParallel


class VocabularyEmbedding(torch.autograd.Function):
    """Rows of a table: each rank looks up those it has, and the sum over ranks is all of them."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, tensor: TensorParallel) -> Tensor:
        places = ids.reshape(-1) - tensor.place * len(table)
        elsewhere = (places < 0) | (places >= len(table))
        places.masked_fill_(elsewhere, 0)
        rows = F.embedding(places, table).masked_fill_(elsewhere[:, None], 0)
        ctx.save_for_backward(places, elsewhere)
        ctx.tensor, ctx.n_rows = tensor, len(table)
        out = tensor.to_stream(rows)
        return out if tensor.sequence else out.view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        places, elsewhere = ctx.saved_tensors
        full = ctx.tensor.from_stream(grads[0])
        if ctx.tensor.sequence:
            full.masked_fill_(elsewhere[:, None], 0)
        else:
            full = full.masked_fill(elsewhere[:, None], 0)
        grad = torch.ops.aten.embedding_dense_backward(full, places, ctx.n_rows, -1, False)
        return None, grad, None


class VocabularyLoss(torch.autograd.Function):
    """Mean cross-entropy of ``h @ weight.T + bias`` where each rank has a part of the rows of ``weight``.

    In chunks of tokens: this rank's logits, their largest, the sum of exponentials and the label's own (all ranks' are
    gathered: one small message per chunk), the logits' gradients, and from these the gradients of hidden states, weight and
    bias, all in the forward pass. Kept: those gradients, which backward scales. The weight's is added up in its dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocab_size: int, tensor: TensorParallel
    ) -> Tensor:  # fmt: skip
        with logits_memory():
            labels = labels.reshape(-1)
            full = tensor.from_stream(h)
            n, first = len(labels), tensor.place * len(weight)
            n_here = min(len(weight), vocab_size - first)
            chunk = default_chunk_rows(n, weight.shape[1], len(weight))
            late = h.dtype == torch.float16  # a probability divided by the number of rows is lost there
            scale = 2.0 ** -(n.bit_length() // 2) if late else 1.0
            counted = labels.ne(DEFAULTS.ignore_index)
            share = 1.0 / counted.sum(dtype=torch.float32).clamp_(min=1)
            grad_h = torch.empty_like(full)
            grad_weight = torch.zeros_like(weight) if n_here < len(weight) else torch.empty_like(weight)
            grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=h.device) if bias is not None else None
            losses = torch.empty(n, dtype=torch.float32, device=h.device)
            own_weight, own_bias = weight[:n_here], None if bias is None else bias[:n_here]
            for start in range(0, n, chunk):
                part = slice(start, start + chunk)
                some = full[part]
                logits = F.linear(some, own_weight, own_bias)
                probabilities, losses[part] = _softmax(logits.float(), labels[part] - first, tensor)
                probabilities.mul_(counted[part, None])
                losses[part].mul_(counted[part])
                if not late:
                    probabilities.mul_(share)
                grads = logits.copy_(probabilities) if logits.dtype != torch.float32 else probabilities
                torch.mm(grads, own_weight, out=grad_h[part])
                torch.addmm(
                    grad_weight[:n_here], grads.t(), some, beta=int(start > 0), alpha=scale, out=grad_weight[:n_here]
                )
                if grad_bias is not None:
                    grad_bias[:n_here] += grads.sum(0, dtype=torch.float32)
                del logits, probabilities, grads
            del full
            grad_h = tensor.to_stream(grad_h)
            last_of_logits(grad_h)
            ctx.save_for_backward(grad_h, grad_weight, grad_bias, share if late else None)
            ctx.scale, ctx.shape = scale, h.shape
            return losses.sum() * share

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight, grad_bias, share = ctx.saved_tensors
        with logits_memory():
            factor = grads[0].float()
            if share is not None:
                factor = factor * share
            grad_h.mul_(factor)
            grad_weight.mul_(factor / ctx.scale)
            if grad_bias is not None:
                grad_bias = grad_bias.mul_(factor).to(grad_weight.dtype)
        return grad_h.view(ctx.shape), grad_weight, grad_bias, None, None, None


def _softmax(logits: Tensor, places: Tensor, tensor: TensorParallel) -> tuple[Tensor, Tensor]:
    """Gradients of the losses by these logits, written over them, and the losses.

    ``logits`` fp32 ``[rows, V / ranks]``; ``places`` ``[rows]``: where labels are among this rank's, or outside.
    """
    top = logits.amax(1)
    is_here = (places >= 0) & (places < logits.shape[1])
    places = places.clamp(0, logits.shape[1] - 1)[:, None]
    label = logits.gather(1, places).squeeze(1) * is_here
    total = logits.sub_(top[:, None]).exp_().sum(1)
    own = torch.stack((top, total, label))
    everyone = torch.empty(tensor.size * 3, own.shape[1], dtype=own.dtype, device=own.device)
    with managed_memory():
        work = started(lambda to, out: tensor.comm.all_gather(to, out, tensor.span, "tensor"), everyone, own)
    tensor.wait(work)
    tops, totals, labels = everyone.view(tensor.size, 3, -1).unbind(1)
    highest = tops.amax(0)
    total = (totals * (tops - highest).exp()).sum(0)
    losses = total.log() + highest - labels.sum(0)
    logits.mul_(((top - highest).exp() / total)[:, None])
    logits.scatter_add_(1, places, -is_here.to(logits.dtype)[:, None])
    return logits, losses
