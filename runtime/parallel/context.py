"""Context parallelism: ranks that share every sequence, each with an equal part of its tokens.

Everything but attention works on a rank's own tokens alone; the loss is their mean, and the mean over ranks that of the
sequence. How a rank attends to the others' tokens is ``runtime.parallel.ulysses``'s and ``runtime.parallel.ring``'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from estimator.errors import InputError
from estimator.job.context import ContextKind
from estimator.job.strategy import Strategy
from runtime import functional
from runtime.comm import Communicator
from runtime.parallel.waiting import Waiting


class WholeContext(Waiting):
    """All tokens of every sequence."""

    size = 1
    kind: ContextKind = "ulysses"
    """With ``size`` above 1."""

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's part of ``tokens`` ``[B, S, ...]``."""
        return tokens

    def places(self, n: int, device: torch.device) -> Tensor:
        """Where this rank's ``n`` tokens of a sequence stand in it, int64 ``[n]``."""
        return torch.arange(n, device=device)

    def check_length(self, n: int, most: int) -> None:
        """Raises ``InputError`` unless a rank may have ``n`` tokens of a sequence where there is room for ``most``."""
        if n > most:
            raise InputError(f"seq_len is {n}; allowed: at most {most}")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, sinks: Tensor | None = None) -> Tensor:
        """Causal attention of this rank's tokens to all those before: ``q`` ``[B, S, H, D]``, ``k`` and ``v`` ``[B, S, KV, D]``,
        ``S`` being this rank's; returns ``q``'s shape. ``window`` and ``sinks`` as for ``functional.attention``."""
        return functional.attention(q, k, v, window=window, sinks=sinks)

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of ``loss`` over all ranks that share the sequence. A collective call outside of any step."""
        return loss


class ContextParallel(WholeContext):
    """Of every sequence one of ``comm.mesh.cp`` runs of tokens, in their order."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.span = comm, comm.mesh.span("cp")
        self.size, self.place = self.span.size, self.span.place(comm.rank)
        comm.join_span("context", self.span)

    def own(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] % self.size:
            raise InputError(f"seq_len is {tokens.shape[1]}; allowed: a multiple of cp = {self.size}")
        return tokens.chunk(self.size, 1)[self.place].clone(memory_format=torch.contiguous_format)

    def places(self, n: int, device: torch.device) -> Tensor:
        return torch.arange(self.place * n, (self.place + 1) * n, device=device)

    def check_length(self, n: int, most: int) -> None:
        """Rotary tables hold this rank's places of the longest sequence alone; a shorter one has others."""
        if n != most:
            raise InputError(f"seq_len is {n}; allowed: {most}, this rank's part (context.own) of {most * self.size}")

    def mean(self, loss: Tensor) -> Tensor:
        total = loss.detach().clone()
        self.comm.sum_now(total, self.span)
        return total.div_(self.size)


def made_for(kind: ContextKind, comm: Communicator) -> WholeContext:
    """What ``kind`` is for ``comm``'s ranks."""
    from runtime.parallel.ring import Ring  # which are made of this module's parts
    from runtime.parallel.ulysses import Ulysses

    if comm.mesh.cp == 1:
        return WholeContext()
    return Ulysses(comm) if kind == "ulysses" else Ring(comm)


def check_made_for(context: WholeContext, strategy: Strategy) -> None:
    """Raises ``InputError`` unless a model with ``context`` is what ``strategy`` wants."""
    if strategy.cp != context.size:
        raise InputError(
            f"cp is {strategy.cp}; the model was made for {context.size}, allowed: that, or a model made with layers that have "
            "context = runtime.parallel.context.made_for(...)"
        )
    if strategy.cp > 1 and strategy.cp_kind != context.kind:
        raise InputError(f"cp_kind is {strategy.cp_kind!r}; the model was made for {context.kind!r}, allowed: that")
