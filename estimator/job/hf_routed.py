"""Readers of the Hugging Face families of mixtures of experts beside ordinary attention, and of those that are read as another one.

Defaults are transformers' class defaults (5.23) as in ``hf_families``.
"""

from __future__ import annotations

from typing import Any

from estimator.errors import InputError
from estimator.job.fields import refuse
from estimator.job.hf_config import Config
from estimator.job.hf_experts import (
    COMMON,
    DEEPSEEK,
    LATENT,
    MTP,
    balance,
    deepseek_experts,
    deepseek_v3,
    with_experts,
)
from estimator.job.hf_families import Family, Shape, biases, rotary
from estimator.job.hf_norms import unrotated_every


def _every_layer(
    c: Config, shape: Shape, *, n_experts: int, per_token: int, coefficient: float = 0.001
) -> dict[str, Any]:
    """Experts of ``intermediate_size`` in every layer."""
    return {
        "n_experts": c.size("num_local_experts", "num_experts", default=n_experts),
        "per_token": c.size("num_experts_per_tok", default=per_token),
        "d_ff": shape["d_ff"],
        "balance_loss": c.number("router_aux_loss_coef", default=coefficient),
    }


def _olmoe(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = rotary(c)
    experts = _every_layer(c, shape, n_experts=64, per_token=8, coefficient=0.01)
    experts["normalise"] = c.flag("norm_topk_prob", default=False)
    clip = c.number("clip_qkv", default=0.0) > 0
    norms = {"norm_eps": c.number("rms_norm_eps", default=1e-5), "qk_norm": True, "qk_norms": "all", "clips_qkv": clip}
    return {**shape, **with_experts(experts), **biases(bias, bias, False), **norms}


def _phimoe(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = rotary(c, kv_heads=True, theta=1e6)
    return {
        **shape,
        **with_experts(_every_layer(c, shape, n_experts=16, per_token=2)),
        **biases(bias, bias, False),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": c.number("rms_norm_eps", default=1e-5),
        "head_bias": c.flag("lm_head_bias", default=False),
        "sliding_window": c.window(shape["n_layers"])[0],
    }


def _granite_moe(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = rotary(c)
    experts = _every_layer(c, shape, n_experts=8, per_token=2)
    experts["shared_d_ff"] = c.size("shared_intermediate_size", default=0, minimum=0)
    return {**shape, **with_experts(experts), **biases(bias, bias, False)}


def _minimax_m2(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True, head_dim=128, theta=5e6)
    rotated = c.size("rotary_dim", default=shape["head_dim"])
    experts = {**_every_layer(c, shape, n_experts=256, per_token=8), "scoring": "sigmoid", "selection_bias": True}
    fraction = min(1.0, rotated / shape["head_dim"]) if c.data.get("rotary_dim") else shape["rotary_fraction"]
    return {**shape, **with_experts(experts), "rotary_fraction": fraction, "qk_norm": True, "qk_norms": "all"}


def _dbrx(c: Config) -> Shape:
    attn, ffn = c.section("attn_config"), c.section("ffn_config")
    keys = {
        "hidden_size": c.size("d_model", "hidden_size"),
        "num_attention_heads": c.size("n_heads", "num_attention_heads"),
        "num_hidden_layers": c.layers("n_layers", "num_hidden_layers"),
        "vocab_size": c.size("vocab_size"),
        "max_position_embeddings": c.size("max_seq_len", "max_position_embeddings"),
        "num_key_value_heads": attn.get("kv_n_heads", 1),
        "rope_theta": attn.get("rope_theta", 10000.0),
        "intermediate_size": ffn.get("ffn_hidden_size", 3584),
        "hidden_act": (ffn.get("ffn_act_fn") or {"name": "silu"}).get("name", "silu"),
        "num_experts": ffn.get("moe_num_experts", 4),
        "num_experts_per_tok": ffn.get("moe_top_k", 1),
        "router_aux_loss_coef": ffn.get("moe_loss_weight", 0.01),
        "tie_word_embeddings": c.flag("tie_word_embeddings", default=False),
        "clip_qkv": attn.get("clip_qkv"),
    }
    plain = Config(keys, c.model_type)
    shape = rotary(plain)
    experts = _every_layer(plain, shape, n_experts=4, per_token=1)
    experts["normalise"] = bool(ffn.get("moe_normalize_expert_weights", 1.0))
    clip = plain.number("clip_qkv", default=0.0) > 0
    return {**shape, **with_experts(experts), "norm": "layernorm", "norm_eps": 1e-5, "clips_qkv": clip}


def _glm4_moe(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = deepseek_experts(
        c, rotary(c, kv_heads=True, fraction=0.5), sigmoid=True, groups=_groups(c), shared=1, first=1, scale=1.0
    )
    return {**shape, **biases(bias, False, False), **_glm_norms(c)}


def _glm_norms(c: Config) -> Shape:
    return {"norm_eps": c.number("rms_norm_eps", default=1e-5), "qk_norm": c.flag("use_qk_norm", default=False)}


def _dots1(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = deepseek_experts(c, rotary(c), sigmoid=True, groups=_groups(c), first=0, scale=1.0, normalise=False)
    window, every = c.window(shape["n_layers"], default=4096)
    if c.data.get("layer_types") is None:
        kept = c.size("max_window_layers", default=62, minimum=0) >= shape["n_layers"]
        if window and not kept and c.data.get("sliding_window") is not None:
            raise InputError(
                "config.layer_types is missing beside sliding_window; allowed: layer_types, or sliding_window null"
            )
        window = every = 0
    windows = {"sliding_window": window, "global_every": every}
    return {**shape, **biases(bias, bias, False), **windows, "qk_norm": True}


def _groups(c: Config) -> tuple[int, int]:
    return c.size("n_group", default=1), c.size("topk_group", default=1)


def llama4(c: Config) -> Shape:
    """Its chunks of attention count as windows of their size, which is right up to sequences of one chunk."""
    bias = c.flag("attention_bias", default=False)
    shape = rotary(c, kv_heads=True, head_dim=128, theta=500000.0)
    n_layers, d_ff = shape["n_layers"], shape["d_ff"]
    every = c.size("interleave_moe_layer_step", default=1)
    layers = c.data.get("moe_layers") or None
    if layers is not None and layers != list(range(every - 1, n_layers, every)):
        raise refuse("config.moe_layers", layers, f"every {every}-th (interleave_moe_layer_step)")
    experts = {
        "n_experts": c.size("num_local_experts", default=16),
        "per_token": c.size("num_experts_per_tok", default=1),
        "d_ff": d_ff,
        "shared_d_ff": d_ff,
        "first_layer": every - 1,
        "every": every,
        "scoring": "sigmoid",
        "normalise": False,
        "balance_loss": balance(c, "router_aux_loss_coef"),
    }
    still = unrotated_every(c, n_layers)
    return {
        **shape,
        **with_experts(experts),
        **biases(bias, bias, False),
        "d_ff": c.size("intermediate_size_mlp", default=16384),
        "norm_eps": c.number("rms_norm_eps", default=1e-5),
        **({"qk_norm": True, "qk_norms": "plain"} if c.flag("use_qk_norm", default=True) else {}),
        "unrotated_every": still,
        "sliding_window": c.size("attention_chunk_size", default=8192),
        "global_every": still,
    }


LLAMA4 = (*COMMON, "moe_layers", "interleave_moe_layer_step", "use_qk_norm")

ROUTED_FAMILIES: dict[str, Family] = {
    "dbrx": Family("Dbrx", _dbrx),
    "dots1": Family("Dots1", _dots1, ignored=DEEPSEEK),
    "glm4_moe": Family("Glm4Moe", _glm4_moe, ignored=(*DEEPSEEK, *MTP, "use_qk_norm")),
    "granitemoe": Family("GraniteMoe", _granite_moe, ignored=COMMON),
    "granitemoeshared": Family("GraniteMoeShared", _granite_moe, ignored=COMMON),
    "kimi_k2": Family("DeepseekV3", deepseek_v3, ignored=(*DEEPSEEK, *LATENT, *MTP)),
    "llama4_text": Family("Llama4", llama4, ignored=LLAMA4),
    "minimax_m2": Family(
        "MiniMaxM2",
        _minimax_m2,
        ignored=(*COMMON, *MTP, "use_qk_norm", "qk_norm_type", "mtp_transformer_layers", "num_mtp_modules", "use_mtp"),
    ),
    "olmoe": Family("Olmoe", _olmoe, ignored=COMMON),
    "phimoe": Family("PhiMoE", _phimoe, ignored=COMMON),
}
"""Accepted values of ``model_type``."""
