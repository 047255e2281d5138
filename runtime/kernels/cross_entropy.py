"""Softmax cross-entropy over the vocabulary: one pass over the logits, and the gradient written over them.

Never an fp32 copy of the logits. Kept for the backward pass: the logits and two fp32 per row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import invalid, require_choice
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, ceil_div, kernel, launch, type_name, widened

UNROLL = 4
_THREADS = 512
_WIDE_ROW = 65_536
"""Above so many 16-bit logits a block has twice the threads, so that half as many rows are under way and the second read of a row, where there
is one, finds it in the second-level cache (132 rows of 256 KB on an H200 with its 50 MB)."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is added up: over rows whose label is not ``ignore_index``, of logits x with lse = logsumexp(x),

    ``(1 - label_smoothing) (lse - x[label]) + label_smoothing (lse - mean(x)) + z_loss lse^2``.
    """

    ignore_index: int = -100
    """Rows with this label lose 0 and get gradient 0."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of the squared log-partition (PaLM, Chowdhery et al. 2022, section 5: 1e-4)."""
    reduction: Literal["mean", "sum", "none"] = "mean"
    """``mean`` is over rows that are not ignored."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise invalid("label_smoothing", self.label_smoothing, "a number of at least 0 and below 1")
        if not 0 <= self.z_loss < float("inf"):
            raise invalid("z_loss", self.z_loss, "a number of at least 0")
        require_choice("reduction", self.reduction, ("mean", "sum", "none"))


DEFAULTS = LossOptions()


def cross_entropy(
    logits: Tensor, labels: Tensor, options: LossOptions = DEFAULTS, *, early_gradient: bool = False
) -> Tensor:
    """Cross-entropy of ``logits`` ``[..., V]`` (fp32, bf16, fp16) and ``labels`` ``[...]`` int64; returns fp32, ``[]`` or ``[...]``.

    On a GPU the backward pass writes the gradient over the logits: whoever else needs them afterwards fails. With
    ``early_gradient`` the forward pass does, in the pass that computes the loss, and the backward pass only scales what
    it finds (memory is not touched where the factor is 1). There, a label that is neither in the vocabulary nor
    ``ignore_index`` gives NaN. Raises ``InputError`` for shapes and dtypes that do not fit.
    """
    _check(logits, labels)
    if early_gradient and options.reduction == "none":
        raise invalid("reduction", "none", "mean or sum where the gradient is computed in the forward pass")
    if not loader.uses_kernel("cross_entropy", logits):
        return cross_entropy_reference(logits, labels, options)
    early = early_gradient and torch.is_grad_enabled() and logits.requires_grad
    return _cross_entropy(logits, labels, options, early)


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, options: LossOptions = DEFAULTS, *, early_gradient: bool = False
) -> Tensor:
    """``cross_entropy`` in plain torch (a label outside the vocabulary raises torch's ``IndexError``)."""
    rows, flat = widened(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss = F.cross_entropy(
        rows, flat, ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
        reduction=options.reduction,
    )  # fmt: skip
    if options.z_loss:
        counted = flat != options.ignore_index
        squares = options.z_loss * torch.where(counted, rows.logsumexp(-1), 0).square()
        if options.reduction != "none":
            squares = squares.sum() / (counted.sum() if options.reduction == "mean" else 1)
        loss = loss + squares
    return loss.view(labels.shape) if options.reduction == "none" else loss


class VocabShard(NamedTuple):
    """One rank's part of a vocabulary that is split over a group (Megatron-LM, Shoeybi et al. 2019, section 3)."""

    first: int
    """Token of the first logit."""
    vocab_size: int
    """The whole vocabulary."""
    all_reduce: Callable[[Tensor, Literal["max", "sum"]], None]
    """Reduces a contiguous fp32 tensor over the group, in place."""


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, shard: VocabShard, options: LossOptions = DEFAULTS
) -> Tensor:
    """``cross_entropy`` where each rank of a group holds some columns of the logits, ``[..., V of this rank]``.

    ``labels`` are tokens of the whole vocabulary, the same on all ranks; so is the result. Two all-reduces: N fp32
    maxima, then 3 N fp32 sums. Gradients are those of this rank's logits, written over them.
    """
    _check(logits, labels)
    if not 0 <= shard.first <= shard.first + logits.shape[-1] <= shard.vocab_size:
        raise invalid("first token of the shard", shard.first, f"0 to {shard.vocab_size - logits.shape[-1]}")
    if not loader.uses_kernel("cross_entropy", logits):
        return vocab_parallel_cross_entropy_reference(logits, labels, shard, options)
    return _vocab_parallel(logits, labels, shard, options)


def vocab_parallel_cross_entropy_reference(
    logits: Tensor, labels: Tensor, shard: VocabShard, options: LossOptions = DEFAULTS
) -> Tensor:
    """``vocab_parallel_cross_entropy`` in plain torch."""
    return _vocab_parallel_in_torch(logits, labels, shard, options)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.shape[:-1] != labels.shape or logits.ndim < 1 or logits.shape[-1] == 0:
        raise invalid(
            "shape of labels", tuple(labels.shape), f"that of the logits {tuple(logits.shape)} without the last"
        )
    if labels.dtype != torch.int64:
        raise invalid("dtype of labels", labels.dtype, "torch.int64")


# ---- launchers --------------------------------------------------------------------------------------------------------


def _row_threads(vocab_size: int, dtype: torch.dtype) -> int:
    most = 2 * _THREADS if dtype.itemsize == 2 and vocab_size > _WIDE_ROW else _THREADS
    packs = ceil_div(vocab_size, 16 // dtype.itemsize * UNROLL)
    return min(most, max(32, 1 << (packs - 1).bit_length()))


@functools.cache
def _kernel(function: str, dtype: torch.dtype, threads: int, smoothing: bool = False) -> Kernel:
    return kernel(
        "cross_entropy", function, X_TYPE=type_name(dtype), THREADS=threads, UNROLL=UNROLL, SMOOTHING=int(smoothing)
    )


class Rows(NamedTuple):
    """Rows of logits as the kernels take them, and what is asked of them."""

    logits: Tensor
    """``[N, V]``, neighbours along V."""
    labels: Tensor
    """``[N]``, contiguous."""
    options: LossOptions

    def launch_rows(self, function: str, *arguments: Tensor | int | float | None) -> None:
        """One block to a row."""
        n, vocab_size = self.logits.shape
        threads = _row_threads(vocab_size, self.logits.dtype)
        launch(_kernel(function, self.logits.dtype, threads, self.options.label_smoothing > 0), n, threads, *arguments)

    def losses(self, losses: Tensor, tops: Tensor, sums: Tensor) -> None:
        """Fills three fp32 ``[N]``."""
        o = self.options
        self.launch_rows(
            "row_losses", self.logits, self.labels, losses, tops, sums, *self._size, o.ignore_index, *self._weights
        )

    def losses_and_gradients(self, losses: Tensor, normaliser: Tensor | None) -> None:
        """Fills ``losses`` and turns the logits into ``normaliser`` times their gradients."""
        o = self.options
        self.launch_rows(
            "row_losses_and_gradients", self.logits, self.labels, normaliser, losses, *self._size, o.ignore_index,
            *self._weights,
        )  # fmt: skip

    def gradients(self, kept: tuple[Tensor, Tensor, Tensor | None], grad: Tensor, first: int, vocab_size: int) -> None:
        """Turns the logits into their gradients; ``kept``: maxima, sums of exponentials, normaliser."""
        self.launch_rows(
            "row_gradients", self.logits, self.labels, *kept, grad, min(grad.ndim, 1), *self._size, first, vocab_size,
            self.options.ignore_index, *self._weights,
        )  # fmt: skip

    @property
    def _size(self) -> tuple[int, int]:
        return self.logits.stride(0), self.logits.shape[1]

    @property
    def _weights(self) -> tuple[float, float]:
        return float(self.options.label_smoothing), float(self.options.z_loss)


def rows_of(logits: Tensor, labels: Tensor, options: LossOptions) -> Rows:
    """``logits`` ``[..., V]`` as rows: a view where strides allow it."""
    rows = logits.detach().reshape(labels.numel(), logits.shape[-1])
    return Rows(rows if rows.stride(1) == 1 else rows.contiguous(), labels.reshape(-1).contiguous(), options)


@functools.cache
def _over_rows(function: str) -> Kernel:
    return kernel("loss_rows", function)


def normaliser_of(labels: Tensor, options: LossOptions) -> Tensor | None:
    """What a mean over ``labels`` ``[N]`` divides by, fp32 ``[2]``: 1 / rows that count, and the same for gradients (of no
    row: 1)."""
    if options.reduction != "mean":
        return None
    out = torch.empty(2, dtype=torch.float32, device=labels.device)
    launch(_over_rows("count_rows"), 1, 1024, labels, out, labels.numel(), options.ignore_index)
    return out


def sum_of(losses: Tensor, normaliser: Tensor | None) -> Tensor:
    """Sum or mean of fp32 ``losses`` ``[N]``."""
    out = torch.empty((), dtype=torch.float32, device=losses.device)
    launch(_over_rows("sum_rows"), 1, 1024, losses, normaliser, out, losses.numel())
    return out


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` (fp32 ``[]``, on ``x``'s device), computed in fp32; ``x`` contiguous. Costs nothing where it is 1."""
    pack, head = loader.pack_width_and_head(x)
    grid = ceil_div(x.numel() + head, pack * UNROLL * _THREADS)
    launch(_kernel("scale_in_place", x.dtype, _THREADS), grid, _THREADS, x, factor, x.numel(), head)


def early_normaliser(dtype: torch.dtype, normaliser: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What gradients are multiplied by in the forward pass, and what is left for the backward pass: in fp16 all of it, since
    a probability divided by the number of rows is lost there."""
    if normaliser is None:
        return None, None
    gradient = normaliser[1:]
    return (None, gradient) if dtype == torch.float16 else (gradient, None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: LossOptions, early: bool) -> Tensor:
        rows = rows_of(logits, labels, options)
        losses = torch.empty(rows.labels.numel(), dtype=torch.float32, device=logits.device)
        normaliser = normaliser_of(rows.labels, options)
        ctx.options, ctx.early, ctx.shape = options, early, logits.shape
        if early:
            now, later = early_normaliser(logits.dtype, normaliser)
            rows.losses_and_gradients(losses, now)
            torch.autograd.graph.increment_version(rows.logits)
            ctx.save_for_backward(rows.logits, later)
        else:
            tops, sums = torch.empty_like(losses), torch.empty_like(losses)
            rows.losses(losses, tops, sums)
            gradient = None if normaliser is None else normaliser[1:]
            ctx.save_for_backward(rows.logits, rows.labels, tops, sums, gradient)
        return losses.view(labels.shape) if options.reduction == "none" else sum_of(losses, normaliser)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].float()
        if ctx.early:
            logits, later = ctx.saved_tensors
            scale_in_place(logits, grad if later is None else grad * later)
        else:
            logits, labels, tops, sums, normaliser = ctx.saved_tensors
            grad = grad.reshape(-1).contiguous() if grad.ndim else grad
            rows = Rows(logits, labels, ctx.options)
            rows.gradients((tops, sums, normaliser), grad, 0, logits.shape[1])
        # A second backward pass, or another one that kept the logits, now fails instead of reading gradients.
        torch.autograd.graph.increment_version(logits)
        return logits.view(ctx.shape), None, None, None


def _finish(pieces: Tensor, local_top: Tensor, shard: VocabShard) -> None:
    """Makes ``pieces`` ``[4, N]`` of this rank those of the whole vocabulary."""
    shard.all_reduce(pieces[0], "max")
    pieces[1].mul_((local_top - pieces[0]).exp_())
    shard.all_reduce(pieces[1:], "sum")


def _loss_of_pieces(pieces: Tensor, labels: Tensor, options: LossOptions, vocab_size: int) -> Tensor:
    """Losses ``[N]`` of the whole vocabulary's ``pieces``: maximum, sum of exponentials, label's logit, sum of logits."""
    top, sums, logit, total = pieces
    log_sum = sums.log()
    losses = (1 - options.label_smoothing) * (top - logit + log_sum) + options.z_loss * (top + log_sum).square()
    if options.label_smoothing:
        losses = losses + options.label_smoothing * (top - total / vocab_size + log_sum)
    return torch.where(labels == options.ignore_index, 0, losses)


def _reduced(losses: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor | None]:
    """The loss, and what the mean divides gradients by."""
    if options.reduction == "none":
        return losses.view(labels.shape), None
    if options.reduction == "sum":
        return losses.sum(), None
    n = (labels != options.ignore_index).sum()
    return losses.sum() / n, 1 / n.clamp(min=1).to(losses.dtype)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard, options: LossOptions) -> Tensor:
        rows = rows_of(logits, labels, options)
        pieces = torch.empty(4, rows.labels.numel(), dtype=torch.float32, device=logits.device)
        rows.launch_rows(
            "row_pieces", rows.logits, rows.labels, pieces, *rows._size, shard.first, shard.vocab_size,
            options.ignore_index,
        )  # fmt: skip
        _finish(pieces, pieces[0].clone(), shard)
        loss, normaliser = _reduced(_loss_of_pieces(pieces, rows.labels, options, shard.vocab_size), labels, options)
        ctx.save_for_backward(rows.logits, rows.labels, pieces[0], pieces[1], normaliser)
        ctx.shard, ctx.options, ctx.shape = shard, options, logits.shape
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, tops, sums, normaliser = ctx.saved_tensors
        grad = grads[0].float()
        grad = grad.reshape(-1).contiguous() if grad.ndim else grad
        rows = Rows(logits, labels, ctx.options)
        rows.gradients((tops, sums, normaliser), grad, ctx.shard.first, ctx.shard.vocab_size)
        torch.autograd.graph.increment_version(logits)
        return logits.view(ctx.shape), None, None, None


class _VocabParallelReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard, options: LossOptions) -> Tensor:
        x, flat = widened(logits).reshape(labels.numel(), -1), labels.reshape(-1)
        local = flat - shard.first
        here = (local >= 0) & (local < x.shape[1])
        local = torch.where(here, local, 0)
        top = x.amax(-1)
        logit = torch.where(here, x.gather(1, local[:, None])[:, 0], 0)
        pieces = torch.stack((top, (x - top[:, None]).exp().sum(-1), logit, x.sum(-1)))
        _finish(pieces, top, shard)
        loss, normaliser = _reduced(_loss_of_pieces(pieces, flat, options, shard.vocab_size), labels, options)
        ctx.save_for_backward(logits, flat, local, here, pieces, normaliser)
        ctx.shard, ctx.options = shard, options
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, local, here, pieces, normaliser = ctx.saved_tensors
        o: LossOptions = ctx.options
        x = widened(logits).reshape(labels.numel(), -1)
        lse = pieces[0] + pieces[1].log()
        grad = (x - lse[:, None]).exp() * (1 + 2 * o.z_loss * lse)[:, None] - o.label_smoothing / ctx.shard.vocab_size
        grad.scatter_add_(1, local[:, None], torch.where(here, o.label_smoothing - 1, 0).to(grad.dtype)[:, None])
        factor = grads[0].to(grad.dtype).reshape(-1, 1) * (1 if normaliser is None else normaliser)
        grad = torch.where((labels == o.ignore_index)[:, None], 0, grad * factor)
        return grad.to(logits.dtype).view(logits.shape), None, None, None


_cross_entropy = loader.outside_compile(_CrossEntropy.apply)
_vocab_parallel = loader.outside_compile(_VocabParallel.apply)
_vocab_parallel_in_torch = loader.outside_compile(_VocabParallelReference.apply)
