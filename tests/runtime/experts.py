"""Small models with experts and latent attention, and a naive reference: token by token, no buffers, no tricks.

Sizes of parameters are multiples of 16: torch's fused Adam rounds what is left over otherwise than what it takes 16 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.job import ModelSpec
from estimator.job.experts import Experts
from estimator.job.latent import LatentAttention
from tests.runtime import tiny

MIXTRAL = replace(
    tiny.LLAMA, name="tiny-mixtral", family="mixtral", d_ff=44,
    experts=Experts(n_experts=4, per_token=2, d_ff=44, balance_loss=0.02),
)  # fmt: skip
QWEN_MOE = replace(
    tiny.QWEN3, name="tiny-qwen-moe", family="qwen2_moe", n_layers=3,
    experts=Experts(n_experts=6, per_token=3, d_ff=20, shared_d_ff=36, shared_gate=True, first_layer=1, every=2,
                    normalise=False, balance_loss=0.01, capacity_factor=1.0),
)  # fmt: skip
DEEPSEEK_V3 = replace(
    tiny.LLAMA, name="tiny-deepseek-v3", family="deepseek_v3", n_layers=3, n_kv_heads=4, head_dim=12,
    latent=LatentAttention(kv_rank=16, q_rank=20, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
    experts=Experts(n_experts=8, per_token=3, d_ff=20, shared_d_ff=40, first_layer=1, scoring="sigmoid", scale=2.5,
                    n_groups=4, groups_per_token=2, selection_bias=True, balance_loss=0.01),
)  # fmt: skip
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3, name="tiny-deepseek-v2", family="deepseek_v2", head_dim=24,
    latent=LatentAttention(kv_rank=16, nope_head_dim=8, rope_head_dim=16, value_head_dim=24, bias=True),
    experts=Experts(n_experts=8, per_token=2, d_ff=20, shared_d_ff=20, first_layer=2, normalise=False, scale=16.0,
                    n_groups=2, groups_per_token=1, balance_loss=0.01),
)  # fmt: skip
BIASED = replace(
    tiny.LLAMA, name="tiny-biased-experts", family="gpt_oss",
    experts=Experts(n_experts=4, per_token=1, d_ff=20, bias=True, router_bias=True, capacity_factor=0.5),
)  # fmt: skip
GPT_OSS = replace(
    BIASED, name="tiny-gpt-oss", n_layers=3, attn_sinks=True, sliding_window=5, global_every=2, qkv_bias=True, attn_out_bias=True,
    experts=replace(BIASED.experts, per_token=2, clamp=0.1, capacity_factor=0.0),
)  # fmt: skip
"""Its clamp is so narrow that it is felt from the first step on."""
ALL: tuple[ModelSpec, ...] = (MIXTRAL, QWEN_MOE, DEEPSEEK_V3, DEEPSEEK_V2, BIASED)

Values = Mapping[str, Tensor]
_ACTIVATIONS: dict[str, Callable[..., Any]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def experts_by_token(h: Tensor, p: Values, experts: Experts, activation: str) -> tuple[Tensor, Tensor]:
    """What a layer makes of the tokens ``h`` ``[T, D]``, and its load-balance loss. ``p``: its parameters and buffers."""
    act, n = _ACTIVATIONS[activation], experts.n_experts
    logits = F.linear(h, p["router.weight"], p.get("router.bias"))
    chosen = [_choice(row, p.get("selection_bias"), experts) for row in _scores(logits, experts)]
    room = {expert: experts.capacity(len(h)) or 10**9 for expert in range(n)}
    kept = set()
    for place in range(experts.per_token):  # all first choices before all second ones
        for token in range(len(h)):
            expert = chosen[token][place]
            if room[expert] > 0:
                room[expert] -= 1
                kept.add((token, place))
    rows, scores = [], _scores(logits, experts)
    for token, x in enumerate(h):
        total = sum(scores[token, expert] for expert in chosen[token]) if experts.normalise else 1.0
        y = torch.zeros_like(x)
        for place, expert in enumerate(chosen[token]):
            if (token, place) not in kept:
                continue
            gate, up = (_project(x, p, f"experts.{name}", expert) for name in ("gate", "up"))
            out = _project(act(gate) * up, p, "experts.down", expert)
            y = y + out * scores[token, expert] / total * experts.scale
        if experts.shared_d_ff:
            shared = act(p["shared.gate.weight"] @ x) * (p["shared.up.weight"] @ x)
            shared = p["shared.down.weight"] @ shared
            y = y + (shared * (p["shared_gate.weight"] @ x).sigmoid() if experts.shared_gate else shared)
        rows.append(y)
    counts = torch.tensor([sum(row.count(expert) for row in chosen) for expert in range(n)])
    shares = scores / scores.sum(-1, keepdim=True)
    balance = experts.balance_loss * n * sum(counts / counts.sum() * shares.mean(0))
    return torch.stack(rows), balance


def _project(x: Tensor, p: Values, name: str, expert: int) -> Tensor:
    y = p[name][expert] @ x
    return y + p[f"{name}_bias"][expert] if f"{name}_bias" in p else y


def _scores(logits: Tensor, experts: Experts) -> Tensor:
    return logits.softmax(-1) if experts.scoring == "softmax" else logits.sigmoid()


def _choice(scores: Tensor, bias: Tensor | None, experts: Experts) -> list[int]:
    value = (scores if bias is None else scores + bias).tolist()
    size = experts.n_experts // experts.n_groups
    groups = [range(first, first + size) for first in range(0, experts.n_experts, size)]
    n_best = 2 if bias is not None else 1
    groups.sort(key=lambda group: -sum(sorted((value[e] for e in group), reverse=True)[:n_best]))
    reachable = [expert for group in groups[: experts.groups_per_token] for expert in group]
    return sorted(reachable, key=lambda expert: -value[expert])[: experts.per_token]


def latent_attention_by_head(h: Tensor, p: Values, spec: ModelSpec) -> Tensor:
    """``h`` ``[S, D]`` through latent attention, one query and head at a time."""
    latent = spec.latent
    assert latent is not None
    rope, nope, value = latent.rope_head_dim, latent.nope_head_dim, latent.value_head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + spec.norm_eps).sqrt() * weight

    def turn(x: Tensor, place: int) -> Tensor:
        angles = place * spec.rope_theta ** -(torch.arange(0, rope, 2) / rope)
        a, b = x[: rope // 2], x[rope // 2 :]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))

    queries, keys, values = [], [], []
    for place, x in enumerate(h):
        narrow = norm(_biased(p, "q_a", x), p["q_a_norm.weight"]) if latent.q_rank else x
        q = (p["q_b.weight" if latent.q_rank else "q.weight"] @ narrow).view(spec.n_heads, rope + nope)
        both = _biased(p, "kv_a", x)
        position = turn(both[latent.kv_rank :], place)
        kv = (p["kv_b.weight"] @ norm(both[: latent.kv_rank], p["kv_a_norm.weight"])).view(spec.n_heads, nope + value)
        queries.append([torch.cat((turn(head[:rope], place), head[rope:])) for head in q])
        keys.append([torch.cat((position, head[:nope])) for head in kv])
        values.append([head[nope:] for head in kv])
    rows = []
    for place in range(len(h)):
        heads = []
        for head in range(spec.n_heads):
            logits = [queries[place][head] @ keys[seen][head] / (rope + nope) ** 0.5 for seen in range(place + 1)]
            shares = torch.stack(logits).softmax(0)
            heads.append(sum(share * values[seen][head] for seen, share in enumerate(shares)))
        rows.append(p["out.weight"] @ torch.cat(heads))
    return torch.stack(rows)


def _biased(p: Values, name: str, x: Tensor) -> Tensor:
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y
