"""Hugging Face families with an encoder: BERT, RoBERTa, DistilBERT on masked tokens; ViT on images; T5 and BART with a decoder.

T5 is read as its files say, not as transformers 5.23 builds it: ``tie_word_embeddings`` false (T5 v1.1) means a head of its own,
with which published counts agree; that version of transformers ties it nevertheless.
"""

from __future__ import annotations

from estimator.errors import InputError
from estimator.job.encoder import Encoder
from estimator.job.fields import refuse, shown, whole
from estimator.job.hf_config import ACTIVATIONS, MAX_SIZE, Config
from estimator.job.hf_families import Family, Shape, biases, plain_sizes
from estimator.job.patches import Patches


def _post_norm(c: Config, n_layers: int, d_model: int, n_heads: int, *, d_ff: int, activation: str) -> Shape:
    """LayerNorm after attention, MLP and embedding, biases everywhere, a tied head."""
    if not c.flag("tie_word_embeddings", default=True):
        raise InputError(
            f"config.tie_word_embeddings is False with model_type {c.model_type!r}, which is not forecast yet; allowed: true"
        )
    return {
        **plain_sizes(c, n_layers, d_model, n_heads, d_ff),
        "positions": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "activation": activation,
        "gated_mlp": False,
        "embedding_norm": True,
        "final_norm": False,
        "pre_norm": False,
        "tied_embeddings": True,
        **biases(True, True, True),
    }


def _bert(c: Config) -> Shape:
    if c.flag("is_decoder", default=False):
        raise InputError("config.is_decoder is True; BERT as a decoder is not forecast yet, allowed: false")
    kind = c.data.get("position_embedding_type")
    if kind not in (None, "absolute"):
        raise refuse("config.position_embedding_type", kind, "'absolute'")
    d_model = c.size("hidden_size")
    n_heads, _ = c.heads(d_model, "num_attention_heads")
    rows = c.size("max_position_embeddings")
    activation = c.activation("hidden_act", default="gelu")
    return {
        **_post_norm(
            c, c.layers("num_hidden_layers"), d_model, n_heads, d_ff=c.size("intermediate_size"), activation=activation
        ),
        "max_positions": rows,
        "position_rows": rows,
        "norm_eps": c.number("layer_norm_eps", default=1e-12),
        "head_bias": True,
        "encoder": Encoder(token_types=c.size("type_vocab_size", default=2)),
    }


def _roberta(c: Config) -> Shape:
    shape = _bert(c)
    first = c.size("pad_token_id", default=1, minimum=0) + 1  # positions are counted from behind the padding token
    if shape["position_rows"] <= first:
        raise refuse("config.max_position_embeddings", shape["position_rows"], f"more than pad_token_id + 1 = {first}")
    return {**shape, "max_positions": shape["position_rows"] - first}


def _distilbert(c: Config) -> Shape:
    """Fixed sinusoids are a table of the same size that is not trained; published models train theirs."""
    if c.flag("sinusoidal_pos_embds", default=False):
        raise InputError("config.sinusoidal_pos_embds is True; tables that are not trained are not forecast yet")
    d_model = c.size("dim", "hidden_size")
    n_heads, _ = c.heads(d_model, "n_heads", "num_attention_heads")
    rows = c.size("max_position_embeddings")
    n_layers = c.layers("n_layers", "num_hidden_layers")
    activation = c.activation("activation", default="gelu")
    return {
        **_post_norm(c, n_layers, d_model, n_heads, d_ff=c.size("hidden_dim"), activation=activation),
        "max_positions": rows,
        "position_rows": rows,
        "norm_eps": 1e-12,
        "head_bias": True,
        "encoder": Encoder(),
    }


def _bart(c: Config) -> Shape:
    if c.flag("scale_embedding", default=False):
        raise InputError("config.scale_embedding is True, which is not forecast for BART yet; allowed: false")
    return _bart_sizes(c)


def _mbart(c: Config) -> Shape:
    """Norms before attention and MLP, and at the end of both stacks. Its embedding may be scaled, which keeps nothing."""
    return {**_bart_sizes(c), "pre_norm": True, "final_norm": True}


def _bart_sizes(c: Config) -> Shape:
    for ours, theirs in (
        ("decoder_ffn_dim", "encoder_ffn_dim"),
        ("decoder_attention_heads", "encoder_attention_heads"),
    ):
        if c.size(ours) != c.size(theirs):
            raise refuse(f"config.{ours}", c.data[ours], f"that of {theirs}, {c.data[theirs]}")
    d_model = c.size("d_model", "hidden_size")
    n_heads, _ = c.heads(d_model, "decoder_attention_heads")
    rows = c.size("max_position_embeddings")
    activation, d_ff = c.activation("activation_function", default="gelu"), c.size("decoder_ffn_dim")
    return {
        **_post_norm(c, c.layers("decoder_layers"), d_model, n_heads, d_ff=d_ff, activation=activation),
        "max_positions": rows,
        "position_rows": rows + 2,  # BartLearnedPositionalEmbedding shifts every position by two
        "norm_eps": 1e-5,
        "encoder": Encoder(n_layers=c.layers("encoder_layers")),
    }


def _t5(c: Config, usual: str = "relu", tied: bool = True) -> Shape:
    n_layers, n_heads = c.layers("num_layers", "num_hidden_layers"), c.size("num_heads", "num_attention_heads")
    gated, activation = _t5_mlp(c, usual)
    return {
        "n_layers": c.size("num_decoder_layers", default=n_layers),
        "d_model": c.size("d_model", "hidden_size"),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": c.size("d_kv"),
        "d_ff": c.size("d_ff"),
        "vocab_size": c.size("vocab_size"),
        "max_positions": c.size("n_positions", default=512),  # what T5 was trained on; relative positions have no end
        "positions": "relative",
        "norm": "rmsnorm",
        "norm_eps": c.number("layer_norm_epsilon", default=1e-6),
        "activation": activation,
        "gated_mlp": gated,
        "tied_embeddings": c.flag("tie_word_embeddings", default=tied),
        "encoder": Encoder(
            n_layers=n_layers,
            relative_buckets=c.size("relative_attention_num_buckets", default=32),
            relative_distance=c.size("relative_attention_max_distance", default=128),
        ),
    }


def _t5_mlp(c: Config, usual: str) -> tuple[bool, str]:
    """Whether the MLP is gated, and its activation; ``gated-gelu`` means the tanh approximation."""
    value = c.data.get("feed_forward_proj", usual)
    name = value.removeprefix("gated-") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in ACTIVATIONS:
        names = ", ".join(sorted(ACTIVATIONS))
        raise InputError(
            f"config.feed_forward_proj is {shown(value)}; allowed: one of {names}, with or without 'gated-' before it"
        )
    gated = value != name
    if c.flag("is_gated_act", default=gated) != gated:
        raise InputError(
            f"config.is_gated_act is {not gated} but feed_forward_proj is {shown(value)}; allowed: what that says"
        )
    return gated, "gelu_tanh" if value == "gated-gelu" else ACTIVATIONS[name]


def _mt5(c: Config) -> Shape:
    return _t5(c, "gated-gelu", tied=False)


def _vit(c: Config) -> Shape:
    """An encoder of images with a classifier; ``num_labels`` stands for the names in ``id2label``."""
    d_model, patches = c.size("hidden_size"), _patches(c)
    n_heads, head_dim = c.heads(d_model, "num_attention_heads")
    labels = c.data.get("id2label")
    return {
        "n_layers": c.layers("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": head_dim,
        "d_ff": c.size("intermediate_size"),
        "vocab_size": len(labels) if isinstance(labels, dict) and labels else c.size("num_labels", default=2),
        "max_positions": patches.n_tokens,
        "positions": "learned",
        "position_rows": patches.n_tokens,
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": c.number("layer_norm_eps", default=1e-12),
        "activation": c.activation("hidden_act", default="gelu"),
        "gated_mlp": False,
        "head_bias": True,
        "tied_embeddings": False,
        **biases(c.flag("qkv_bias", default=True), True, True),
        "encoder": Encoder(),
        "patches": patches,
    }


def _patches(c: Config) -> Patches:
    sizes = {}
    for key, usual in (("image_size", 224), ("patch_size", 16)):
        value = c.data.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, list):
            raise refuse(f"config.{key}", c.data[key], "one number, or two equal ones")
        sizes[key] = usual if value is None else whole(f"config.{key}", value, maximum=MAX_SIZE)
    return Patches(**sizes, channels=c.size("num_channels", default=3))


_MASKED = ("ForMaskedLM",)
_GENERATION = ("ForConditionalGeneration", "WithLMHeadModel")

ENCODER_FAMILIES: dict[str, Family] = {
    "bart": Family("Bart", _bart, ignored=("is_encoder_decoder",), heads=_GENERATION),
    "bert": Family("Bert", _bert, heads=_MASKED, head_is_bare=False),
    "camembert": Family("Camembert", _roberta, heads=_MASKED, head_is_bare=False),
    "distilbert": Family("DistilBert", _distilbert, heads=_MASKED, head_is_bare=False),
    "mbart": Family("MBart", _mbart, ignored=("is_encoder_decoder",), heads=_GENERATION),
    "mt5": Family("MT5", _mt5, ignored=("is_encoder_decoder",), heads=_GENERATION),
    "roberta": Family("Roberta", _roberta, heads=_MASKED, head_is_bare=False),
    "xlm-roberta": Family("XLMRoberta", _roberta, heads=_MASKED, head_is_bare=False),
    "vit": Family("ViT", _vit, heads=("ForImageClassification",), head_is_bare=False),
    "t5": Family("T5", _t5, ignored=("is_encoder_decoder",), heads=_GENERATION),
}
"""Accepted values of ``model_type``."""
