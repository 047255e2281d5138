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


class LatentSelfAttention(nn.Module):
    """Causal self-attention over a latent vector of keys and values."""

    def __init__(self, spec: ModelSpec, latent: LatentAttention) -> None:
        super().__init__()
        d, heads, eps = spec.d_model, spec.n_heads, spec.norm_eps
        if latent.q_rank:
            self.q_a = nn.Linear(d, latent.q_rank, bias=latent.bias)
            self.q_a_norm = RmsNorm(latent.q_rank, eps)
            self.q_b = nn.Linear(latent.q_rank, heads * latent.head_dim, bias=False)
        else:
            self.q = nn.Linear(d, heads * latent.head_dim, bias=False)
        self.kv_a = nn.Linear(d, latent.kv_rank + latent.rope_head_dim, bias=latent.bias)
        self.kv_a_norm = RmsNorm(latent.kv_rank, eps)
        self.kv_b = nn.Linear(latent.kv_rank, heads * (latent.nope_head_dim + latent.value_head_dim), bias=False)
        self.out = nn.Linear(heads * latent.value_head_dim, d, bias=spec.attn_out_bias)
        self.latent = latent

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.latent
        q = self.q_b(self.q_a_norm(self.q_a(h))) if shape.q_rank else self.q(h)
        q = functional.rotate(q.unflatten(-1, (-1, shape.head_dim)), cos, sin)
        k, v = self._keys_and_values(h, cos, sin)
        out = functional.attention(q, k, v)
        del q, k, v
        return self.out(out[..., : shape.value_head_dim].flatten(2))

    def _keys_and_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.latent
        narrow, positions = split_latent(self.kv_a(h), latent.kv_rank)
        positions = functional.rotate(positions.unsqueeze(2), cos, sin)
        kv = self.kv_b(self.kv_a_norm(narrow))
        return join_keys(positions, kv.unflatten(-1, (-1, latent.nope_head_dim + latent.value_head_dim)), latent)


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
