"""``WholeLayers``: a model's layers where one rank computes them alone, and what those who share them must also offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from estimator.sharding.units import Split, Unit
from runtime import functional
from runtime.parallel.context import WholeContext
from runtime.parallel.experts import ExpertParallel, WholeExperts
from runtime.parallel.split import Sharers, fill_part, join_parts
from runtime.parallel.waiting import Waiting
from runtime.parts import PartClock

Fill = Callable[[str, Tensor], None]
"""Writes the initial values of the parameter of that name into an fp32 tensor of its shape."""
Weights = tuple[Tensor, Tensor | None]
"""A projection's weight ``[out, in]`` and bias ``[out]``."""


def layers_of(model: nn.Module) -> WholeLayers:
    """How ranks share ``model``'s layers; a model that does not say computes them alone."""
    layers = getattr(model, "layers", None)
    return layers if isinstance(layers, WholeLayers) else WholeLayers()


class WholeLayers(Waiting):
    """All of every layer. ``x`` is ``[B, S, D]``: batch, (this rank's part of the) sequence, model width."""

    size = 1

    def __init__(self, context: WholeContext | None = None, experts: WholeExperts | None = None) -> None:
        """How ranks share sequences and experts (default: they do not)."""
        self.context = context or WholeContext()
        self.experts = experts or WholeExperts()

    def time(self, parts: PartClock) -> None:
        """From now on ``parts`` is told of every wait for other ranks."""
        self.parts = self.context.parts = self.experts.parts = parts

    def share(self, size: int) -> int:
        """How many of ``size`` heads, channels or rows of a vocabulary this rank holds."""
        return size

    def mark(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Say of each parameter of ``model`` which part of it this rank holds: ``units`` are those of the whole model."""

    def fill(self, name: str, param: Tensor, split: Split | None, values: Fill) -> None:
        """Write this rank's part of the values of parameter ``name`` into ``param``; ``values`` writes all of them."""
        fill_part(name, param, split, self.sharers, values)

    def join(self, own: Tensor, split: Split | None) -> Tensor:
        """All of a parameter of which this rank holds ``own``. A collective call."""
        return join_parts(own, split, self.sharers)

    def sharers(self, split: Split) -> Sharers:
        """The ranks that share a parameter as ``split`` says."""
        assert isinstance(self.experts, ExpertParallel), f"nobody shares {split}"
        return self.experts

    def begin(self, batch: Sequence[int]) -> tuple[int, ...]:
        """A micro-batch of ``batch`` ``(B, S)`` tokens comes through; the shape, without the model's width, of its residual
        stream."""
        return tuple(batch)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows ``ids`` ``[B, S]`` of ``table``, as the residual stream holds them."""
        return F.embedding(ids, table)

    def positions(self, ids: Tensor) -> Tensor:
        """Places in their sequence, int64, of what the residual stream holds of ``ids``."""
        return self.context.places(ids.shape[1], ids.device)

    def columns(self, x: Tensor, layers: Sequence[Weights]) -> tuple[Tensor, ...]:
        """Projections of the residual stream into heads or channels."""
        return tuple(F.linear(x, weight, bias) for weight, bias in layers)

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The projection of heads or channels back to the residual stream."""
        return F.linear(x, weight, bias)

    def enter(self, x: Tensor) -> Tensor:
        """All tokens of the micro-batch ``[T, width]`` of ``x``, which is as the residual stream is."""
        return x.flatten(0, 1)

    def leave(self, y: Tensor, like: Tensor) -> Tensor:
        """As the residual stream ``like`` holds it, what the ranks that share a layer make together of all tokens: ``y`` ``[T, D]``
        is this rank's part."""
        return y.view_as(like)

    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        """``[B, S, H, head_dim]`` of a result of ``columns``."""
        return x.unflatten(-1, (-1, head_dim))

    def of_heads(self, weight: Tensor) -> Tensor:
        """A parameter that is applied to every head."""
        return weight

    def loss(self, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocab_size: int) -> Tensor:
        """Mean cross-entropy of ``h @ weight.T + bias``; ``labels`` ``[B, S]`` int64."""
        return functional.linear_cross_entropy(h, weight, bias, labels)
