"""The reference decoder: GPT and Llama style, built from a ``ModelSpec``.

``estimator.ops.layers`` mirrors every ``forward`` here; a test holds parameter names, shapes and live bytes together.
Shapes: B batch, S sequence, D model width, H heads, KV key/value heads, F MLP width, V vocabulary. How ranks share its
layers is left to ``layers`` (``runtime.parallel``): widths within layers are then this rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.lora import Lora
from estimator.job.model import ModelSpec
from estimator.sharding.units import model_units
from runtime import functional
from runtime.models.experts import ExpertMlp
from runtime.models.latent import LatentSelfAttention
from runtime.models.lora import LoraLinear, columns, freeze, initial_adapter, make_linear, row
from runtime.models.norms import LayerNorm, RmsNorm, make_norm
from runtime.models.routing import LossGradient
from runtime.parallel.layers import Weights, WholeLayers


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

    def __init__(self, layers: WholeLayers, window: int = 0) -> None:
        super().__init__()
        self.layers, self.window = layers, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return self.layers.context.attention(q, k, v, window=self.window, sinks=sinks)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, to the last ``window`` places (0: to all)."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers, window: int = 0) -> None:
        super().__init__()
        self.layers = layers
        d_attn, d_kv = layers.share(spec.d_attn), layers.share(spec.d_kv)
        self.q = make_linear(spec, "attn.q", spec.d_model, d_attn, bias=spec.qkv_bias)
        self.k = make_linear(spec, "attn.k", spec.d_model, d_kv, bias=spec.qkv_bias)
        self.v = make_linear(spec, "attn.v", spec.d_model, d_kv, bias=spec.qkv_bias)
        self.q_norm, self.k_norm = _qk_norm(spec, spec.d_attn), _qk_norm(spec, spec.d_kv)
        self.norms_heads = spec.qk_norms == "head"
        self.sinks = nn.Parameter(torch.zeros(layers.share(spec.n_heads))) if spec.attn_sinks else None
        self.core = CoreAttention(layers, window)
        self.out = make_linear(spec, "attn.out", d_attn, spec.d_model, bias=spec.attn_out_bias)
        self.head_dim = spec.head_dim

    def forward(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        projected = columns(self.layers, h, (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None and not self.norms_heads:
            projected = (self.q_norm(projected[0]), self.k_norm(projected[1]), projected[2])
        q, k, v = (self.layers.heads(x, self.head_dim) for x in projected)
        del projected
        if isinstance(self.q_norm, RmsNorm) and isinstance(self.k_norm, RmsNorm) and self.norms_heads:
            q = functional.rms_norm(q, self.layers.of_heads(self.q_norm.weight), self.q_norm.eps)
            k = functional.rms_norm(k, self.layers.of_heads(self.k_norm.weight), self.k_norm.eps)
        if cos is not None and sin is not None:
            q = functional.rotate(q, cos, sin)
            k = functional.rotate(k, cos, sin)
        return row(self.layers, self.core(q, k, v, self.sinks).flatten(2), self.out)


class Mlp(nn.Module):
    """Two projections around an activation; a gate beside it when gated."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers) -> None:
        super().__init__()
        self.layers, d_ff = layers, layers.share(spec.d_ff)
        self.gate = make_linear(spec, "mlp.gate", spec.d_model, d_ff, bias=spec.mlp_bias) if spec.gated_mlp else None
        self.up = make_linear(spec, "mlp.up", spec.d_model, d_ff, bias=spec.mlp_bias)
        self.down = make_linear(spec, "mlp.down", d_ff, spec.d_model, bias=spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, h: Tensor) -> Tensor:
        if self.gate is not None:
            gated, linear = columns(self.layers, h, (self.gate, self.up))
            inner = functional.gated_activate(gated, linear, self.activation)
            del gated, linear
        else:
            inner = functional.linear_activate(h, self.up.weight, self.up.bias, self.activation, self._up)
        return row(self.layers, inner, self.down)

    def _up(self, h: Tensor, weights: Sequence[Weights]) -> Sequence[Tensor]:
        made = self.layers.columns(h, weights)
        return [self.up.added(h, made[0])] if isinstance(self.up, LoraLinear) else made


class Block(nn.Module):
    """Attention and MLP around the residual stream ``[B, S, D]``."""

    recompute_parts: ClassVar = {
        "attention": ("attn",), "core_attention": ("attn.core",), "mlp": ("mlp",), "norms": (), "activation": (),
    }  # fmt: skip
    """Submodules of each part of a block that can be recomputed; norms and activations are ``runtime.functional``'s."""

    def __init__(self, spec: ModelSpec, layers: WholeLayers, mlp: nn.Module, layer: int) -> None:
        """``layer``: its number, 0-based."""
        super().__init__()
        bare = spec.sandwich_norms and not spec.pre_norm
        self.attn_norm = nn.Identity() if bare else make_norm(spec)
        self.attn = (
            Attention(spec, layers, spec.window_of(layer))
            if spec.latent is None
            else LatentSelfAttention(spec, spec.latent, layers)
        )
        self.attn_post_norm = make_norm(spec) if spec.sandwich_norms else nn.Identity()
        self.mlp_norm = None if bare or spec.shared_norm else make_norm(spec)
        self.mlp = mlp
        self.mlp_post_norm = make_norm(spec) if spec.sandwich_norms else nn.Identity()
        self.parallel_residual, self.rotates = spec.parallel_residual, spec.rotates(layer)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        cos, sin = (cos, sin) if self.rotates else (None, None)
        if self.mlp_norm is None and self.parallel_residual:
            h = self.attn_norm(x)
            return x + self.attn(h, cos, sin) + self.mlp(h)
        if self.mlp_norm is None:
            x = x + self.attn_post_norm(self.attn(x, cos, sin))
            return x + self.mlp_post_norm(self.mlp(x))
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
        self.blocks = nn.ModuleList(Block(spec, self.layers, self._mlp(i), i) for i in range(spec.n_layers))
        self.head = Head(spec, self.layers)
        if spec.tied_embeddings:
            self.head.out.weight = self.embed.tokens.weight
        self.layers.mark(self, model_units(spec))
        freeze(self, spec.lora)
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
        fill = initial_values(self.embed.tokens.weight.device, seed, std, self.spec.lora)
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


def initial_values(
    device: torch.device, seed: int = 0, std: float = 0.02, lora: Lora | None = None
) -> Callable[[str, Tensor], None]:
    """What ``reset_parameters`` writes, parameter by parameter: call it with each name and tensor in their order. Adapters change
    nothing of what they stand beside."""
    generator = torch.Generator(device=device).manual_seed(seed)
    of_adapters = torch.Generator(device=device).manual_seed(seed + 1) if lora is not None else None

    def fill(name: str, param: Tensor) -> None:
        if lora is not None and of_adapters is not None and ".lora_" in name:
            initial_adapter(name, param, lora.init, of_adapters)
        elif name.endswith("bias"):
            nn.init.zeros_(param)
        elif "norm" in name:
            nn.init.ones_(param)
        else:
            nn.init.normal_(param, std=std, generator=generator)

    return fill


def _qk_norm(spec: ModelSpec, width: int) -> RmsNorm | LayerNorm | None:
    """Of the ``width`` channels of all heads, or of each head's alike."""
    if not spec.qk_norm:
        return None
    if spec.qk_norms == "all" and spec.norm == "layernorm":
        return LayerNorm(width, spec.norm_eps, bias=False)
    return RmsNorm(spec.head_dim if spec.qk_norms == "head" else width, spec.norm_eps)


def _refuse_what_is_missing(spec: ModelSpec) -> None:
    """Shapes that the estimator can forecast but this decoder cannot run."""
    window = min(spec.sliding_window or spec.max_positions, spec.max_positions)
    for present, what in (
        (spec.positions == "alibi", "ALiBi positions"),
        (spec.embed_dim not in (0, spec.d_model), "a projected embedding"),
        (not spec.pre_norm and not spec.sandwich_norms, "norms after the residual"),
        (spec.tower is not None, "a vision tower"),
        (not spec.norm_weight, "norms without weights"),
        (spec.qk_norms in ("each", "plain"), f"norms of queries and keys of the kind {spec.qk_norms!r}"),
        (spec.activation == "relu2", "squared ReLU"),
        (spec.caps_logits, "capped logits"),
        (spec.clips_qkv, "clamped queries, keys and values"),
        (window < spec.max_positions and spec.latent is not None, "latent attention in a sliding window"),
    ):
        if present:
            raise InputError(f"model {spec.name} has {what}; the reference decoder runs models without")
