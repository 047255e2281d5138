"""Readers of the Hugging Face families of decoders with norms, positions or activations of a kind of their own.

Defaults are transformers' class defaults (5.23) as in ``hf_families``.
"""

from __future__ import annotations

from typing import Any

from estimator.errors import InputError
from estimator.job.fields import refuse, shown
from estimator.job.hf_config import Config
from estimator.job.hf_families import Family, Shape, biases, gpt_line, rotary


def _gpt_neo(c: Config) -> Shape:
    """Full and windowed attention in turn, a full layer first; queries, keys and values without biases."""
    d_model = c.size("hidden_size")
    n_heads, _ = c.heads(d_model, "num_heads", "num_attention_heads")
    n_layers, rows = c.layers("num_layers", "num_hidden_layers"), c.size("max_position_embeddings")
    return {
        **gpt_line(c, n_layers, d_model, n_heads, c.size("intermediate_size", default=4 * d_model)),
        **biases(False, True, True),
        **_neo_windows(c, n_layers),
        **_learned(rows),
        "activation": c.activation("activation_function", default="gelu_tanh"),
    }


def _learned(rows: int) -> Shape:
    return {"max_positions": rows, "positions": "learned", "position_rows": rows}


def _neo_windows(c: Config, n_layers: int) -> Shape:
    kinds = c.data.get("attention_layers")
    types = c.data.get("attention_types", [[["global", "local"], 12]])
    if kinds is None:
        try:
            kinds = [kind for block, times in types for _ in range(times) for kind in block]
        except (TypeError, ValueError):
            raise refuse("config.attention_types", types, "pairs of a list of kinds and a number") from None
    window = c.size("window_size", default=256)
    if kinds == ["global"] * n_layers:
        return {}
    if kinds != [("global", "local")[layer % 2] for layer in range(n_layers)]:
        raise InputError(
            f"config.attention_types is {shown(types)}; allowed for {n_layers} layers: 'global' and 'local' in turn, or 'global' alone"
        )
    return {"sliding_window": window, "global_every": 2, "global_first": True}


def _gpt1(c: Config) -> Shape:
    """The first GPT: norms after the residual."""
    d_model = c.size("n_embd", "hidden_size")
    n_heads, _ = c.heads(d_model, "n_head", "num_attention_heads")
    rows = c.size("n_positions", "max_position_embeddings")
    name = c.data.get("afn", "gelu")
    if name not in ("gelu", "gelu_new", "relu", "silu", "swish"):
        raise refuse("config.afn", name, "gelu, relu, silu, swish")
    return {
        **gpt_line(c, c.layers("n_layer", "num_hidden_layers"), d_model, n_heads, 4 * d_model),
        **_learned(rows),
        "activation": {"gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}.get(name, name),
        "pre_norm": False,
        "final_norm": False,
    }


def _olmo(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    clip = c.number("clip_qkv", default=0.0) > 0
    norms = {"norm": "layernorm", "norm_weight": False, "norm_eps": 1e-5}
    return {**rotary(c), **biases(bias, bias, False), **norms, "clips_qkv": clip}


def _olmo2(c: Config) -> Shape:
    bias = c.flag("attention_bias", default=False)
    return {
        **rotary(c),
        **biases(bias, bias, False),
        "norm_eps": c.number("rms_norm_eps", default=1e-5),
        "pre_norm": False,
        "sandwich_norms": True,
        "qk_norm": True,
        "qk_norms": "all",
    }


def _olmo3(c: Config) -> Shape:
    shape = _olmo2(c)
    window, every = c.window(shape["n_layers"], default=4096, every=4)
    return {**shape, "sliding_window": window, "global_every": every}


def _exaone4(c: Config) -> Shape:
    """Where layers have windows the others do not rotate."""
    shape = rotary(c, kv_heads=True)
    pattern = c.data.get("sliding_window_pattern", 4)
    every = pattern.find("G") + 1 if isinstance(pattern, str) else pattern
    if type(every) is not int or every < 0 or (isinstance(pattern, str) and pattern != "L" * (every - 1) + "G"):
        raise refuse("config.sliding_window_pattern", pattern, "a whole number, or a text such as 'LLLG'")
    window, every = c.window(shape["n_layers"], default=4096, every=every)
    return {
        **shape,
        "norm_eps": c.number("rms_norm_eps", default=1e-5),
        "pre_norm": False,
        "sandwich_norms": True,
        "qk_norm": True,
        "sliding_window": window,
        "global_every": every,
        "unrotated_every": every if window else 0,
    }


def _nemotron(c: Config) -> Shape:
    bias, mlp_bias = c.flag("attention_bias", default=False), c.flag("mlp_bias", default=False)
    return {
        **_squared_relu(c, fraction=0.5),
        **biases(bias, bias, mlp_bias),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": c.number("norm_eps", default=1e-5),
    }


def _arcee(c: Config) -> Shape:
    bias, mlp_bias = c.flag("attention_bias", default=False), c.flag("mlp_bias", default=False)
    return {**_squared_relu(c), **biases(bias, bias, mlp_bias), "norm_eps": c.number("rms_norm_eps", default=1e-5)}


def _squared_relu(c: Config, fraction: float = 1.0) -> Shape:
    name = c.data.get("hidden_act", "relu2")
    plain = Config({**c.data, "hidden_act": "relu" if name == "relu2" else name}, c.model_type)
    shape = rotary(plain, fraction=fraction)
    return {**shape, "gated_mlp": False, "activation": "relu2" if name == "relu2" else shape["activation"]}


def _smollm3(c: Config) -> Shape:
    bias, mlp_bias = c.flag("attention_bias", default=False), c.flag("mlp_bias", default=False)
    shape = rotary(c, tied=True, theta=2000000.0)
    windowed = c.flag("use_sliding_window", default=False)
    window, every = c.window(shape["n_layers"]) if windowed else (0, 0)
    return {
        **shape,
        **biases(bias, bias, mlp_bias),
        "sliding_window": window,
        "global_every": every,
        "unrotated_every": unrotated_every(c, shape["n_layers"]),
    }


def unrotated_every(c: Config, n_layers: int) -> int:
    """``ModelSpec.unrotated_every`` from ``no_rope_layers`` (where 1 means that a layer does rotate) or the interval between them."""
    every = c.size("no_rope_layer_interval", default=4)
    flags: Any = c.data.get("no_rope_layers") or None
    if flags is None or flags == [int((layer + 1) % every != 0) for layer in range(n_layers)]:
        return every
    if flags == [1] * n_layers:
        return 0
    raise refuse("config.no_rope_layers", flags, f"{n_layers} ones, of which every {every}-th may be 0")


def _helium(c: Config) -> Shape:
    """Attention's output projection has no bias."""
    bias, mlp_bias = c.flag("attention_bias", default=False), c.flag("mlp_bias", default=False)
    shape = rotary(c, kv_heads=True, head_dim=128)
    if shape["head_dim"] * shape["n_heads"] != shape["d_model"]:
        raise refuse(
            "config.head_dim", shape["head_dim"], "hidden_size / num_attention_heads, which Helium's output needs"
        )
    return {**shape, **biases(bias, False, mlp_bias)}


def _internlm3(c: Config) -> Shape:
    qkv, rest = c.flag("qkv_bias", default=False), c.flag("bias", default=False)
    return {**rotary(c, kv_heads=True, head_dim=None), **biases(qkv, rest, rest)}


def _ministral3(c: Config) -> Shape:
    shape = rotary(c, kv_heads=True, head_dim=128)
    return {
        **shape,
        "norm_eps": c.number("rms_norm_eps", default=1e-5),
        "sliding_window": c.window(shape["n_layers"])[0],
    }


NORM_FAMILIES: dict[str, Family] = {
    "arcee": Family("Arcee", _arcee),
    "exaone4": Family("Exaone4", _exaone4),
    "gpt_neo": Family("GPTNeo", _gpt_neo),
    "helium": Family("Helium", _helium),
    "internlm3": Family("InternLM3", _internlm3),
    "ministral3": Family("Ministral3", _ministral3),
    "nemotron": Family("Nemotron", _nemotron),
    "olmo": Family("Olmo", _olmo),
    "olmo2": Family("Olmo2", _olmo2),
    "olmo3": Family("Olmo3", _olmo3),
    "openai-gpt": Family("OpenAIGPT", _gpt1),
    "smollm3": Family("SmolLM3", _smollm3),
}
"""Accepted values of ``model_type``."""
