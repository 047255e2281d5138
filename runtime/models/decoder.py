"""The reference decoder: GPT and Llama style, built from a ``ModelSpec``.

``estimator.ops.layers`` mirrors every ``forward`` here; a test holds parameter names, shapes and live bytes together.
Shapes: B batch, S sequence, D model width, H heads, KV key/value heads, F MLP width, V vocabulary. How ranks share its
layers is left to ``layers`` (``runtime.parallel``): widths within layers are then this rank's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.model import ModelSpec
from estimator.sharding.units import model_units
from runtime import functional
from runtime.models.experts import ExpertMlp
from runtime.models.latent import LatentSelfAttention
from runtime.models.norms import RmsNorm, make_norm
from runtime.models.routing import LossGradient
from runtime.parallel.layers import WholeLayers


class Embedding(nn.Module):
    """Token and learned position look-up: ids ``[B, S]`` to ``[B, S, D]``."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers) -> None:
        super().__init__()
        self.layers = layers
        self.tokens = nn.Embedding(layers.share(spec.vocab_size), spec.d_model)
        self.positions = nn.Embedding(spec.position_rows, spec.d_model) if spec.position_rows else None
        self.norm = make_norm(spec) if spec.embedding_norm else None
        self.first_position = spec.position_rows - spec.max_positions if spec.position_rows else 0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers.embed(ids, self.tokens.weight)
        if self.positions is not None:
            x = x + self.positions(self.layers.positions(ids).add_(self.first_position))
        return self.norm(x) if self.norm is not None else x


class CoreAttention(nn.Module):
    """From queries, keys and values to what they attend to; a module because it can be recomputed alone."""

    def __init__(self, layers: WholeLayers) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.layers.context.attention(q, k, v)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers) -> None:
        super().__init__()
        self.layers = layers
        d_attn, d_kv = layers.share(spec.d_attn), layers.share(spec.d_kv)
        self.q = nn.Linear(spec.d_model, d_attn, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.d_model, d_kv, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.d_model, d_kv, bias=spec.qkv_bias)
        self.q_norm = RmsNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.core = CoreAttention(layers)
        self.out = nn.Linear(d_attn, spec.d_model, bias=spec.attn_out_bias)
        self.head_dim = spec.head_dim

    def forward(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        projected = self.layers.columns(h, [(m.weight, m.bias) for m in (self.q, self.k, self.v)])
        q, k, v = (self.layers.heads(x, self.head_dim) for x in projected)
        del projected
        if self.q_norm is not None and self.k_norm is not None:
            q = functional.rms_norm(q, self.layers.of_heads(self.q_norm.weight), self.q_norm.eps)
            k = functional.rms_norm(k, self.layers.of_heads(self.k_norm.weight), self.k_norm.eps)
        if cos is not None and sin is not None:
            q = functional.rotate(q, cos, sin)
            k = functional.rotate(k, cos, sin)
        return self.layers.row(self.core(q, k, v).flatten(2), self.out.weight, self.out.bias)


class Mlp(nn.Module):
    """Two projections around an activation; a gate beside it when gated."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers) -> None:
        super().__init__()
        self.layers, d_ff = layers, layers.share(spec.d_ff)
        self.gate = nn.Linear(spec.d_model, d_ff, bias=spec.mlp_bias) if spec.gated_mlp else None
        self.up = nn.Linear(spec.d_model, d_ff, bias=spec.mlp_bias)
        self.down = nn.Linear(d_ff, spec.d_model, bias=spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, h: Tensor) -> Tensor:
        columns, up = self.layers.columns, (self.up.weight, self.up.bias)
        if self.gate is not None:
            gated, linear = columns(h, [(self.gate.weight, self.gate.bias), up])
            inner = functional.gated_activate(gated, linear, self.activation)
            del gated, linear
        else:
            inner = functional.linear_activate(h, *up, self.activation, columns)
        return self.layers.row(inner, self.down.weight, self.down.bias)


class Block(nn.Module):
    """Attention and MLP around the residual stream ``[B, S, D]``."""

    recompute_parts: ClassVar = {
        "attention": ("attn",), "core_attention": ("attn.core",), "mlp": ("mlp",), "norms": (), "activation": (),
    }  # fmt: skip
    """Submodules of each part of a block that can be recomputed; norms and activations are ``runtime.functional``'s."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers, mlp: nn.Module) -> None:
        super().__init__()
        self.attn_norm = make_norm(spec)
        self.attn = Attention(spec, layers) if spec.latent is None else LatentSelfAttention(spec, spec.latent, layers)
        self.attn_post_norm = make_norm(spec) if spec.sandwich_norms else nn.Identity()
        self.mlp_norm = make_norm(spec)
        self.mlp = mlp
        self.mlp_post_norm = make_norm(spec) if spec.sandwich_norms else nn.Identity()
        self.parallel_residual = spec.parallel_residual

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        if self.parallel_residual:
            return x + self.attn(self.attn_norm(x), cos, sin) + self.mlp(self.mlp_norm(x))
        h, x = self.mlp_norm.after_add(self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin)), x)
        return x + self.mlp_post_norm(self.mlp(h))


class Head(nn.Module):
    """Final norm, projection to the vocabulary and mean cross-entropy: ``[B, S, D]`` to a scalar."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers) -> None:
        super().__init__()
        self.layers, self.vocab_size = layers, spec.vocab_size
        self.norm = make_norm(spec) if spec.final_norm else nn.Identity()
        self.out = nn.Linear(spec.d_model, layers.share(spec.vocab_size), bias=spec.head_bias)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers.loss(self.norm(x), self.out.weight, self.out.bias, labels, self.vocab_size)


class Decoder(nn.Module):
    """Decoder-only language model: ``forward(ids, labels)`` gives the mean loss of the batch."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, spec: ModelSpec, seq_len: int | None = None, layers: WholeLayers | None = None) -> None:
        """``seq_len`` (default ``spec.max_positions``) is the longest sequence that rotary tables are kept for; ``layers``:
        how ranks share it (default: they do not). Where they share sequences, it is given this rank's tokens alone
        (``layers.context.own``)."""
        super().__init__()
        _refuse_what_is_missing(spec)
        self.spec, self.layers = spec, layers or WholeLayers()
        self.seq_len = (seq_len or spec.max_positions) // self.layers.context.size
        self.embed = Embedding(spec, self.layers)
        self.loss_gradient = LossGradient()
        self.blocks = nn.ModuleList(Block(spec, self.layers, self._mlp(layer)) for layer in range(spec.n_layers))
        self.head = Head(spec, self.layers)
        if spec.tied_embeddings:
            self.head.out.weight = self.embed.tokens.weight
        self.layers.mark(self, model_units(spec))
        half = spec.rotary_dim // 2
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.zeros(self.seq_len, half) if half else None, persistent=False)

    def _mlp(self, layer: int) -> nn.Module:
        experts = self.spec.experts_of(layer)
        if experts is None:
            return Mlp(self.spec, self.layers)
        shared = Mlp(replace(self.spec, d_ff=experts.shared_d_ff), self.layers) if experts.shared_d_ff else None
        return ExpertMlp(self.spec, experts, shared, self.loss_gradient, self.layers)

    def reset_parameters(self, seed: int = 0, std: float = 0.02) -> None:
        """Normal weights, unit norms, zero biases: the same values in every process for the same ``seed``."""
        fill = initial_values(self.embed.tokens.weight.device, seed, std)
        for name, param in self.named_parameters():
            self.layers.fill(name, param, getattr(param, "part", None), fill)
        self.fill_tables()

    def fill_tables(self) -> None:
        """Angles position * theta^(-2i/R), as cosines and sines; biases for choosing experts begin at zero."""
        for name, buffer in self.named_buffers():
            if name.endswith("selection_bias"):
                buffer.zero_()
        if self.cos is None or self.sin is None:
            return
        dim, device = self.spec.rotary_dim, self.cos.device
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        places = self.layers.context.places(self.seq_len, device)
        angles = torch.outer(places.float(), self.spec.rope_theta**-steps)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.layers.context.check_length(ids.shape[1], self.seq_len)
        cos = self.cos[: ids.shape[1]] if self.cos is not None else None
        sin = self.sin[: ids.shape[1]] if self.sin is not None else None
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        loss = self.head(x, labels)
        return self.loss_gradient.of(loss) if self.spec.experts is not None and self.spec.experts.balance_loss else loss


def initial_values(device: torch.device, seed: int = 0, std: float = 0.02) -> Callable[[str, Tensor], None]:
    """What ``reset_parameters`` writes, parameter by parameter: call it with each name and tensor in their order."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def fill(name: str, param: Tensor) -> None:
        if name.endswith("bias"):
            nn.init.zeros_(param)
        elif "norm" in name:
            nn.init.ones_(param)
        else:
            nn.init.normal_(param, std=std, generator=generator)

    return fill


def _refuse_what_is_missing(spec: ModelSpec) -> None:
    """Shapes that the estimator can forecast but this decoder cannot run."""
    window = min(spec.sliding_window or spec.max_positions, spec.max_positions)
    for present, what in (
        (spec.positions == "alibi", "ALiBi positions"),
        (spec.embed_dim not in (0, spec.d_model), "a projected embedding"),
        (not spec.pre_norm, "norms after the residual"),
        (window < spec.max_positions, f"a sliding window of {spec.sliding_window} tokens"),
        (spec.attn_sinks, "attention sinks"),
        (spec.experts is not None and spec.experts.clamp > 0, "experts with clamped activations"),
    ):
        if present:
            raise InputError(f"model {spec.name} has {what}; the reference decoder runs models without")
