"""Readers of Hugging Face families whose code came with their weights (``trust_remote_code``): most are Llama under other names.

Read as that code builds them; transformers has no class of these names to check against, so their tests hold published counts.
"""

from __future__ import annotations

from typing import Any

from estimator.errors import InputError
from estimator.job.fields import refuse
from estimator.job.hf_config import Config
from estimator.job.hf_families import Family, Shape, biases, rotary


def _plain(c: Config) -> Shape:
    """Llama without any bias."""
    return rotary(c)


def _baichuan(c: Config) -> Shape:
    """The 7B models have rotary positions; those of 40 layers (13B) ALiBi. ``model_max_length`` is their longest sequence."""
    length = c.size("model_max_length", "max_position_embeddings", default=4096)
    shape = rotary(Config({"max_position_embeddings": length, **c.data}, c.model_type))
    return {**shape, "positions": "alibi"} if "max_position_embeddings" not in c.data else shape


def _internlm(c: Config) -> Shape:
    bias = c.flag("bias", default=True)
    return {**rotary(c), **biases(bias, bias, False)}


def _internlm2(c: Config) -> Shape:
    bias = c.flag("bias", default=False)
    return {**rotary(c), **biases(bias, bias, False)}


def _qwen(c: Config) -> Shape:
    """The first Qwen: ``intermediate_size`` is that of gate and other projection together."""
    d_ff = c.size("intermediate_size")
    if d_ff % 2:
        raise refuse(
            "config.intermediate_size", d_ff, "an even number, of which gate and other projection have half each"
        )
    if not c.flag("no_bias", default=True):
        raise InputError("config.no_bias is False, which is not forecast for Qwen yet; allowed: true")
    length = c.size("max_position_embeddings", "seq_length", "n_positions", default=8192)
    keys: dict[str, Any] = {
        **c.data,
        "intermediate_size": d_ff // 2,
        "max_position_embeddings": length,
        "rms_norm_eps": c.number("layer_norm_epsilon", default=1e-6),
        "num_key_value_heads": None,
    }
    d_model, width = c.size("hidden_size"), c.size("num_attention_heads") * c.size("kv_channels", default=128)
    if width != d_model:
        raise refuse("config.kv_channels", c.data.get("kv_channels"), f"hidden_size / num_attention_heads of {d_model}")
    return {**rotary(Config(keys, c.model_type)), **biases(True, False, False)}


def _chatglm(c: Config) -> Shape:
    """ChatGLM2, ChatGLM3 and GLM-4: key-value heads are ``multi_query_group_num``, half of a head is rotated."""
    if "num_layers" not in c.data or "ffn_hidden_size" not in c.data:
        raise InputError("config has no 'ffn_hidden_size' and 'num_layers': the first ChatGLM is not forecast yet")
    if not c.flag("rmsnorm", default=True) or c.flag("apply_residual_connection_post_layernorm", default=False):
        raise InputError(
            "config.rmsnorm or apply_residual_connection_post_layernorm is not GLM's own, which is not forecast yet"
        )
    bias = c.flag("add_bias_linear", default=False)
    n_heads = c.size("num_attention_heads")
    keys: dict[str, Any] = {
        "hidden_size": c.size("hidden_size"),
        "num_attention_heads": n_heads,
        "num_hidden_layers": c.layers("num_layers"),
        "num_key_value_heads": c.size("multi_query_group_num", default=1) if c.flag("multi_query_attention", default=False) else n_heads,
        "head_dim": c.size("kv_channels", default=128),
        "intermediate_size": c.size("ffn_hidden_size"),
        "vocab_size": c.size("padded_vocab_size", "vocab_size"),
        "max_position_embeddings": c.size("seq_length", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", default=False),
        "rms_norm_eps": c.number("layernorm_epsilon", default=1e-5),
    }  # fmt: skip
    shape = rotary(Config(keys, c.model_type), fraction=0.5)
    return {**shape, **biases(bias or c.flag("add_qkv_bias", default=False), bias, bias)}


def _minicpm(c: Config) -> Shape:
    return rotary(c, tied=True)


def _exaone(c: Config) -> Shape:
    keys = {**c.data, "num_hidden_layers": c.layers("num_layers", "num_hidden_layers"), "hidden_act": c.data.get("activation_function", "silu"),
            "rms_norm_eps": c.number("layer_norm_epsilon", default=1e-5)}  # fmt: skip
    return rotary(Config(keys, c.model_type))


def _orion(c: Config) -> Shape:
    norms = {"norm": "layernorm", "norm_bias": True, "norm_eps": c.number("rms_norm_eps", default=1e-5)}
    return {**rotary(c), **norms}


_GLM_HEADS = ("Model", "ForConditionalGeneration", "ForCausalLM")

REMOTE_FAMILIES: dict[str, Family] = {
    "aquila": Family("Aquila", _plain),
    "baichuan": Family("Baichuan", _baichuan),
    "chatglm": Family("ChatGLM", _chatglm, heads=_GLM_HEADS),
    "exaone": Family("Exaone", _exaone),
    "internlm": Family("InternLM", _internlm),
    "internlm2": Family("InternLM2", _internlm2),
    "minicpm": Family("MiniCPM", _minicpm),
    "orion": Family("Orion", _orion),
    "qwen": Family("QWen", _qwen),
    "xverse": Family("Xverse", _plain),
    "Yi": Family("Yi", _plain),
}
"""Accepted values of ``model_type``."""
