"""Readers of the Hugging Face families that are mixtures of experts; DeepSeek's with latent attention.

Defaults are transformers' class defaults (5.23) as in ``hf_families``. ``deepseek`` has no class there: it is read as the code
that came with its weights builds it.
"""

from __future__ import annotations

from typing import Any

from estimator.errors import InputError
from estimator.job.experts import Experts
from estimator.job.fields import refuse
from estimator.job.hf_config import Config
from estimator.job.hf_families import Family, Shape, biases, rotary
from estimator.job.latent import LatentAttention


def _mixtral(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True)
    experts = {
        "n_experts": c.size("num_local_experts", "num_experts", default=8),
        "per_token": c.size("num_experts_per_tok", default=2),
        "d_ff": shape["d_ff"],
        "balance_loss": balance(c, "router_aux_loss_coef"),
    }
    norm_eps = c.number("rms_norm_eps", default=1e-5)
    return {**shape, **with_experts(experts), "norm_eps": norm_eps, "sliding_window": c.window(shape["n_layers"])[0]}


def _qwen2_moe(c: Config) -> Shape:
    qkv = c.flag("qkv_bias", default=True)
    shape = _qwen_experts(c, rotary(c, kv_heads=True), shared=5632, n_experts=60, per_token=4, d_ff=1408)
    window, every, first = 0, 0, c.size("max_window_layers", default=28, minimum=0)
    if c.flag("use_sliding_window", default=False):
        if c.data.get("layer_types") is None and first < shape["n_layers"]:
            raise refuse("config.max_window_layers", first, f"at least num_hidden_layers = {shape['n_layers']}")
        window, every = c.window(shape["n_layers"], default=4096, every=2)
    return {**shape, **biases(qkv, False, False), "sliding_window": window, "global_every": every}


def _qwen3_moe(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = _qwen_experts(c, rotary(c, kv_heads=True), shared=0, n_experts=128, per_token=8, d_ff=768)
    # its class windows every layer, or none
    windowed = c.flag("use_sliding_window", default=False) and c.data.get("sliding_window", 4096) is not None
    window = c.size("sliding_window", default=4096) if windowed else 0
    return {**shape, **biases(bias, bias, False), "qk_norm": True, "sliding_window": window}


def _qwen_experts(c: Config, shape: Shape, *, shared: int, n_experts: int, per_token: int, d_ff: int) -> Shape:
    """``decoder_sparse_step``: every so-manieth layer has experts; ``mlp_only_layers`` has none."""
    every, dense = c.size("decoder_sparse_step", default=1), c.data.get("mlp_only_layers") or []
    n_layers = shape["n_layers"]
    routed = [layer for layer in range(n_layers) if (layer + 1) % every == 0 and layer not in _layers(dense, n_layers)]
    first = routed[0] if routed else n_layers
    if routed != list(range(first, n_layers, every)):
        raise refuse("config.mlp_only_layers", dense, "the first layers, so that the others follow regularly")
    experts = {
        "n_experts": c.size("num_experts", "num_local_experts", default=n_experts),
        "per_token": c.size("num_experts_per_tok", default=per_token),
        "d_ff": c.size("moe_intermediate_size", default=d_ff),
        "shared_d_ff": c.size("shared_expert_intermediate_size", default=shared) if shared else 0,
        "shared_gate": bool(shared),
        "first_layer": first,
        "every": every,
        "normalise": c.flag("norm_topk_prob", default=False),
        "balance_loss": balance(c, "router_aux_loss_coef"),
    }
    return {**shape, **with_experts(experts)}


def _layers(value: Any, n_layers: int) -> list[int]:
    if not isinstance(value, list) or any(type(layer) is not int or not 0 <= layer < n_layers for layer in value):
        raise refuse("config.mlp_only_layers", value, f"a list of numbers of layers below {n_layers}")
    return value


def _deepseek(c: Config) -> Shape:
    """DeepSeekMoE: ordinary attention."""
    bias = c.flag("attention_bias", default=False)
    return {**deepseek_experts(c, rotary(c)), **biases(bias, bias, False)}


def _deepseek_v2(c: Config) -> Shape:
    return _deepseek_latent(c, {"topk_method": "greedy", "n_group": 1, "topk_group": 1})


def deepseek_v3(c: Config) -> Shape:
    return _deepseek_latent(c, {"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4})


def deepseek_experts(
    c: Config, shape: Shape, *, sigmoid: bool = False, groups: tuple[int, int] = (1, 1), first: int | None = None,
    scale: float | None = None, normalise: bool | None = None, shared: int = 0,
) -> Shape:  # fmt: skip
    """``shape`` with DeepSeek's experts; ``first``, ``scale`` and ``normalise``: class defaults where they are not DeepSeek's own."""
    shared = 0 if "n_shared_experts" in c.data else shared  # null means none
    first = (3 if sigmoid else 0) if first is None else first
    scale = (2.5 if sigmoid else 1.0) if scale is None else scale
    if c.size("moe_layer_freq", default=1) != 1:
        raise refuse("config.moe_layer_freq", c.data["moe_layer_freq"], "1: transformers does not look at it")
    d_ff = c.size("moe_intermediate_size")
    experts = {
        "n_experts": c.size("n_routed_experts", "num_local_experts"),
        "per_token": c.size("num_experts_per_tok"),
        "d_ff": d_ff,
        "shared_d_ff": d_ff * c.size("n_shared_experts", default=shared, minimum=0),
        "first_layer": c.size("first_k_dense_replace", default=first, minimum=0),
        "scoring": "sigmoid" if sigmoid else "softmax",
        "normalise": c.flag("norm_topk_prob", default=sigmoid if normalise is None else normalise),
        "scale": c.number("routed_scaling_factor", default=scale),
        "n_groups": groups[0],
        "groups_per_token": groups[1],
        "selection_bias": sigmoid,
        "balance_loss": 0.0 if sigmoid else balance(c, "aux_loss_alpha"),
    }
    return {**shape, **with_experts(experts)}


def _deepseek_latent(c: Config, default: dict[str, Any]) -> Shape:
    sigmoid = default["topk_method"] == "noaux_tc"
    method = c.data.get("topk_method") or default["topk_method"]
    if method not in (("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")):
        raise refuse("config.topk_method", method, "noaux_tc" if sigmoid else "greedy, group_limited_greedy")
    groups = (c.size("n_group", default=default["n_group"]), c.size("topk_group", default=default["topk_group"]))
    # the class takes a rank of 1536 where the key is missing; null means none
    q_rank = c.size("q_lora_rank") if c.data.get("q_lora_rank") is not None else 0 if "q_lora_rank" in c.data else 1536
    bias = c.flag("attention_bias", default=False)
    latent = LatentAttention(
        kv_rank=c.size("kv_lora_rank", default=512), q_rank=q_rank, nope_head_dim=c.size("qk_nope_head_dim", default=128),
        rope_head_dim=c.size("qk_rope_head_dim", default=64), value_head_dim=c.size("v_head_dim", default=128), bias=bias,
    )  # fmt: skip
    n_heads = c.size("num_attention_heads")
    plain = Config({**c.data, "head_dim": latent.head_dim, "num_key_value_heads": n_heads}, c.model_type)
    shape = deepseek_experts(
        c, rotary(plain), sigmoid=sigmoid, groups=groups if method != "greedy" else (1, 1), shared=1 if sigmoid else 2
    )
    mlp_bias = not sigmoid and c.flag("mlp_bias", default=False)
    return {**shape, "latent": latent, "rotary_fraction": 1.0, **biases(False, bias, mlp_bias)}


def _gpt_oss(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=True)
    shape = rotary(c, kv_heads=True, head_dim=64, theta=150000.0)
    window, every = c.window(shape["n_layers"], default=128, every=2)
    experts = {
        "n_experts": c.size("num_local_experts", "num_experts", default=128),
        "per_token": c.size("num_experts_per_tok", "experts_per_token", default=4),
        "d_ff": shape["d_ff"],
        "router_bias": True,
        "bias": True,
        "clamp": c.number("swiglu_limit", default=7.0),
        "balance_loss": balance(c, "router_aux_loss_coef"),
    }
    windows = {"sliding_window": window, "global_every": every}
    norm_eps = c.number("rms_norm_eps", default=1e-5)
    return {
        **shape,
        **with_experts(experts),
        **biases(bias, bias, False),
        **windows,
        "norm_eps": norm_eps,
        "attn_sinks": True,
    }


def balance(c: Config, key: str) -> float:
    """The loss's coefficient; its class adds it only where ``output_router_logits`` is set, training code always."""
    return c.number(key, default=0.001)


def with_experts(experts: dict[str, Any]) -> Shape:
    try:
        return {"experts": Experts(**experts)}
    except InputError as error:
        raise InputError(f"config does not describe a mixture of experts: {error}") from None


COMMON = ("num_experts", "num_local_experts", "num_experts_per_tok", "experts_per_token")
_QWEN = ("moe_intermediate_size", "shared_expert_intermediate_size")
DEEPSEEK = (*COMMON, "moe_intermediate_size", "moe_layer_freq", "n_routed_experts", "n_shared_experts")
LATENT = ("q_lora_rank", "kv_lora_rank")
MTP = ("num_nextn_predict_layers", "num_mtp_layers")
"""Multi-token prediction: its class does not build these layers."""

EXPERT_FAMILIES: dict[str, Family] = {
    "deepseek": Family("Deepseek", _deepseek, ignored=DEEPSEEK),
    "deepseek_v2": Family("DeepseekV2", _deepseek_v2, ignored=(*DEEPSEEK, *LATENT)),
    "deepseek_v3": Family("DeepseekV3", deepseek_v3, ignored=(*DEEPSEEK, *LATENT, *MTP)),
    "gpt_oss": Family("GptOss", _gpt_oss, ignored=COMMON),
    "mixtral": Family("Mixtral", _mixtral, ignored=COMMON),
    "qwen2_moe": Family("Qwen2Moe", _qwen2_moe, ignored=(*COMMON, *_QWEN)),
    "qwen3_moe": Family("Qwen3Moe", _qwen3_moe, ignored=(*COMMON, *_QWEN)),
}
