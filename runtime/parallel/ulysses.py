"""Ulysses (Jacobs et al. 2023): around attention, ranks exchange a part of the tokens of all heads for all tokens of a part of them.

Shapes: n ranks, B batch, s tokens of a rank, S = n * s, H query heads, KV key/value heads, D head width. Messages are laid out
``[n, s, B, heads / n, D]``: what has been received is then all tokens in their order, which attention reads where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime import functional
from runtime.context import managed_memory
from runtime.parallel.context import ContextParallel
from runtime.parallel.started import started


class Ulysses(ContextParallel):
    """Each rank has a part of the heads inside attention."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, sinks: Tensor | None = None) -> Tensor:
        q, k, v = _Exchanged.apply(self, q, k, v)
        own = None if sinks is None else sinks.chunk(self.size)[self.place]
        return _GivenBack.apply(functional.attention(q, k, v, window=window, sinks=own), self)  # type: ignore[no-any-return]

    def exchange(self, sent: Tensor) -> Tensor:
        """``sent`` ``[n, ...]``, contiguous: part i goes to rank i, whose part for this rank takes its place."""
        received = torch.empty_like(sent)
        with managed_memory():
            work = started(lambda r, s: self.comm.all_to_all(r, s, self.span, "context"), received, sent)
        self.wait(work)
        return received

    def of_tokens(self, heads: tuple[Tensor, ...]) -> Tensor:
        """The message ``[n, s, B, h, D]`` in which rank i's tokens of ``heads`` ``[B, S, h_j, D]`` go back to it."""
        b, _, _, d = heads[0].shape
        n, total = self.size, sum(x.shape[2] for x in heads)
        sent = torch.empty(n, heads[0].shape[1] // n, b, total, d, dtype=heads[0].dtype, device=heads[0].device)
        for part, x in zip(sent.split([x.shape[2] for x in heads], dim=3), heads, strict=True):
            part.copy_(x.unflatten(1, (n, -1)).permute(1, 2, 0, 3, 4))
        return sent

    def of_heads(self, heads: tuple[Tensor, ...]) -> Tensor:
        """The message ``[n, s, B, sum of H_j / n, D]`` in which rank i gets its part of each of ``heads`` ``[B, s, H_j, D]``."""
        b, s, _, d = heads[0].shape
        sizes = [x.shape[2] // self.size for x in heads]
        sent = torch.empty(self.size, s, b, sum(sizes), d, dtype=heads[0].dtype, device=heads[0].device)
        for part, x in zip(sent.split(sizes, dim=3), heads, strict=True):
            part.copy_(x.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4))
        return sent


def _all_tokens(received: Tensor) -> Tensor:
    """``[B, S, h, D]``, in place, of ``[n, s, B, h, D]``."""
    return received.flatten(0, 1).transpose(0, 1)


def _all_heads(received: Tensor) -> Tensor:
    """``[B, s, n * h, D]`` of ``[n, s, B, h, D]``."""
    return received.permute(2, 1, 0, 3, 4).contiguous().flatten(2, 3)


class _Exchanged(torch.autograd.Function):
    """``[B, s, H, D]`` to ``[B, S, H / n, D]``, of queries, keys and values in one message."""

    @staticmethod
    def forward(ctx: Any, ulysses: Ulysses, *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.ulysses, ctx.sizes = ulysses, [x.shape[2] // ulysses.size for x in heads]
        received = ulysses.exchange(ulysses.of_heads(heads))
        return _all_tokens(received).split(ctx.sizes, dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        received = ctx.ulysses.exchange(ctx.ulysses.of_tokens(grads))
        return None, *(_all_heads(part) for part in received.split(ctx.sizes, dim=3))


class _GivenBack(torch.autograd.Function):
    """``[B, S, H / n, D]`` to ``[B, s, H, D]``."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, ulysses: Ulysses) -> Tensor:
        ctx.ulysses = ulysses
        sent = out.unflatten(1, (ulysses.size, -1)).permute(1, 2, 0, 3, 4).contiguous()  # as it lies already
        return _all_heads(ulysses.exchange(sent))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_tokens(ctx.ulysses.exchange(ctx.ulysses.of_heads(grads))), None
