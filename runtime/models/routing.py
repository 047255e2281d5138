"""Which experts a token goes to, and its way there and back: the operators of ``runtime.models.experts``.

Every buffer's size follows from the numbers of tokens, choices and experts, never from what is chosen, so that a step's memory is
the forecast's whatever the router does. ``estimator.ops.experts`` mirrors what is kept for the backward pass.
Shapes: T tokens, E experts, K choices of a token, N slots (``Experts.slots``), D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from estimator.job.experts import Experts
from runtime.context import managed_memory
from runtime.kernels import loader
from runtime.kernels.loader import widened


class LossGradient:
    """The gradient that the model's loss receives in a backward pass: the load-balance losses of its layers take the same.

    They are not added to the loss that is reported; a router adds their gradient to its scores' (as Megatron-LM does), times what
    the loss itself is multiplied by: loss scale, share of a micro-batch.
    """

    value: Tensor | None = None

    def of(self, loss: Tensor) -> Tensor:
        """``loss`` itself, whose gradient will be known before any layer's backward pass begins."""
        return _noted(loss, self) if torch.is_grad_enabled() else loss


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: LossGradient) -> Tensor:
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with managed_memory():  # one number that outlives the step
            ctx.gradient.value = grads[0].clone()
        return grads[0], None


# ---- choosing -----------------------------------------------------------------------------------------------------------


def route(
    logits: Tensor, experts: Experts, selection_bias: Tensor | None = None, loss_gradient: LossGradient | None = None,
    n_alike: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights ``[T, K]`` (``logits``' dtype) and numbers ``[T, K]`` (int64) of the experts that each token chooses.

    ``logits`` ``[T, E]``, ``selection_bias`` ``[E]``. Scores are computed in fp32. Where several are equal, which one is chosen
    is torch's affair. ``loss_gradient`` is needed where ``experts.balance_loss`` is. ``n_alike`` ranks route the same tokens, and their
    gradients will be summed.
    """
    return _routed(logits, experts, selection_bias, loss_gradient, n_alike)


def scores_of(logits: Tensor, experts: Experts) -> Tensor:
    """fp32 scores ``[T, E]``: softmax over the experts, or a sigmoid for each."""
    wide = widened(logits)
    return wide.softmax(-1) if experts.scoring == "softmax" else wide.sigmoid()


def choose(scores: Tensor, experts: Experts, selection_bias: Tensor | None = None) -> Tensor:
    """Numbers ``[T, K]`` of the experts with the best of ``scores`` ``[T, E]``, in the best groups where there are groups.

    A group's score is its best expert's (DeepSeek-V2), with a selection bias the sum of its two best (DeepSeek-V3, equation 16).
    """
    if selection_bias is not None:
        scores = scores + selection_bias
    if experts.n_groups > 1:
        grouped = scores.unflatten(-1, (experts.n_groups, -1))
        n_best = min(2, grouped.shape[-1]) if experts.selection_bias else 1
        best = grouped.topk(n_best).values.sum(-1).topk(experts.groups_per_token).indices
        closed = torch.ones(*scores.shape[:-1], experts.n_groups, dtype=torch.bool, device=scores.device)
        closed.scatter_(-1, best, False)
        scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    return scores.topk(experts.per_token).indices


def loads_of(chosen: Tensor, n_experts: int) -> Tensor:
    """Share ``[E]`` (fp32) of all choices that falls on each expert."""
    flat = chosen.reshape(-1)
    ones = torch.ones(1, device=chosen.device).expand(flat.shape)
    return torch.zeros(n_experts, device=chosen.device).scatter_add_(0, flat, ones).div_(max(1, flat.numel()))


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, experts: Experts, selection_bias: Tensor | None, loss_gradient: LossGradient | None,
        n_alike: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scores = scores_of(logits, experts)
        chosen = choose(scores, experts, selection_bias)
        weights = scores.gather(-1, chosen)
        if experts.normalise:
            weights /= weights.sum(-1, keepdim=True).add_(_TINY)
        weights = weights.mul_(experts.scale).to(logits.dtype)
        ctx.save_for_backward(scores, chosen)
        ctx.experts, ctx.loss_gradient, ctx.dtype, ctx.n_alike = experts, loss_gradient, logits.dtype, n_alike
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return weights, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, chosen = ctx.saved_tensors
        experts: Experts = ctx.experts
        grad_scores = torch.zeros_like(scores)
        if grads[0] is not None:
            grad = widened(grads[0]) * experts.scale
            if experts.normalise:
                picked = scores.gather(-1, chosen)
                total = picked.sum(-1, keepdim=True).add_(_TINY)
                grad = (grad - (grad * picked).sum(-1, keepdim=True) / total) / total
            grad_scores.scatter_(-1, chosen, grad)
        if experts.balance_loss:
            _add_balance_gradient(grad_scores, scores, chosen, experts, ctx.loss_gradient, ctx.n_alike)
        if experts.scoring == "softmax":
            grad_logits = torch._softmax_backward_data(grad_scores, scores, -1, torch.float32)
        else:
            grad_logits = torch.ops.aten.sigmoid_backward(grad_scores, scores)
        return grad_logits.to(ctx.dtype), None, None, None, None


_TINY = 1e-20
"""Added to sums of scores, which may all be zero (as DeepSeek-V3 does)."""


def _add_balance_gradient(
    grad_scores: Tensor, scores: Tensor, chosen: Tensor, experts: Experts, loss_gradient: LossGradient | None, n_alike: int
) -> None:  # fmt: skip
    """Of ``balance_loss * E * sum over e of f_e P_e`` (Fedus et al. 2022, equations 4 to 6): f_e is the share of choices that
    falls on an expert, a constant, P_e the mean over tokens of its share of a token's scores."""
    assert loss_gradient is not None and loss_gradient.value is not None, "no loss has been noted"
    n_tokens, n_experts = scores.shape
    factor = loss_gradient.value.float() * (experts.balance_loss * n_experts / max(1, n_tokens) / n_alike)
    loads = loads_of(chosen, n_experts).mul_(factor)
    if experts.scoring == "softmax":
        grad_scores += loads
    else:  # shares are scores over their sum
        total = scores.sum(-1, keepdim=True).add_(_TINY)
        grad_scores += loads / total
        grad_scores -= (scores @ loads)[:, None] / total.square_()


# ---- going there and back -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Where every choice lies among the slots."""

    slot: Tensor
    """Of each token's choices, ``[K, T]`` int64; dropped ones share the last slot."""
    ends: Tensor | None
    """Where each expert's slots end, ``[E]`` int64; ``None`` where all experts have equally many (a capacity)."""
    n_slots: int

    @property
    def is_full(self) -> bool:
        """Every slot belongs to a choice."""
        return self.ends is not None


@torch.no_grad()
def plan_of(chosen: Tensor, experts: Experts) -> Plan:
    """Slots for the choices ``[T, K]``: one expert's after another's, within one all first choices before all second ones, each in
    the order of tokens. Dropless, every choice has one; with a capacity each expert has as many, and who comes too late none."""
    flat = chosen.t().reshape(-1)
    of_expert, order = flat.sort(stable=True)
    place = torch.arange(flat.numel(), device=flat.device)
    ends = torch.searchsorted(of_expert, torch.arange(experts.n_experts, device=flat.device), right=True)
    capacity, n_slots = experts.capacity(len(chosen)), experts.slots(len(chosen))
    if capacity:
        starts = F.pad(ends[:-1], (1, 0))
        place -= starts[of_expert]
        place = torch.where(place < capacity, place + of_expert * capacity, n_slots - 1)
    slot = torch.empty_like(flat).scatter_(0, order, place)
    return Plan(slot.view(chosen.shape[1], -1), None if capacity else ends, n_slots)


def dispatch(h: Tensor, plan: Plan) -> Tensor:
    """Tokens ``h`` ``[T, D]`` copied to the slots of their choices, ``[N, D]``; slots that nobody takes are zero."""
    return _dispatched(h, plan.slot, plan.n_slots, plan.is_full)


def combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """What experts made of the slots, ``rows`` ``[N, D]``, added up by token: ``[T, D]``. ``weights`` ``[T, K]``.

    The slot of dropped choices must hold zeros.
    """
    return _combined(rows, weights, plan.slot, plan.is_full)


def empty_slots(like: Tensor, width: int, n_slots: int, is_full: bool) -> Tensor:
    """``[N, width]``, zero where not every slot will be written."""
    make = torch.empty if is_full else torch.zeros
    return make(n_slots, width, dtype=like.dtype, device=like.device)


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, slot: Tensor, n_slots: int, is_full: bool) -> Tensor:
        ctx.save_for_backward(slot)
        rows = empty_slots(h, h.shape[-1], n_slots, is_full)
        for of_choice in slot:
            rows.index_copy_(0, of_choice, h)
        if not is_full:
            rows[-1].zero_()
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        grad_h = grads[0].index_select(0, slot[0])
        for of_choice in slot[1:]:  # in a fixed order, unlike index_add on a GPU
            grad_h += grads[0].index_select(0, of_choice)
        return grad_h, None, None, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slot: Tensor, is_full: bool) -> Tensor:
        ctx.save_for_backward(rows, weights, slot)
        ctx.is_full = is_full
        y = rows.index_select(0, slot[0]).mul_(weights[:, :1])
        for choice in range(1, len(slot)):
            y += rows.index_select(0, slot[choice]).mul_(weights[:, choice : choice + 1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, slot = ctx.saved_tensors
        grad_rows = empty_slots(rows, rows.shape[-1], len(rows), ctx.is_full)
        grad_weights, some = torch.empty_like(weights), torch.empty_like(grads[0])
        for choice, of_choice in enumerate(slot):
            torch.index_select(rows, 0, of_choice, out=some).mul_(grads[0])
            torch.sum(some, -1, out=grad_weights[:, choice])
            torch.mul(grads[0], weights[:, choice : choice + 1], out=some)
            grad_rows.index_copy_(0, of_choice, some)
        if not ctx.is_full:
            grad_rows[-1].zero_()
        return grad_rows, grad_weights, None, None


_noted = loader.outside_compile(_Noted.apply)
_routed = loader.outside_compile(_Routed.apply)
_dispatched = loader.outside_compile(_Dispatched.apply)
_combined = loader.outside_compile(_Combined.apply)
