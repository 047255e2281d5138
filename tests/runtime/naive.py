"""Models with an encoder once more, as plainly as their papers say it: whole score matrices, a bucket worked out pair by pair.

Checked against transformers 5.23 (``BertForMaskedLM``, ``RobertaForMaskedLM``, ``T5ForConditionalGeneration``,
``BartForConditionalGeneration``; loss and gradients, weights copied) where that was installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.job import ModelSpec

Params = Mapping[str, Tensor]
ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def bucket(ahead: int, n_buckets: int, max_distance: int, *, causal: bool) -> int:
    """T5's bucket of one pair: the second place is ``ahead`` of the first."""
    first = 0
    if causal:
        distance = max(-ahead, 0)
    else:
        n_buckets //= 2
        first, distance = n_buckets if ahead > 0 else 0, abs(ahead)
    exact = n_buckets // 2
    if distance < exact:
        return first + distance
    more = int(math.log(distance / exact) / math.log(max_distance / exact) * (n_buckets - exact))
    return first + min(exact + more, n_buckets - 1)


class Naive:
    """``spec``'s model with the parameters ``p``, by name."""

    def __init__(self, spec: ModelSpec, p: Params) -> None:
        self.spec, self.p = spec, p
        assert spec.encoder is not None
        self.encoder = spec.encoder

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.p[f"{name}.weight"]
        if self.spec.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + self.spec.norm_eps).sqrt() * weight
        centered = x - x.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + self.spec.norm_eps).sqrt() * weight
        return y + self.p[f"{name}.bias"]

    def attention(self, name: str, h: Tensor, source: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.{x}", y).unflatten(-1, (self.spec.n_heads, -1)).transpose(1, 2)
            for x, y in (("q", h), ("k", source), ("v", source))
        )
        scores = q @ k.mT
        if self.spec.positions != "relative":
            scores = scores / math.sqrt(self.spec.head_dim)
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        return self.linear(f"{name}.out", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def mlp(self, name: str, h: Tensor) -> Tensor:
        act = ACTIVATIONS[self.spec.activation]
        up = self.linear(f"{name}.up", h)
        return self.linear(f"{name}.down", act(self.linear(f"{name}.gate", h)) * up if self.spec.gated_mlp else act(up))

    def block(self, name: str, x: Tensor, bias: Tensor | None, memory: Tensor | None = None) -> Tensor:
        causal = memory is not None
        parts = [("attn", lambda h: self.attention(f"{name}.attn", h, h, bias, causal))]
        if memory is not None:
            parts.append(("cross", lambda h: self.attention(f"{name}.cross", h, memory, None, False)))
        for part, run in [*parts, ("mlp", lambda h: self.mlp(f"{name}.mlp", h))]:
            norm = f"{name}.{part}_norm"
            x = x + run(self.norm(norm, x)) if self.spec.pre_norm else self.norm(norm, x + run(x))
        return x

    def embed(self, ids: Tensor, name: str) -> Tensor:
        x = self.p["embed.tokens.weight"][ids]
        if self.spec.position_rows:
            first = self.spec.position_rows - self.spec.max_positions
            x = x + self.p[f"embed.{name}positions.weight"][first : first + ids.shape[1]]
        if self.encoder.token_types:
            x = x + self.p["embed.types.weight"][0]
        return self.norm(f"embed.{name}norm", x) if self.spec.embedding_norm else x

    def relative(self, name: str, seq_len: int, *, causal: bool) -> Tensor | None:
        e = self.encoder
        if not e.relative_buckets:
            return None
        buckets = [
            [bucket(j - i, e.relative_buckets, e.relative_distance, causal=causal) for j in range(seq_len)]
            for i in range(seq_len)
        ]
        return self.p[f"embed.{name}.bias.table.weight"][torch.tensor(buckets)].permute(2, 0, 1)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        out = self.p["embed.tokens.weight" if self.spec.tied_embeddings else "head.out.weight"]
        h = self.masked_lm(ids) if not self.encoder.n_layers else self.translated(ids, labels)
        logits = F.linear(h, out, self.p.get("head.out.bias"))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def masked_lm(self, ids: Tensor) -> Tensor:
        x = self.embed(ids, "")
        for layer in range(self.spec.n_layers):
            x = self.block(f"blocks.{layer}", x, None)
        return self.norm("head.norm", ACTIVATIONS[self.spec.activation](self.linear("head.transform", x)))

    def translated(self, ids: Tensor, labels: Tensor) -> Tensor:
        n, seq_len = self.encoder.n_layers, ids.shape[1]
        x, bias = self.embed(ids, "source."), self.relative("source", seq_len, causal=False)
        for layer in range(n):
            x = self.block(f"encoder.{layer}", x, bias)
        x = self.norm(f"encoder.{n - 1}.final_norm", x) if self.spec.final_norm else x
        targets = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
        y, bias = self.embed(targets, "target."), self.relative("target", seq_len, causal=True)
        for layer in range(self.spec.n_layers):
            y = self.block(f"decoder.{layer}", y, bias, x)
        y = self.norm("head.final_norm", y) if self.spec.final_norm else y
        scaled = self.spec.positions == "relative" and self.spec.tied_embeddings
        return y / math.sqrt(self.spec.d_model) if scaled else y
