"""Readers of the Hugging Face families whose attention and MLP stand side by side on the residual stream, most behind one norm.

Defaults are transformers' class defaults (5.23) as in ``hf_families``; ``RefinedWeb`` and ``RefinedWebModel`` are what Falcon's first
files called themselves, read as the code that came with them builds it.
"""

from __future__ import annotations

from estimator.errors import InputError
from estimator.job.fields import refuse
from estimator.job.hf_config import Config
from estimator.job.hf_families import Family, Shape, biases, plain_sizes, rotary

_LAYER_NORM: Shape = {"norm": "layernorm", "norm_bias": True}
_SHARED: Shape = {"parallel_residual": True, "shared_norm": True}


def _gptj(c: Config) -> Shape:
    d_model = c.size("n_embd", "hidden_size")
    n_heads, head_dim = c.heads(d_model, "n_head", "num_attention_heads")
    rotated = c.size("rotary_dim", default=64) if "rotary_dim" not in c.data or c.data["rotary_dim"] else head_dim
    if rotated > head_dim:
        raise refuse("config.rotary_dim", rotated, f"at most the width of a head, {head_dim}")
    d_ff = c.size("n_inner", default=4 * d_model)
    return {
        **plain_sizes(c, c.layers("n_layer", "num_hidden_layers"), d_model, n_heads, d_ff),
        **biases(False, False, True),
        **_LAYER_NORM,
        **_SHARED,
        "max_positions": c.size("n_positions", "max_position_embeddings"),
        "positions": "rotary",
        "rotary_fraction": rotated / head_dim,
        "norm_eps": c.number("layer_norm_epsilon", default=1e-5),
        "activation": c.activation("activation_function", default="gelu_tanh"),
        "gated_mlp": False,
        "head_bias": True,
        "tied_embeddings": c.flag("tie_word_embeddings", default=False),
    }


def _phi(c: Config) -> Shape:
    if c.flag("qk_layernorm", default=False):
        raise InputError("config.qk_layernorm is True; Phi's norms of queries and keys are not forecast yet")
    return {
        **rotary(c, fraction=0.5, activation=("hidden_act", "gelu_tanh")),
        **biases(True, True, True),
        **_LAYER_NORM,
        **_SHARED,
        "norm_eps": c.number("layer_norm_eps", default=1e-5),
        "gated_mlp": False,
        "head_bias": True,
    }


def _cohere(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    normed = c.flag("use_qk_norm", default=False)
    return {
        **rotary(c, tied=True, theta=500000.0),
        **biases(bias, bias, False),
        **_SHARED,
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_eps", default=1e-5),
        **({"qk_norm": True, "qk_norms": "each"} if normed else {}),
    }


def _cohere2(c: Config) -> Shape:
    """Only windowed layers rotate."""
    shape = {key: value for key, value in _cohere(c).items() if not key.startswith("qk_norm")}
    every = c.size("sliding_window_pattern", default=4)
    window, every = c.window(shape["n_layers"], default=4096, every=every)
    if not window:
        raise InputError(
            "config.sliding_window is null or no layer has it; Cohere2 without windows is not forecast yet"
        )
    return {**shape, "sliding_window": window, "global_every": every, "unrotated_every": every}


def _stablelm(c: Config) -> Shape:
    return {
        **rotary(c, kv_heads=True, fraction=0.25),
        **biases(c.flag("use_qkv_bias", default=False), False, False),
        **_LAYER_NORM,
        "norm_eps": c.number("layer_norm_eps", default=1e-5),
        **(_SHARED if c.flag("use_parallel_residual", default=False) else {}),
        **({"qk_norm": True, "qk_norms": "each"} if c.flag("qk_layernorm", default=False) else {}),
    }


def _falcon(c: Config) -> Shape:
    """``multi_query`` means one key-value head whatever ``num_kv_heads`` says, but for the new architecture."""
    d_model = c.size("hidden_size")
    n_heads, _ = c.heads(d_model, "num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture", default=False)
    n_kv = c.size("num_kv_heads", "n_head_kv", default=n_heads) if new else n_heads
    one_head = c.flag("multi_query", default=True) and not new
    parallel = c.flag("parallel_attn", default=True)
    n_norms = c.size("num_ln_in_parallel_attn", default=2 if new else 1)
    bias, alibi = c.flag("bias", default=False), c.flag("alibi", default=False)
    d_ff = c.size("ffn_hidden_size", default=4 * d_model)
    return {
        **plain_sizes(c, c.layers("num_hidden_layers", "n_layer"), d_model, n_heads, d_ff),
        **biases(bias, bias, bias),
        **_LAYER_NORM,
        "n_kv_heads": 1 if one_head else n_kv,
        "max_positions": c.size("max_position_embeddings", default=2048),
        "positions": "alibi" if alibi else "rotary",
        "rope_theta": c.rope_theta(10000.0),
        "norm_eps": c.number("layer_norm_epsilon", default=1e-5),
        "activation": c.activation("activation", default="gelu"),
        "gated_mlp": False,
        "parallel_residual": parallel,
        "shared_norm": parallel and n_norms != 2,
        "tied_embeddings": c.flag("tie_word_embeddings", default=True),
    }


def _refined_web(c: Config) -> Shape:
    return _falcon(Config({**c.data, "new_decoder_architecture": True}, c.model_type))


PARALLEL_FAMILIES: dict[str, Family] = {
    "codegen": Family("CodeGen", _gptj),
    "cohere": Family("Cohere", _cohere, ignored=("use_qk_norm",)),
    "cohere2": Family("Cohere2", _cohere2, ignored=("use_qk_norm",)),
    "falcon": Family("Falcon", _falcon),
    "gptj": Family("GPTJ", _gptj),
    "phi": Family("Phi", _phi, ignored=("qk_layernorm",)),
    "RefinedWeb": Family("RW", _refined_web),
    "RefinedWebModel": Family("RW", _falcon),
    "stablelm": Family("StableLm", _stablelm, ignored=("qk_layernorm",)),
}
"""Accepted values of ``model_type``."""
