"""A mixture of experts in place of a block's MLP.

``estimator.ops.experts`` mirrors every ``forward`` here. Shapes: B batch, S sequence, T tokens, E experts, N slots, D model
width, F width of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from estimator.job.experts import Experts
from estimator.job.model import ModelSpec
from runtime import functional
from runtime.models.grouped import grouped_linear
from runtime.models.routing import LossGradient, combine, dispatch, plan_of, route
from runtime.parallel.layers import WholeLayers


class ExpertMlps(nn.Module):
    """The experts of one layer that this rank holds, gated MLPs, each projection's weights in one tensor ``[E, out, in]``."""

    def __init__(self, spec: ModelSpec, experts: Experts, layers: WholeLayers) -> None:
        super().__init__()
        n, d, f = experts.n_experts // layers.experts.size, spec.d_model, layers.share(experts.d_ff)
        self.gate = nn.Parameter(torch.empty(n, f, d).normal_(std=0.02))
        self.up = nn.Parameter(torch.empty(n, f, d).normal_(std=0.02))
        self.down = nn.Parameter(torch.empty(n, d, f).normal_(std=0.02))
        self.gate_bias = nn.Parameter(torch.zeros(n, f)) if experts.bias else None
        self.up_bias = nn.Parameter(torch.zeros(n, f)) if experts.bias else None
        self.down_bias = nn.Parameter(torch.zeros(n, d)) if experts.bias else None
        self.activation, self.clamp = spec.activation, experts.clamp
        for param in self.parameters():
            param.part = layers.experts.split(experts.n_experts)  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, bounds: Sequence[int] | None) -> Tensor:
        """``rows`` ``[N, D]`` expert by expert, as ``grouped_linear`` takes them, and what these make of them."""
        gate = grouped_linear(rows, self.gate, self.gate_bias, bounds)
        up = grouped_linear(rows, self.up, self.up_bias, bounds)
        if self.clamp:
            inner = functional.clamped_activate(gate, up, self.clamp)
        else:
            inner = functional.gated_activate(gate, up, self.activation)
        del gate, up
        return grouped_linear(inner, self.down, self.down_bias, bounds)


class ExpertMlp(nn.Module):
    """``Mlp`` with experts: every token through those that it chooses, and through the shared one."""

    selection_bias: Tensor | None

    def __init__(
        self,
        spec: ModelSpec,
        experts: Experts,
        shared: nn.Module | None,
        loss_gradient: LossGradient,
        layers: WholeLayers,
    ) -> None:
        """``shared``: the MLP that every token passes through, if there is one; ``layers``: how ranks share experts."""
        super().__init__()
        self.spec, self.layers = experts, layers
        self.router = nn.Linear(spec.d_model, experts.n_experts, bias=experts.router_bias)
        self.experts = ExpertMlps(spec, experts, layers)
        self.shared = shared
        self.shared_gate = nn.Linear(spec.d_model, 1, bias=False) if experts.shared_gate else None
        self.loss_gradient = loss_gradient
        bias = torch.zeros(experts.n_experts) if experts.selection_bias else None
        self.register_buffer("selection_bias", bias, persistent=experts.selection_bias)

    def forward(self, h: Tensor) -> Tensor:
        if self.shared is None:
            return self._routed(h)
        if self.shared_gate is None:
            return self._routed(h) + self.shared(h)
        return self._routed(h) + self.shared(h) * self.shared_gate(h).sigmoid()

    def _routed(self, h: Tensor) -> Tensor:
        layers, ranks = self.layers, self.layers.experts
        logits = layers.enter(self.router(h))
        weights, chosen = route(logits, self.spec, self.selection_bias, self.loss_gradient, layers.size)
        del logits
        plan = plan_of(chosen, self.spec)
        rows = dispatch(layers.enter(h), plan)
        trip = ranks.trip(plan, self.spec)
        rows = ranks.to_experts(rows, trip)
        rows = self.experts(rows, trip.bounds)
        rows = ranks.to_tokens(rows, trip)
        return layers.leave(combine(rows, weights, plan), h)
