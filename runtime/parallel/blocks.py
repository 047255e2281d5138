"""Flash attention of some queries to some keys, and its backward pass from the log-sum-exp over all keys (Dao 2023, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Block(NamedTuple):
    """Which queries attend to which keys."""

    queries: slice
    keys: slice
    causal: bool


def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, ...]:
    """Result ``[B, H, q, D]``, log-sum-exp fp32 ``[B, H, q]``, and two tensors that a GPU's backward pass wants.

    ``q`` ``[B, H, s, D]``, ``k`` and ``v`` ``[B, KV, s, D]``, of which ``block`` names some.
    """
    q, k, v = q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]
    if q.device.type == "cpu":
        k, v = _every_head(q, k), _every_head(q, v)
        return tuple(_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, block.causal))
    made = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, block.causal)
    return made[0], made[1], made[6], made[7]


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: tuple[Tensor, ...], block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``block``'s queries, keys and values; ``grad``, ``out`` and ``lse`` are of all queries, over all keys."""
    grad, q, out = (x[:, :, block.queries] for x in (grad, q, out))
    k, v = k[:, :, block.keys], v[:, :, block.keys]
    some = lse[:, :, block.queries]
    lse = some if some.shape == lse.shape else some.contiguous()
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, _every_head(q, k), _every_head(q, v), out, lse, 0.0, block.causal
        )
        return grads[0], _of_groups(grads[1], k), _of_groups(grads[2], v)
    sizes = q.shape[2], k.shape[2]
    return _aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, lse, None, None, *sizes, 0.0, block.causal, *state
    )


def _every_head(q: Tensor, k: Tensor) -> Tensor:
    """``k`` ``[B, KV, s, D]`` for every head of ``q``: a CPU's kernel knows no groups of them."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1) if groups > 1 else k


def _of_groups(grad: Tensor, k: Tensor) -> Tensor:
    """The gradient of ``k`` from that of its copies; in memory ``[B, s, KV, D]``, as kernels make it."""
    groups = grad.shape[1] // k.shape[1]
    return grad.transpose(1, 2).unflatten(2, (-1, groups)).sum(3).transpose(1, 2) if groups > 1 else grad
