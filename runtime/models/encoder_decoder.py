"""The reference encoder-decoder: T5 (relative positions, RMSNorm) and BART (learned positions, norms after the residual).

``estimator.ops.encoder_decoder`` mirrors every ``forward`` here. Shapes: B batch, S sequence (of sources as of targets), D model
width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.encoder import Encoder
from estimator.job.model import ModelSpec
from estimator.ops.biased_attention import padded_places
from runtime import functional
from runtime.models.decoder import Mlp, initial_values, make_norm
from runtime.models.encoder import Attention, EncoderBlock
from runtime.parallel.layers import WholeLayers

START_TOKEN = 0
"""Stands before the first target (T5's padding token)."""


class RelativeBias(nn.Module):
    """T5's trained number for each head and bucket of distances, as what is added to the scores of every pair of places."""

    buckets: Tensor
    future: Tensor | None

    def __init__(self, spec: ModelSpec, encoder: Encoder, seq_len: int, *, causal: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(encoder.relative_buckets, spec.n_heads)
        self.n_buckets, self.max_distance = encoder.relative_buckets, encoder.relative_distance
        self.seq_len, self.causal = seq_len, causal
        n_distances = seq_len + padded_places(seq_len) - 1
        self.register_buffer("buckets", torch.zeros(n_distances, dtype=torch.int64), persistent=False)
        self.register_buffer("future", torch.zeros(n_distances, dtype=torch.bool) if causal else None, persistent=False)

    def fill_tables(self) -> None:
        """Bucket of every distance from ``1 - seq_len`` (far behind) on, and which distances lie ahead."""
        ahead = torch.arange(len(self.buckets), device=self.buckets.device) - (self.seq_len - 1)
        self.buckets.copy_(relative_buckets(ahead, self.n_buckets, self.max_distance, causal=self.causal))
        if self.future is not None:
            self.future.copy_(ahead > 0)

    def forward(self, seq_len: int) -> Tensor:
        """``[H, S, S]`` of the table's dtype; rows start at multiples of 8 elements, as attention kernels want them.

        A pair's number depends on its distance alone: every row of the result is a window of one line of numbers.
        """
        padded = padded_places(seq_len)
        window = slice(self.seq_len - seq_len, self.seq_len + padded - 1)
        line = self.table(self.buckets[window]).t()
        if self.future is not None:
            line = line.masked_fill(self.future[window], torch.finfo(line.dtype).min)
        bias = line.float().unfold(1, padded, 1).flip(1).to(line.dtype)
        return bias if padded == seq_len else bias[..., :seq_len]


def relative_buckets(ahead: Tensor, n_buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """Bucket of each distance ``ahead`` (int64; negative: behind): near ones have one each, farther ones share logarithmically
    more (Raffel et al. 2020, section 2.1; as in its published code). Without ``causal`` half of them are for what lies ahead."""
    first = torch.zeros_like(ahead)
    distance = -ahead
    if causal:
        distance = distance.clamp(min=0)
    else:
        n_buckets //= 2
        first, distance = (ahead > 0).long() * n_buckets, distance.abs()
    exact = n_buckets // 2
    share = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (share * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class Side(nn.Module):
    """What sources and targets each have for themselves beside the common table of tokens."""

    def __init__(self, spec: ModelSpec, encoder: Encoder, seq_len: int, *, causal: bool) -> None:
        super().__init__()
        self.positions = nn.Embedding(spec.position_rows, spec.d_model) if spec.position_rows else None
        self.norm = make_norm(spec) if spec.embedding_norm else None
        self.bias = RelativeBias(spec, encoder, seq_len, causal=causal) if encoder.relative_buckets else None
        self.first_position = spec.position_rows - spec.max_positions if spec.position_rows else 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens' rows ``[B, S, D]`` with positions, and the attention's bias."""
        if self.positions is not None:
            x = x + self.positions(torch.arange(x.shape[1], device=x.device).add_(self.first_position))
        if self.norm is not None:
            x = self.norm(x)
        return x, self.bias(x.shape[1]) if self.bias is not None else None


class Embedding(nn.Module):
    """Look-up of sources and of targets, which are the labels one place later: ids, labels ``[B, S]`` to ``[B, S, D]`` each."""

    def __init__(self, spec: ModelSpec, encoder: Encoder, seq_len: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.d_model)
        self.source = Side(spec, encoder, seq_len, causal=False)
        self.target = Side(spec, encoder, seq_len, causal=True)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        targets = F.pad(labels[:, :-1], (1, 0), value=START_TOKEN).clamp_(min=0)
        return *self.source(self.tokens(ids)), *self.target(self.tokens(targets))


class DecoderBlock(nn.Module):
    """Causal attention, attention to the encoder's result and MLP around the residual stream ``[B, S, D]``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attn = Attention(spec, causal=True)
        self.attn_norm = make_norm(spec)
        self.cross = Attention(spec)
        self.cross_norm = make_norm(spec)
        self.mlp = Mlp(spec, WholeLayers())
        self.mlp_norm = make_norm(spec)
        self.pre_norm = spec.pre_norm

    def forward(self, y: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.pre_norm:
            y = self.attn_norm.after_add(self.attn(y, None, bias), y)[0]
            y = self.cross_norm.after_add(self.cross(y, memory), y)[0]
            return self.mlp_norm.after_add(self.mlp(y), y)[0]
        h, y = self.cross_norm.after_add(self.attn(self.attn_norm(y), None, bias), y)
        h, y = self.mlp_norm.after_add(self.cross(h, memory), y)
        return y + self.mlp(h)


class Head(nn.Module):
    """Final norm, projection to the vocabulary and mean cross-entropy: ``[B, S, D]`` to a scalar."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.final_norm = make_norm(spec) if spec.final_norm else nn.Identity()
        self.out = nn.Linear(spec.d_model, spec.vocab_size, bias=spec.head_bias)
        self.scale = spec.d_model**-0.5 if spec.positions == "relative" and spec.tied_embeddings else None

    def forward(self, y: Tensor, labels: Tensor) -> Tensor:
        h = self.final_norm(y)
        if self.scale is not None:
            h = h * self.scale
        return functional.linear_cross_entropy(h, self.out.weight, self.out.bias, labels)


class EncoderDecoder(nn.Module):
    """``forward(ids, labels)`` gives the mean loss of predicting each label from the sources and the labels before it."""

    def __init__(self, spec: ModelSpec, seq_len: int | None = None) -> None:
        """``seq_len`` (default ``spec.max_positions``) is the longest sequence that it takes."""
        super().__init__()
        encoder = spec.encoder
        assert encoder is not None and encoder.n_layers
        self.spec, self.seq_len = spec, seq_len or spec.max_positions
        self.embed = Embedding(spec, encoder, self.seq_len)
        last = encoder.n_layers - 1
        self.encoder = nn.ModuleList(
            EncoderBlock(spec, ends=layer == last and spec.final_norm) for layer in range(encoder.n_layers)
        )
        self.decoder = nn.ModuleList(DecoderBlock(spec) for _ in range(spec.n_layers))
        self.head = Head(spec)
        if spec.tied_embeddings:
            self.head.out.weight = self.embed.tokens.weight
        self.fill_tables()

    def reset_parameters(self, seed: int = 0, std: float = 0.02) -> None:
        """As ``Decoder.reset_parameters``."""
        fill = initial_values(self.embed.tokens.weight.device, seed, std)
        for name, param in self.named_parameters():
            fill(name, param)
        self.fill_tables()

    def fill_tables(self) -> None:
        """Buckets of relative positions."""
        for side in (self.embed.source, self.embed.target):
            if side.bias is not None:
                side.bias.fill_tables()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        if ids.shape[1] > self.seq_len:
            raise InputError(f"seq_len is {ids.shape[1]}; allowed: at most {self.seq_len}")
        x, source_bias, y, target_bias = self.embed(ids, labels)
        for block in self.encoder:
            x = block(x, source_bias)
        for block in self.decoder:
            y = block(y, x, target_bias)
        return self.head(y, labels)
