"""The reference encoder (BERT, RoBERTa) trained on masked tokens, and the parts that encoder-decoders share with it.

``estimator.ops.encoder`` mirrors every ``forward`` here. Shapes: B batch, S sequence, D model width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.encoder import Encoder
from estimator.job.model import ModelSpec
from runtime import functional
from runtime.models.decoder import Mlp, initial_values, make_norm
from runtime.parallel.layers import WholeLayers


class Embedding(nn.Module):
    """Token, place and segment look-up: ids ``[B, S]`` to ``[B, S, D]``. All tokens are of the first segment unless ``types``
    ``[B, S]`` says."""

    def __init__(self, spec: ModelSpec, encoder: Encoder) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.d_model)
        self.positions = nn.Embedding(spec.position_rows, spec.d_model) if spec.position_rows else None
        self.types = nn.Embedding(encoder.token_types, spec.d_model) if encoder.token_types else None
        self.norm = make_norm(spec) if spec.embedding_norm else None
        self.first_position = spec.position_rows - spec.max_positions if spec.position_rows else 0

    def forward(self, ids: Tensor, types: Tensor | None = None) -> Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device).add_(self.first_position))
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        return self.norm(x) if self.norm is not None else x


class Attention(nn.Module):
    """Attention of every place to all places (or, ``causal``, to those up to it) of the same sequence or of ``source``."""

    def __init__(self, spec: ModelSpec, *, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(spec.d_model, spec.d_attn, bias=spec.qkv_bias) for _ in range(3))
        self.out = nn.Linear(spec.d_attn, spec.d_model, bias=spec.attn_out_bias)
        self.head_dim, self.causal = spec.head_dim, causal
        self.scale = 1.0 if spec.positions == "relative" else None

    def forward(self, h: Tensor, source: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """``h`` ``[B, S, D]``, ``source`` ``[B, T, D]``, ``bias`` ``[H, S, T]``, with which there is no other mask."""
        read = h if source is None else source
        q, k, v = (m(x).unflatten(-1, (-1, self.head_dim)) for m, x in ((self.q, h), (self.k, read), (self.v, read)))
        if bias is not None:
            return self.out(functional.biased_attention(q, k, v, bias).flatten(2))
        return self.out(functional.attention(q, k, v, causal=self.causal, scale=self.scale).flatten(2))


class EncoderBlock(nn.Module):
    """Attention in both directions and MLP around the residual stream ``[B, S, D]``; ``ends``: the last norm of an encoder."""

    def __init__(self, spec: ModelSpec, *, ends: bool = False) -> None:
        super().__init__()
        self.attn = Attention(spec)
        self.attn_norm = make_norm(spec)
        self.mlp = Mlp(spec, WholeLayers())
        self.mlp_norm = make_norm(spec)
        self.final_norm = make_norm(spec) if ends else nn.Identity()
        self.pre_norm = spec.pre_norm

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.pre_norm:
            x = self.attn_norm.after_add(self.attn(x, None, bias), x)[0]
            return self.final_norm(self.mlp_norm.after_add(self.mlp(x), x)[0])
        h, x = self.mlp_norm.after_add(self.attn(self.attn_norm(x), None, bias), x)
        return self.final_norm(x + self.mlp(h))


class MaskedHead(nn.Module):
    """A layer of its own, projection to the vocabulary, mean cross-entropy over masked places: ``[B, S, D]`` to a scalar."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.final_norm = make_norm(spec) if spec.final_norm else nn.Identity()
        self.transform = nn.Linear(spec.d_model, spec.d_model)
        self.norm = make_norm(spec)
        self.out = nn.Linear(spec.d_model, spec.vocab_size, bias=spec.head_bias)
        self.activation = spec.activation

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.final_norm(x)
        h = functional.linear_activate(h, self.transform.weight, self.transform.bias, self.activation)
        return functional.linear_cross_entropy(self.norm(h), self.out.weight, self.out.bias, labels)


class EncoderModel(nn.Module):
    """Encoder on masked tokens: ``forward(ids, labels)`` gives the mean loss over places whose label is not -100."""

    def __init__(self, spec: ModelSpec, seq_len: int | None = None) -> None:
        """``seq_len`` (default ``spec.max_positions``) is the longest sequence that it takes."""
        super().__init__()
        assert spec.encoder is not None and not spec.encoder.n_layers
        self.spec, self.seq_len = spec, seq_len or spec.max_positions
        self.embed = Embedding(spec, spec.encoder)
        self.blocks = nn.ModuleList(EncoderBlock(spec) for _ in range(spec.n_layers))
        self.head = MaskedHead(spec)
        if spec.tied_embeddings:
            self.head.out.weight = self.embed.tokens.weight

    def reset_parameters(self, seed: int = 0, std: float = 0.02) -> None:
        """As ``Decoder.reset_parameters``."""
        fill = initial_values(self.embed.tokens.weight.device, seed, std)
        for name, param in self.named_parameters():
            fill(name, param)

    def fill_tables(self) -> None:
        """There are none."""

    def forward(self, ids: Tensor, labels: Tensor, types: Tensor | None = None) -> Tensor:
        if ids.shape[1] > self.seq_len:
            raise InputError(f"seq_len is {ids.shape[1]}; allowed: at most {self.seq_len}")
        x = self.embed(ids, types)
        for block in self.blocks:
            x = block(x)
        return self.head(x, labels)
