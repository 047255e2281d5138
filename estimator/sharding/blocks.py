"""Parameters of a block's parts that not every decoder has: latent attention and mixtures of experts.

``(name, shape)`` in the order of ``runtime.models.latent`` and ``runtime.models.experts``.
"""

from __future__ import annotations

from estimator.job.experts import Experts
from estimator.job.latent import LatentAttention
from estimator.job.model import ModelSpec

Shapes = list[tuple[str, tuple[int, ...]]]


def latent_attention(spec: ModelSpec, latent: LatentAttention) -> Shapes:
    """Of ``attn`` up to its output projection, which every decoder has."""
    d, heads = spec.d_model, spec.n_heads
    shapes: Shapes = []
    if latent.q_rank:
        shapes += _linear("attn.q_a", d, latent.q_rank, latent.bias)
        shapes += [("attn.q_a_norm.weight", (latent.q_rank,))]
    shapes += _linear("attn.q_b" if latent.q_rank else "attn.q", latent.q_rank or d, heads * latent.head_dim)
    shapes += _linear("attn.kv_a", d, latent.kv_rank + latent.rope_head_dim, latent.bias)
    shapes += [("attn.kv_a_norm.weight", (latent.kv_rank,))]
    return shapes + _linear("attn.kv_b", latent.kv_rank, heads * (latent.nope_head_dim + latent.value_head_dim))


def expert_mlp(spec: ModelSpec, experts: Experts) -> Shapes:
    """Of ``mlp``: router, the experts' stacked projections, shared experts."""
    d, n, f = spec.d_model, experts.n_experts, experts.d_ff
    shapes = _linear("mlp.router", d, n, experts.router_bias)
    for name, width, depth in (("gate", f, d), ("up", f, d), ("down", d, f)):
        shapes.append((f"mlp.experts.{name}", (n, width, depth)))
    if experts.bias:
        shapes += [(f"mlp.experts.{name}_bias", (n, width)) for name, width in (("gate", f), ("up", f), ("down", d))]
    if experts.shared_d_ff:
        shapes += _linear("mlp.shared.gate", d, experts.shared_d_ff, spec.mlp_bias)
        shapes += _linear("mlp.shared.up", d, experts.shared_d_ff, spec.mlp_bias)
        shapes += _linear("mlp.shared.down", experts.shared_d_ff, d, spec.mlp_bias)
    if experts.shared_gate:
        shapes += _linear("mlp.shared_gate", d, 1)
    return shapes


def _linear(name: str, n_in: int, n_out: int, bias: bool = False) -> Shapes:
    return [(f"{name}.weight", (n_out, n_in)), *([(f"{name}.bias", (n_out,))] if bias else [])]
