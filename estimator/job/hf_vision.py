"""Readers of the Hugging Face families of image-text models: a decoder of another family, a vision tower and a projector.

Their nested configs leave out what their classes default to (transformers 5.23), which is therefore filled in here, unlike at the top
of a file. Every tower is a list of its tensors: it is held, images are not forecast (``estimator.job.tower``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from estimator.errors import InputError
from estimator.job.fields import refuse, shown, table
from estimator.job.hf_config import Config
from estimator.job.hf_families import FAMILIES, Family, Shape
from estimator.job.hf_routed import ROUTED_FAMILIES
from estimator.job.tower import HeldParam, Tower

Held = tuple[HeldParam, ...]

_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
TEXTS: dict[str, tuple[Family, dict[str, Any]]] = {
    "gemma": (FAMILIES["gemma"], {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 24576, "vocab_size": 256000, "max_position_embeddings": 8192,
    }),
    "gemma2": (FAMILIES["gemma2"], {
        "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 9216, "vocab_size": 256000, "max_position_embeddings": 8192,
    }),
    "gemma3_text": (FAMILIES["gemma3_text"], {
        "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 9216, "vocab_size": 262208, "max_position_embeddings": 131072,
    }),
    "llama": (FAMILIES["llama"], {**_LLAMA, "intermediate_size": 11008, "max_position_embeddings": 2048}),
    "llama4_text": (ROUTED_FAMILIES["llama4_text"], {
        "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 202048, "max_position_embeddings": 131072,
    }),
    "mistral": (FAMILIES["mistral"], {
        **_LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
    }),
    "qwen2": (FAMILIES["qwen2"], {
        **_LLAMA, "num_key_value_heads": 32, "intermediate_size": 22016, "vocab_size": 151936,
        "max_position_embeddings": 32768,
    }),
}  # fmt: skip
"""Decoders of image-text models by nested ``model_type``: their reader, and their class's sizes."""


def _text(c: Config, usual: str, tied: bool | None = None) -> Shape:
    """Fields of the decoder in ``text_config``, whose ``model_type`` is ``usual`` where it has none. ``tied``: what the whole model's
    class takes for ``tie_word_embeddings`` where its top does not say; ``None``: what the decoder says."""
    nested = c.section("text_config")
    kind = nested.get("model_type", usual)
    if not isinstance(kind, str) or kind not in TEXTS:
        raise refuse("config.text_config.model_type", kind, ", ".join(sorted(TEXTS)))
    family, defaults = TEXTS[kind]
    inside, top = nested.get("tie_word_embeddings"), c.data.get("tie_word_embeddings", tied)
    if None not in (inside, top) and inside != top:
        raise InputError(
            f"config.text_config.tie_word_embeddings is {shown(inside)} but that of the whole model is {shown(top)}; allowed: the same"
        )
    keys = {**defaults, **nested, **({} if top is None else {"tie_word_embeddings": top})}
    inner = Config(keys, kind, ignored=family.ignored)
    try:
        inner.refuse_extras()
        return family.read(inner)
    except InputError as error:
        raise InputError(f"in config.text_config: {error}") from None


def _vision(c: Config, kinds: tuple[str, ...], defaults: dict[str, Any]) -> Config:
    """``vision_config`` with its class's ``defaults``."""
    nested = table("config.vision_config", c.data.get("vision_config") or {})
    kind = nested.get("model_type", kinds[0])
    if kind not in kinds:
        raise refuse("config.vision_config.model_type", kind, ", ".join(kinds))
    return Config({**defaults, **nested}, kind)


# ---- tensors ------------------------------------------------------------------------------------------------------


def _linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Held:
    return (HeldParam(f"{name}.weight", (n_out, n_in)), *((HeldParam(f"{name}.bias", (n_out,)),) if bias else ()))


def _norm(name: str, width: int, bias: bool = True) -> Held:
    return (HeldParam(f"{name}.weight", (width,)), *((HeldParam(f"{name}.bias", (width,)),) if bias else ()))


def _layer(d: int, d_ff: int, *, bias: bool = True, rms: bool = False, gated: bool = False) -> Held:
    """Of a block with two norms, attention as wide as it, and an MLP."""
    attention = tuple(p for x in ("q", "k", "v", "out") for p in _linear(f"attn.{x}", d, d, bias))
    gate = _linear("mlp.gate", d, d_ff, bias) if gated else ()
    mlp = (*gate, *_linear("mlp.up", d, d_ff, bias), *_linear("mlp.down", d_ff, d, bias))
    return (*_norm("norm1", d, not rms), *attention, *_norm("norm2", d, not rms), *mlp)


def _patches(v: Config, d: int, *, bias: bool, frames: int = 1, channels: str = "num_channels") -> Held:
    size = v.size("patch_size")
    shape = (d, v.size(channels, default=3), *((frames,) if frames > 1 else ()), size, size)
    return (HeldParam("patches.weight", shape), *((HeldParam("patches.bias", (d,)),) if bias else ()))


def _places(v: Config, d: int, extra: int = 0) -> Held:
    return (HeldParam("positions.weight", ((v.size("image_size") // v.size("patch_size")) ** 2 + extra, d)),)


def _siglip(v: Config) -> tuple[int, int, Held, Held]:
    d, d_ff = v.size("hidden_size"), v.size("intermediate_size")
    ends = (*_patches(v, d, bias=True), *_places(v, d), *_norm("post_norm", d))
    if v.flag("vision_use_head", default=True):  # attention that pools, and an MLP
        pool = (*_linear("head.in", d, 3 * d), *_linear("head.out", d, d), *_norm("head.norm", d))
        ends += (
            HeldParam("head.probe", (1, 1, d)),
            *pool,
            *_linear("head.up", d, d_ff),
            *_linear("head.down", d_ff, d),
        )
    return d, v.layers("num_hidden_layers"), _layer(d, d_ff), ends


_SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}


def _clip(v: Config) -> tuple[int, int, Held, Held]:
    d = v.size("hidden_size")
    ends = (HeldParam("class", (d,)), *_patches(v, d, bias=False), *_places(v, d, 1), *_norm("pre_norm", d))
    layer = _layer(d, v.size("intermediate_size"))
    return d, v.layers("num_hidden_layers"), layer, (*ends, *_norm("post_norm", d))


_CLIP = {**_SIGLIP, "patch_size": 32}


def _pixtral(v: Config) -> tuple[int, int, Held, Held]:
    d = v.size("hidden_size")
    layer = _layer(d, v.size("intermediate_size"), bias=False, rms=True, gated=True)
    return d, v.layers("num_hidden_layers"), layer, (*_patches(v, d, bias=False), *_norm("pre_norm", d, False))


_PIXTRAL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 1024,
    "patch_size": 16,
}

_TOWERS: dict[str, tuple[Callable[[Config], tuple[int, int, Held, Held]], dict[str, Any]]] = {
    "siglip_vision_model": (_siglip, _SIGLIP),
    "clip_vision_model": (_clip, _CLIP),
    "pixtral": (_pixtral, _PIXTRAL),
}
"""Towers by ``model_type``: what gives their width, layers, one layer's tensors and the others', and their class's sizes."""


def _tower(c: Config, kinds: tuple[str, ...], fill: dict[str, Any]) -> tuple[int, int, Held, Held]:
    kind = _vision(c, kinds, {}).model_type
    read, defaults = _TOWERS[kind]
    return read(_vision(c, kinds, {**defaults, **fill}))


def _features(c: Config) -> int:
    """Layers of the tower whose results are put side by side."""
    layers = c.data.get("vision_feature_layer")
    return len(layers) if isinstance(layers, list) and layers else 1


def _two_layers(c: Config, d: int, d_model: int, bias: bool) -> Held:
    return (*_linear("project.1", d * _features(c), d_model, bias), *_linear("project.2", d_model, d_model, bias))


# ---- families -----------------------------------------------------------------------------------------------------


def _with(text: Shape, kind: str, n_layers: int, layer: Held, others: Held) -> Shape:
    return {**text, "tower": Tower(kind=kind, n_layers=n_layers, layer=layer, others=others)}


def _gemma3(c: Config) -> Shape:
    text = _text(c, "gemma3_text", tied=True)
    d, n_layers, layer, ends = _tower(c, ("siglip_vision_model",), {})
    ends += (HeldParam("project.weight", (d, text["d_model"])), *_norm("project.norm", d, False))
    return _with(text, "siglip", n_layers, layer, ends)


def _paligemma(c: Config) -> Shape:
    text = _text(c, "gemma", tied=True)
    d, n_layers, layer, ends = _tower(c, ("siglip_vision_model",), {})
    return _with(text, "siglip", n_layers, layer, (*ends, *_linear("project", d, text["d_model"])))


_LLAVA_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}


def _llava(c: Config, tied: bool | None = None) -> Shape:
    text = _text(c, "llama", tied)
    whole = {} if c.data.get("vision_config") else _LLAVA_CLIP
    d, n_layers, layer, ends = _tower(c, ("clip_vision_model", "siglip_vision_model", "pixtral"), whole)
    ends += _two_layers(c, d, text["d_model"], c.flag("multimodal_projector_bias", default=True))
    return _with(text, "llava", n_layers, layer, ends)


def _llava_next(c: Config) -> Shape:
    shape = _llava(c, tied=False)
    tower = shape["tower"]
    newline = HeldParam("newline", (shape["d_model"],))
    return _with(shape, tower.kind, tower.n_layers, tower.layer, (*tower.others, newline))


def _mistral3(c: Config) -> Shape:
    text = _text(c, "mistral")
    d, n_layers, layer, ends = _tower(c, ("pixtral",), {"image_size": 1540, "patch_size": 14})
    merged = d * c.size("spatial_merge_size", default=2) ** 2
    ends += (*_norm("project.norm", d, False), *_linear("project.merge", merged, d, False))
    ends += _two_layers(c, d, text["d_model"], c.flag("multimodal_projector_bias", default=False))
    return _with(text, "pixtral", n_layers, layer, ends)


def _qwen_text(c: Config) -> Shape:
    """The decoder's keys stand at the top of the file, or nested."""
    rest = {key: value for key, value in c.data.items() if key not in ("vision_config", "text_config", "model_type")}
    nested = c.section("text_config")
    keys = {**rest, **nested, "model_type": "qwen2"}
    return _text(
        Config({"text_config": keys, "tie_word_embeddings": c.data.get("tie_word_embeddings")}, c.model_type), "qwen2"
    )


def _qwen2_vl(c: Config) -> Shape:
    text = _qwen_text(c)
    v = Config(
        {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "patch_size": 14, **c.section("vision_config")}, "qwen2_vl"
    )  # fmt: skip
    d, merge = v.size("embed_dim"), v.size("spatial_merge_size", default=2) ** 2
    return _qwen_tower(
        v, text, _layer(d, int(d * v.number("mlp_ratio", default=4))), (d, d * merge, v.size("hidden_size"))
    )


def _qwen2_5_vl(c: Config) -> Shape:
    text = _qwen_text(c)
    sizes = {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14}
    v = Config({**sizes, **c.section("vision_config")}, "qwen2_5_vl")
    d, merge = v.size("hidden_size"), v.size("spatial_merge_size", default=2) ** 2
    layer = _layer(d, v.size("intermediate_size"), rms=True, gated=True)
    return _qwen_tower(v, text, layer, (d, d * merge, v.size("out_hidden_size")), rms=True)


def _qwen_tower(v: Config, text: Shape, layer: Held, widths: tuple[int, int, int], *, rms: bool = False) -> Shape:
    """``widths``: of the tower, of merged patches, of what the projector makes."""
    d, merged, out = widths
    frames = v.size("temporal_patch_size", default=2)
    ends = (*_patches(v, d, bias=False, frames=frames, channels="in_channels"), *_norm("project.norm", d, not rms))
    ends += (*_linear("project.1", merged, merged), *_linear("project.2", merged, out))
    return _with(text, v.model_type, v.layers("depth"), layer, ends)


_LLAMA4_VISION = {"hidden_size": 768, "intermediate_size": 5632, "num_hidden_layers": 34, "image_size": 448, "patch_size": 14,
                  "vision_output_dim": 7680, "projector_input_dim": 4096, "projector_output_dim": 4096}  # fmt: skip


def _llama4(c: Config) -> Shape:
    text = _text(c, "llama4_text")
    if text["tied_embeddings"] != bool(c.section("text_config").get("tie_word_embeddings", False)):
        raise InputError(
            "config.tie_word_embeddings is true, of which Llama 4 takes what its text_config says; allowed: the same there"
        )
    v = _vision(c, ("llama4_vision_model",), _LLAMA4_VISION)
    d, d_ff = v.size("hidden_size"), v.size("intermediate_size")
    patch = v.size("patch_size") ** 2 * v.size("num_channels", default=3)
    narrow, out = v.size("projector_input_dim"), v.size("projector_output_dim")
    ends = (*_linear("patches", patch, d, False), HeldParam("class", (d,)), *_places(v, d, 1))
    ends += (*_norm("pre_norm", d), *_norm("post_norm", d))
    ends += (*_linear("adapter.1", d_ff, narrow, False), *_linear("adapter.2", out, out, False))
    ends += _linear("project", v.size("vision_output_dim"), text["d_model"], False)
    return _with(text, "llama4", v.layers("num_hidden_layers"), _layer(d, d_ff), ends)


_HEADS = ("ForConditionalGeneration",)
_NESTED = ("text_config", "vision_config")

VISION_FAMILIES: dict[str, Family] = {
    "gemma3": Family("Gemma3", _gemma3, ignored=_NESTED, heads=_HEADS),
    "llama4": Family("Llama4", _llama4, ignored=_NESTED, heads=_HEADS),
    "llava": Family("Llava", _llava, ignored=_NESTED, heads=_HEADS),
    "llava_next": Family("LlavaNext", _llava_next, ignored=_NESTED, heads=_HEADS),
    "mistral3": Family("Mistral3", _mistral3, ignored=_NESTED, heads=_HEADS),
    "paligemma": Family("PaliGemma", _paligemma, ignored=_NESTED, heads=_HEADS),
    "qwen2_5_vl": Family("Qwen2_5_VL", _qwen2_5_vl, ignored=_NESTED, heads=_HEADS),
    "qwen2_vl": Family("Qwen2VL", _qwen2_vl, ignored=_NESTED, heads=_HEADS),
}
"""Accepted values of ``model_type``."""
