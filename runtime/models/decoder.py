"""The reference decoder: GPT and Llama style, built from a ``ModelSpec``.

``estimator.ops.layers`` mirrors every ``forward`` here; a test holds parameter names, shapes and live bytes together.
Shapes: B batch, S sequence, D model width, H heads, KV key/value heads, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.model import ModelSpec
from runtime import functional


class RmsNorm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``residual + x``, and that sum."""
        return functional.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dim."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``residual + x``, and that sum."""
        return functional.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def _norm(spec: ModelSpec) -> RmsNorm | LayerNorm:
    if spec.norm == "rmsnorm":
        return RmsNorm(spec.d_model, spec.norm_eps)
    return LayerNorm(spec.d_model, spec.norm_eps, spec.norm_bias)


class Embedding(nn.Module):
    """Token and learned position look-up: ids ``[B, S]`` to ``[B, S, D]``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.d_model)
        self.positions = nn.Embedding(spec.position_rows, spec.d_model) if spec.position_rows else None
        self.norm = _norm(spec) if spec.embedding_norm else None
        self.first_position = spec.position_rows - spec.max_positions if spec.position_rows else 0

    def forward(self, ids: Tensor) -> Tensor:
        if self.positions is None:
            x = self.tokens(ids)
        else:
            places = torch.arange(self.first_position, self.first_position + ids.shape[1], device=ids.device)
            x = self.tokens(ids) + self.positions(places)
        return self.norm(x) if self.norm is not None else x


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.q = nn.Linear(spec.d_model, spec.d_attn, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.d_model, spec.d_kv, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.d_model, spec.d_kv, bias=spec.qkv_bias)
        self.q_norm = RmsNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.out = nn.Linear(spec.d_attn, spec.d_model, bias=spec.attn_out_bias)
        self.head_dim = spec.head_dim

    def forward(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        q, k, v = (layer(h).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q = functional.rotate(q, cos, sin)
            k = functional.rotate(k, cos, sin)
        return self.out(functional.attention(q, k, v).flatten(2))


class Mlp(nn.Module):
    """Two projections around an activation; a gate beside it when gated."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.d_model, spec.d_ff, bias=spec.mlp_bias) if spec.gated_mlp else None
        self.up = nn.Linear(spec.d_model, spec.d_ff, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.d_ff, spec.d_model, bias=spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, h: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(functional.gated_activate(self.gate(h), self.up(h), self.activation))
        return self.down(functional.linear_activate(h, self.up.weight, self.up.bias, self.activation))


class Block(nn.Module):
    """Attention and MLP around the residual stream ``[B, S, D]``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attn_norm = _norm(spec)
        self.attn = Attention(spec)
        self.attn_post_norm = _norm(spec) if spec.sandwich_norms else nn.Identity()
        self.mlp_norm = _norm(spec)
        self.mlp = Mlp(spec)
        self.mlp_post_norm = _norm(spec) if spec.sandwich_norms else nn.Identity()
        self.parallel_residual = spec.parallel_residual

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        if self.parallel_residual:
            return x + self.attn(self.attn_norm(x), cos, sin) + self.mlp(self.mlp_norm(x))
        h, x = self.mlp_norm.after_add(self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin)), x)
        return x + self.mlp_post_norm(self.mlp(h))


class Head(nn.Module):
    """Final norm, projection to the vocabulary and mean cross-entropy: ``[B, S, D]`` to a scalar."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = _norm(spec) if spec.final_norm else nn.Identity()
        self.out = nn.Linear(spec.d_model, spec.vocab_size, bias=spec.head_bias)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return functional.linear_cross_entropy(self.norm(x), self.out.weight, self.out.bias, labels)


class Decoder(nn.Module):
    """Decoder-only language model: ``forward(ids, labels)`` gives the mean loss of the batch."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, spec: ModelSpec, seq_len: int | None = None) -> None:
        """``seq_len`` (default ``spec.max_positions``) is the longest sequence that rotary tables are kept for."""
        super().__init__()
        _refuse_what_is_missing(spec)
        self.spec = spec
        self.seq_len = seq_len or spec.max_positions
        self.embed = Embedding(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.n_layers))
        self.head = Head(spec)
        if spec.tied_embeddings:
            self.head.out.weight = self.embed.tokens.weight
        half = spec.rotary_dim // 2
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.zeros(self.seq_len, half) if half else None, persistent=False)

    def reset_parameters(self, seed: int = 0, std: float = 0.02) -> None:
        """Normal weights, unit norms, zero biases: the same values in every process for the same ``seed``."""
        fill = initial_values(self.embed.tokens.weight.device, seed, std)
        for name, param in self.named_parameters():
            fill(name, param)
        self.fill_rotary_tables()

    def fill_rotary_tables(self) -> None:
        """Angles position * theta^(-2i/R), as cosines and sines."""
        if self.cos is None or self.sin is None:
            return
        dim, device = self.spec.rotary_dim, self.cos.device
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        angles = torch.outer(torch.arange(self.seq_len, device=device).float(), self.spec.rope_theta**-steps)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        if ids.shape[1] > self.seq_len:
            raise InputError(f"seq_len is {ids.shape[1]}; allowed: at most {self.seq_len}")
        cos = self.cos[: ids.shape[1]] if self.cos is not None else None
        sin = self.sin[: ids.shape[1]] if self.sin is not None else None
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(x, labels)


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
    ):
        if present:
            raise InputError(f"model {spec.name} has {what}; the reference decoder runs models without")
