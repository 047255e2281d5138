"""One reader per Hugging Face family: which keys it has, which biases and norms, and its class defaults.

Defaults are transformers' class defaults, followed only where files of the family rely on them (a missing
``tie_word_embeddings``, ``head_dim``, ``n_inner``, ...). Layer counts, widths, heads and the vocabulary must be given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from estimator.errors import InputError
from estimator.job.fields import flag, number, refuse, shown
from estimator.job.hf_config import Config

Shape = dict[str, Any]
"""Fields of ``ModelSpec`` by name."""


class Family(NamedTuple):
    """How one ``model_type`` is read; ``prefix`` starts its class names; ``ignored`` extras are part of the family."""

    prefix: str
    read: Callable[[Config], Shape]
    ignored: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("ForCausalLM", "LMHeadModel")
    """What ends its class names where they have the head that is trained."""
    head_is_bare: bool = True
    """A tied head has no parameters of its own, so that the class without it (``...Model``) has as many."""


def biases(qkv: bool, out: bool, mlp: bool) -> Shape:
    return {"qkv_bias": qkv, "attn_out_bias": out, "mlp_bias": mlp}


def rotary(
    c: Config, *, head_dim: int | None = None, kv_heads: bool = False, tied: bool = False, theta: float = 10000.0,
    fraction: float = 1.0, activation: tuple[str, str] = ("hidden_act", "silu"),
) -> Shape:  # fmt: skip
    """What Llama and its descendants share: RMSNorm, rotary positions, a gated MLP, no biases.

    ``head_dim``: class default (``None``: the hidden size over the heads); ``kv_heads``: ``num_key_value_heads``
    must be given (its class default is a number of one model, not of the family); ``activation``: key and default.
    """
    d_model, n_heads = c.size("hidden_size"), c.size("num_attention_heads")
    given = c.data.get("head_dim") is not None
    if not given and (head_dim is None or "head_dim" in c.data):
        head_dim = c.heads(d_model, "num_attention_heads")[1]
    return {
        "n_layers": c.layers("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": c.size("num_key_value_heads", default=None if kv_heads else n_heads),
        "head_dim": c.size("head_dim", default=head_dim),
        "d_ff": c.size("intermediate_size"),
        "vocab_size": c.size("vocab_size"),
        "max_positions": c.size("max_position_embeddings"),
        "positions": "rotary",
        "rotary_fraction": c.rotary_fraction(fraction),
        "rope_theta": c.rope_theta(theta),
        "norm": "rmsnorm",
        "norm_eps": c.number("rms_norm_eps", default=1e-6),
        "activation": c.activation(activation[0], default=activation[1]),
        "gated_mlp": True,
        "tied_embeddings": c.flag("tie_word_embeddings", default=tied),
    }


def plain_sizes(c: Config, n_layers: int, d_model: int, n_heads: int, d_ff: int) -> Shape:
    """Sizes of a model whose key and value heads are as many as its query heads, which together are as wide as it."""
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": d_model // n_heads,
        "d_ff": d_ff,
        "vocab_size": c.size("vocab_size"),
    }


def gpt_line(c: Config, n_layers: int, d_model: int, n_heads: int, d_ff: int) -> Shape:
    """What the GPT-2 line shares: LayerNorm and linear layers with biases, an ungated MLP of tanh-GELU, a tied head."""
    return {
        **plain_sizes(c, n_layers, d_model, n_heads, d_ff),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": c.number("layer_norm_epsilon", "layer_norm_eps", default=1e-5),
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "tied_embeddings": c.flag("tie_word_embeddings", default=True),
        **biases(True, True, True),
    }


def _gpt2(c: Config) -> Shape:
    d_model = c.size("n_embd", "hidden_size")
    n_heads, _ = c.heads(d_model, "n_head", "num_attention_heads")
    rows = c.size("n_positions", "max_position_embeddings")
    return {
        **gpt_line(
            c, c.layers("n_layer", "num_hidden_layers"), d_model, n_heads, c.size("n_inner", default=4 * d_model)
        ),
        "max_positions": rows,
        "positions": "learned",
        "position_rows": rows,
        "activation": c.activation("activation_function", default="gelu_tanh"),
    }


def _gpt_bigcode(c: Config) -> Shape:
    shape = _gpt2(c)
    return {**shape, "n_kv_heads": 1} if c.flag("multi_query", default=True) else shape


def _opt(c: Config) -> Shape:
    d_model = c.size("hidden_size")
    n_heads, _ = c.heads(d_model, "num_attention_heads")
    if not c.flag("layer_norm_elementwise_affine", default=True):
        raise InputError("config.layer_norm_elementwise_affine is False; norms without weights are not forecast yet")
    embed_dim = c.size("word_embed_proj_dim", default=d_model)
    pre_norm = c.flag("do_layer_norm_before", default=True)
    bias = c.flag("enable_bias", default=True)
    positions = c.size("max_position_embeddings")
    return {
        **gpt_line(c, c.layers("num_hidden_layers"), d_model, n_heads, c.size("ffn_dim")),
        **biases(bias, bias, bias),
        "max_positions": positions,
        "positions": "learned",
        "position_rows": positions + 2,  # OPTLearnedPositionalEmbedding shifts every position by two
        "activation": c.activation("activation_function", default="relu"),
        "embed_dim": 0 if embed_dim == d_model else embed_dim,
        "pre_norm": pre_norm,
        "final_norm": pre_norm and not c.flag("_remove_final_layer_norm", default=False),
    }


def _bloom(c: Config) -> Shape:
    d_model = c.size("hidden_size", "n_embed")
    n_heads, _ = c.heads(d_model, "n_head", "num_attention_heads")
    if c.size("n_inner", default=4 * d_model) != 4 * d_model:
        raise refuse("config.n_inner", c.data["n_inner"], f"4 * hidden_size = {4 * d_model}, which BLOOM always uses")
    return {
        **gpt_line(c, c.layers("n_layer", "num_hidden_layers"), d_model, n_heads, 4 * d_model),
        "max_positions": c.size("seq_length", default=2048),  # ALiBi has no table; 2048 is what BLOOM was trained on
        "positions": "alibi",
        "embedding_norm": True,
    }


def _gpt_neox(c: Config) -> Shape:
    d_model = c.size("hidden_size")
    n_heads, _ = c.heads(d_model, "num_attention_heads")
    bias = c.flag("attention_bias", default=True)
    return {
        **gpt_line(c, c.layers("num_hidden_layers"), d_model, n_heads, c.size("intermediate_size")),
        **biases(bias, bias, True),
        "max_positions": c.size("max_position_embeddings"),
        "positions": "rotary",
        "rotary_fraction": c.rotary_fraction(0.25),
        "rope_theta": c.rope_theta(10000.0),
        "activation": c.activation("hidden_act", default="gelu"),
        "parallel_residual": c.flag("use_parallel_residual", default=True),
        "tied_embeddings": c.flag("tie_word_embeddings", default=False),
    }


def _mpt(c: Config) -> Shape:
    """MPT as its own code (llm-foundry) builds it: ``no_bias`` and ``expansion_ratio`` count, ALiBi replaces the table."""
    d_model = c.size("d_model", "hidden_size")
    n_heads, head_dim = c.heads(d_model, "n_heads", "num_attention_heads")
    attn = c.section("attn_config")
    if attn.get("attn_type", "multihead_attention") != "multihead_attention":
        raise refuse("config.attn_config.attn_type", attn["attn_type"], "'multihead_attention'")
    for section, key, wanted in (
        (attn, "qk_ln", False),
        (attn, "qk_gn", False),
        (c.section("ffn_config"), "ffn_type", "mptmlp"),
    ):
        if section.get(key, wanted) != wanted:
            raise InputError(
                f"config has {key} = {shown(section[key])}, which is not forecast for MPT yet; allowed: {wanted!r}"
            )
    norm_type = c.data.get("norm_type", "low_precision_layernorm")
    norms = {
        "layernorm": "layernorm",
        "low_precision_layernorm": "layernorm",
        "rmsnorm": "rmsnorm",
        "low_precision_rmsnorm": "rmsnorm",
    }
    if not isinstance(norm_type, str) or norm_type not in norms:
        raise refuse("config.norm_type", norm_type, ", ".join(sorted(norms)))
    ratio = number("config.expansion_ratio", c.data.get("expansion_ratio", 4))
    if ratio * d_model != int(ratio * d_model) or not 0 < ratio <= 1024:
        raise refuse("config.expansion_ratio", ratio, "a number that makes a whole MLP width")
    bias = not c.flag("no_bias", default=True)
    positions = c.size("max_seq_len")
    if flag("config.attn_config.alibi", attn.get("alibi", True)):
        kind = "alibi"
    elif flag("config.attn_config.rope", attn.get("rope", False)):
        kind = "rotary"
    else:
        kind = "learned" if c.flag("learned_pos_emb", default=True) else "none"
    return {
        **gpt_line(c, c.layers("n_layers", "num_hidden_layers"), d_model, n_heads, int(ratio * d_model)),
        **biases(bias, bias, bias),
        "head_dim": head_dim,
        "max_positions": positions,
        "positions": kind,
        "position_rows": positions if kind == "learned" else 0,
        "rope_theta": number("config.attn_config.rope_theta", attn.get("rope_theta", 10000)),
        "norm": norms[norm_type],
        "norm_bias": bias and norms[norm_type] == "layernorm",
        "activation": "gelu",
    }


def _llama(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    return {**rotary(c), **biases(bias, bias, c.flag("mlp_bias", default=False))}


def _mistral(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True)
    # layer_types is not looked at: transformers' Mistral applies its window to every layer
    plain = Config({"sliding_window": c.data.get("sliding_window", 4096)}, c.model_type)
    return {**shape, "sliding_window": plain.window(shape["n_layers"])[0]}


def _qwen_window(c: Config, n_layers: int) -> Shape:
    """Qwen windows the layers from ``max_window_layers`` on, and only if ``use_sliding_window``."""
    if not c.flag("use_sliding_window", default=False):
        return {}
    first = c.size("max_window_layers", default=28, minimum=0)
    if c.data.get("layer_types") is None and 0 < first < n_layers and c.data.get("sliding_window", 4096) is not None:
        raise refuse(
            "config.max_window_layers",
            first,
            f"0 or at least num_hidden_layers = {n_layers}: all or no layers windowed",
        )
    if c.data.get("layer_types") is None and first >= n_layers:
        return {}
    window, every = c.window(n_layers, default=4096)
    return {"sliding_window": window, "global_every": every}


def _qwen2(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True)
    return {**shape, **biases(True, False, False), **_qwen_window(c, shape["n_layers"])}


def _qwen3(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True, head_dim=128)
    bias = c.flag("attention_bias", default=False)
    return {**shape, **biases(bias, bias, False), **_qwen_window(c, shape["n_layers"]), "qk_norm": True}


def _gemma(c: Config) -> Shape:
    # "gelu" in the first Gemma's files means the tanh approximation (transformers issue 29402)
    bias = c.flag("attention_bias", default=False)
    key = "hidden_activation" if c.data.get("hidden_activation") is not None else "hidden_act"
    shape = rotary(c, kv_heads=True, head_dim=256, tied=True, activation=(key, "gelu_tanh"))
    activation = "gelu_tanh" if shape["activation"] == "gelu" else shape["activation"]
    return {**shape, **biases(bias, bias, False), "activation": activation}


def _gemma2(c: Config) -> Shape:
    capped = (
        c.data.get("final_logit_softcapping", 30.0) is not None
        and c.number("final_logit_softcapping", default=30.0) > 0
    )
    return {**_gemma_windowed(c, every=2, theta=10000.0), "caps_logits": capped}


def _gemma3(c: Config) -> Shape:
    every = c.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    capped = c.number("final_logit_softcapping", default=0.0) > 0
    return {**_gemma_windowed(c, every=every, theta=1e6), "qk_norm": True, "caps_logits": capped}


def _gemma_windowed(c: Config, every: int, theta: float) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = rotary(
        c, kv_heads=True, head_dim=256, tied=True, theta=theta, activation=("hidden_activation", "gelu_tanh")
    )
    if c.flag("use_bidirectional_attention", default=False):
        raise InputError("config.use_bidirectional_attention is True; only causal attention is forecast")
    window, every = c.window(shape["n_layers"], default=4096, every=every)
    return {
        **shape,
        **biases(bias, bias, False),
        "sandwich_norms": True,
        "sliding_window": window,
        "global_every": every,
    }


def _phi3(c: Config) -> Shape:
    shape = rotary(c)
    return {
        **shape,
        "norm_eps": c.number("rms_norm_eps", default=1e-5),
        "sliding_window": c.window(shape["n_layers"])[0],
    }


def _starcoder2(c: Config) -> Shape:
    bias = c.flag("use_bias", default=True)
    shape = rotary(c, kv_heads=True, tied=True, activation=("hidden_act", "gelu_tanh"))
    window, every = c.window(shape["n_layers"])
    return {
        **shape,
        **biases(bias, bias, bias),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": c.number("norm_epsilon", default=1e-5),
        "gated_mlp": False,
        "sliding_window": window,
        "global_every": every,
    }


def _glm(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True, head_dim=128, fraction=0.5)
    return {**shape, **biases(c.flag("attention_bias", default=True), False, False)}


def _glm4(c: Config) -> Shape:
    return {**_glm(c), "sandwich_norms": True}


def _seed_oss(c: Config) -> Shape:
    qkv, out = c.flag("attention_bias", default=True), c.flag("attention_out_bias", default=False)
    return {**rotary(c, kv_heads=True, head_dim=128), **biases(qkv, out, c.flag("mlp_bias", default=False))}


def _ernie(c: Config) -> Shape:
    bias = c.flag("use_bias", default=False)
    shape = rotary(c, kv_heads=True, head_dim=128, tied=True, theta=500000.0)
    return {**shape, **biases(bias, bias, bias), "norm_eps": c.number("rms_norm_eps", default=1e-5)}


def _hunyuan(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    shape = rotary(c)
    return {**shape, **biases(bias, bias, False), "qk_norm": True, "norm_eps": c.number("rms_norm_eps", default=1e-5)}


FAMILIES: dict[str, Family] = {
    "bloom": Family("Bloom", _bloom),
    "ernie4_5": Family("Ernie4_5", _ernie),
    "gemma": Family("Gemma", _gemma),
    "gemma2": Family("Gemma2", _gemma2),
    "gemma3_text": Family("Gemma3", _gemma3),
    "glm": Family("Glm", _glm),
    "glm4": Family("Glm4", _glm4),
    "gpt2": Family("GPT2", _gpt2),
    "gpt_bigcode": Family("GPTBigCode", _gpt_bigcode),
    "gpt_neox": Family("GPTNeoX", _gpt_neox),
    "granite": Family("Granite", _llama),
    "hunyuan_v1_dense": Family("HunYuanDenseV1", _hunyuan, ignored=("use_qk_norm",)),
    "llama": Family("Llama", _llama),
    "mistral": Family("Mistral", _mistral),
    "mpt": Family("MPT", _mpt),
    "opt": Family("OPT", _opt),
    "phi3": Family("Phi3", _phi3),
    "qwen2": Family("Qwen2", _qwen2),
    "qwen3": Family("Qwen3", _qwen3),
    "seed_oss": Family("SeedOss", _seed_oss),
    "starcoder2": Family("Starcoder2", _starcoder2),
}
"""Families with dense MLPs, by ``model_type``."""
