"""Ring attention (Liu et al. 2023): keys and values go from rank to rank while each attends to those it has.

Every sequence is cut into 2 n chunks, of which rank r of n has chunks r and 2 n - 1 - r: so all have as many pairs of causal
attention to compute in every step of the ring. Parts of a softmax are put together by their log-sum-exp (Milakov & Gimelshein
2018), in fp32, as the gradients of queries, keys and values are summed.

Shapes: B batch, s tokens of a rank, H query heads, KV key/value heads, D head width; kernels want ``[B, H, s, D]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimator.errors import InputError
from runtime.comm import Communicator
from runtime.context import managed_memory
from runtime.parallel.blocks import Block, attend, attend_backward
from runtime.parallel.context import ContextParallel
from runtime.parallel.started import started
from runtime.recompute import kept


class Ring(ContextParallel):
    """Two chunks of every sequence, one near its beginning and one as near its end."""

    kind = "ring"

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self.chunks = (self.place, 2 * self.size - 1 - self.place)

    def own(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] % (2 * self.size):
            raise InputError(f"seq_len is {tokens.shape[1]}; allowed: a multiple of 2 * cp = {2 * self.size}")
        parts = tokens.chunk(2 * self.size, 1)
        return torch.cat([parts[chunk] for chunk in self.chunks], 1)

    def places(self, n: int, device: torch.device) -> Tensor:
        c = n // 2
        return torch.cat([torch.arange(chunk * c, (chunk + 1) * c, device=device) for chunk in self.chunks])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, sinks: Tensor | None = None) -> Tensor:
        if sinks is not None or 0 < window < self.size * q.shape[1]:
            raise InputError("cp_kind is 'ring', but the model's attention has a window or sinks; allowed: 'ulysses'")
        return _RingAttention.apply(q, k, v, self)  # type: ignore[no-any-return]

    def pass_on(self, sent: list[Tensor], first_tag: int = 0) -> tuple[list[Tensor], Any]:
        """Starts to send ``[B, KV, s, D]`` (in memory ``[B, s, KV, D]``) to the next rank; what the one before sends, once the
        work that comes with it has been waited for."""
        laid_out = [x.transpose(1, 2) for x in sent]
        received = [torch.empty_like(x) for x in laid_out]

        def begin(*tensors: Tensor) -> Any:
            n = len(sent)
            return self.comm.shift(tensors[:n], tensors[n:], self.span, "context", first_tag)

        with managed_memory():
            work = started(begin, *received, *laid_out)
        return [x.transpose(1, 2) for x in received], work

    def block(self, step: int, n: int) -> Block:
        """What this rank computes in ``step``, when it has the keys of the rank so many places before it, and of ``n`` tokens.

        Its own tokens it attends to causally. Keys of ranks before it: of their two chunks the first one precedes all its queries,
        the second one none. Keys of ranks behind it: both precede its second chunk, and none its first.
        """
        half, everything = n // 2, slice(None)
        if step == 0:
            return Block(everything, everything, causal=True)
        if step <= self.place:
            return Block(everything, slice(0, half), causal=False)
        return Block(slice(half, n), everything, causal=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Attention, ``[B, H, s, D]``, its log-sum-exp, fp32 ``[B, H, s]``, and what the kernel's backward pass wants."""
        held = [k, v]
        total = lse = None
        state: tuple[Tensor, ...] = ()
        for step in range(self.size):
            coming = self.pass_on(held) if step + 1 < self.size else None
            block = self.block(step, q.shape[2])
            if total is None or lse is None:
                out, lse, *rest = attend(q, held[0], held[1], block)
                total, state = out.float(), tuple(rest)
                del out
            else:
                _merge(total[:, :, block.queries], lse[:, :, block.queries], *attend(q, held[0], held[1], block)[:2])
            if coming is not None:
                self.wait(coming[1])
                held = coming[0]
        assert total is not None and lse is not None
        return total.to(q.dtype), lse, *state

    def backward(self, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``v``; those of keys and values go around with these, one step behind."""
        q, k, v, out, lse, *state = saved
        held = [k, v]
        grad_q: Tensor | None = None
        arriving: tuple[list[Tensor], Any] | None = None
        for step in range(self.size):
            coming = self.pass_on(held) if step + 1 < self.size else None
            block = self.block(step, q.shape[2])
            grads = attend_backward(grad, q, held[0], held[1], out, lse, tuple(state), block)
            if grad_q is None or arriving is None:
                grad_q, summed = grads[0].float(), [x.float() for x in grads[1:]]
            else:
                grad_q[:, :, block.queries] += grads[0]
                self.wait(arriving[1])
                summed = arriving[0]
                for total, part in zip(summed, grads[1:], strict=True):
                    total[:, :, block.keys] += part
                del total, part
            del grads
            arriving = self.pass_on(summed, first_tag=2)
            if coming is not None:
                self.wait(coming[1])
                held = coming[0]
                del coming
        assert grad_q is not None and arriving is not None
        self.wait(arriving[1])
        del summed
        grad_k, grad_v = arriving[0]
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """``total`` ``[B, H, s, D]`` and ``lse`` ``[B, H, s]``, both fp32, become those of the keys of both."""
    both = torch.logaddexp(lse, part_lse)
    total.mul_((lse - both).exp_().unsqueeze(-1))
    total.addcmul_(part, part_lse.sub_(both).exp_().unsqueeze(-1))
    lse.copy_(both)


class _RingAttention(torch.autograd.Function):
    """Keeps what attention keeps: ``q``, ``k``, ``v``, its result and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, *state = kept(lambda: ring.forward(q, k, v))
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, *state)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_heads = ctx.ring.backward(ctx.saved_tensors, grads[0].transpose(1, 2))
        return *(x.transpose(1, 2) for x in of_heads), None
