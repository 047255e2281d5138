"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values of all heads from one narrow vector per token.

``estimator.ops.latent`` mirrors the ``forward`` here. Shapes: B batch, S sequence, H heads, L width of the narrow vector, R rotated,
P other channels of a query and key head, V of a value head. In every head the R rotated channels come first (DeepSeek's weights have
them last, and their pairs side by side): an order of rows of the weights, no other model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from estimator.job.latent import LatentAttention
from estimator.job.model import ModelSpec
from runtime import functional
from runtime.kernels import loader
from runtime.models.norms import RmsNorm
from runtime.parallel.layers import WholeLayers


class LatentCore(nn.Module):
    """From queries, keys and values to what they attend to; a module because it can be recomputed alone."""

    def __init__(self, layers: WholeLayers) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.layers.context.attention(q, k, v)


class LatentSelfAttention(nn.Module):
    """Causal self-attention over a latent vector of keys and values."""

    def __init__(self, spec: ModelSpec, latent: LatentAttention, layers: WholeLayers) -> None:
        """``layers``: how ranks share it. What is narrow each computes of the tokens that it has."""
        super().__init__()
        self.layers = layers
        d, heads, eps = spec.d_model, layers.share(spec.n_heads), spec.norm_eps
        if latent.q_rank:
            self.q_a = nn.Linear(d, latent.q_rank, bias=latent.bias)
            self.q_a_norm = RmsNorm(latent.q_rank, eps)
            self.q_b = nn.Linear(latent.q_rank, heads * latent.head_dim, bias=False)
        else:
            self.q = nn.Linear(d, heads * latent.head_dim, bias=False)
        self.kv_a = nn.Linear(d, latent.kv_rank + latent.rope_head_dim, bias=latent.bias)
        self.kv_a_norm = RmsNorm(latent.kv_rank, eps)
        self.kv_b = nn.Linear(latent.kv_rank, heads * (latent.nope_head_dim + latent.value_head_dim), bias=False)
        self.core = LatentCore(layers)
        self.out = nn.Linear(heads * latent.value_head_dim, d, bias=spec.attn_out_bias)
        self.latent = latent

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, layers = self.latent, self.layers
        if shape.q_rank:
            (q,) = layers.columns(self.q_a_norm(self.q_a(h)), [(self.q_b.weight, None)])
        else:
            (q,) = layers.columns(h, [(self.q.weight, None)])
        q = functional.rotate(layers.heads(q, shape.head_dim), cos, sin)
        k, v = self._keys_and_values(h, cos, sin)
        out = self.core(q, k, v)
        del q, k, v
        # A copy, of one head too, whose slice would be a view of what is wider.
        trimmed = out[..., : shape.value_head_dim].contiguous()
        return layers.row(trimmed.flatten(2), self.out.weight, self.out.bias)

    def _keys_and_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        latent, layers = self.latent, self.layers
        narrow, positions = split_latent(self.kv_a(h), latent.kv_rank)
        positions = layers.enter(positions).view(-1, cos.shape[0], 1, latent.rope_head_dim)
        positions = functional.rotate(positions, cos, sin)
        (kv,) = layers.columns(self.kv_a_norm(narrow), [(self.kv_b.weight, None)])
        return join_keys(positions, layers.heads(kv, latent.nope_head_dim + latent.value_head_dim), latent)


def split_latent(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` channels of ``x`` ``[B, S, L + R]``, and the others: copies, so that ``x`` need not be kept."""
    return _split(x, rank)


def join_keys(positions: Tensor, kv: Tensor, latent: LatentAttention) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, S, H, R + P]``, as attention kernels want them.

    ``positions`` ``[B, S, 1, R]`` is every head's; ``kv`` ``[B, S, H, P + V]``. Values are filled up with zeros.
    """
    return _joined(positions, kv, latent)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return x[..., :rank].contiguous(), x[..., rank:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat(grads, dim=-1), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, kv: Tensor, latent: LatentAttention) -> tuple[Tensor, Tensor]:
        ctx.latent = latent
        r, p, v = latent.rope_head_dim, latent.nope_head_dim, latent.value_head_dim
        keys = kv.new_empty(*kv.shape[:-1], latent.head_dim)
        keys[..., :r] = positions
        keys[..., r:] = kv[..., :p]
        values = torch.empty_like(keys)
        values[..., :v] = kv[..., p:]
        values[..., v:] = 0
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_keys, grad_values = grads
        r, v = ctx.latent.rope_head_dim, ctx.latent.value_head_dim
        grad_positions = grad_keys[..., :r].sum(2, keepdim=True)
        return grad_positions, torch.cat((grad_keys[..., r:], grad_values[..., :v]), dim=-1), None


_split = loader.outside_compile(_Split.apply)
_joined = loader.outside_compile(_Joined.apply)
