"""Why a family is refused: one honest reason per kind of model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from estimator.job.fields import nearest, shown

KINDS = {
    "is a mixture of experts": """grok-1 arctic ernie4_5_moe minimax hunyuan_v1_moe exaone_moe jetmoe flex_olmo""",
    "is an encoder-decoder": """umt5 longt5 t5gemma pegasus marian m2m_100 blenderbot fsmt led prophetnet whisper
        switch_transformers plbart""",
    "is an encoder without a causal decoder": """electra mpnet esm ernie big_bird data2vec-text megatron-bert rembert
        xlm-roberta-xl roformer xmod""",
    "shares the parameters of its layers": "albert",
    "adds relative positions to queries and keys in attention": "deberta deberta-v2",
    "is an encoder with rotary positions": "modernbert nomic_bert eurobert",
    "has a vision tower": """deit swin swinv2 beit convnext resnet clip siglip dinov2 dinov3_vit detr sam segformer
        mllama qwen3_vl qwen3_vl_moe idefics idefics2 idefics3 smolvlm blip blip-2 pixtral internvl llava_onevision
        gemma3n gemma4 phi4_multimodal""",
    "has state-space or recurrent layers": """mamba mamba2 falcon_mamba rwkv recurrent_gemma xlstm jamba bamba zamba
        zamba2 nemotron_h falcon_h1 lfm2 granitemoehybrid""",
    "has layers of linear attention": "qwen3_next qwen3_5_text qwen3_5_moe_text kimi_linear olmo_hybrid bailing_hybrid",
    "has each layer's own embeddings": "gemma3n_text gemma4_text",
    "has fixed sinusoids for positions": "xglm ctrl",
    "normalises queries and keys with biases": "persimmon",
    "has an activation with parameters of its own": "apertus",
    "gates a squared ReLU": "bitnet",
}
"""Reason by the values of ``model_type`` for which it holds."""

REASONS = {model_type: reason for reason, names in KINDS.items() for model_type in names.split()}


def _reason(model_type: str, data: Mapping[str, Any]) -> str | None:
    """The reason by name, else by the keys that give a model of this kind away."""
    key = next((k for k in data if ("expert" in k or "moe" in k.split("_")) and _above_zero(data[k])), None)
    named = REASONS.get(model_type.lower())
    if named == "is a mixture of experts" or (named is None and key):
        count = next(
            (
                data[k]
                for k in data
                if k.endswith(("num_experts", "local_experts", "routed_experts")) and _above_zero(data[k])
            ),
            None,
        )
        return "is a mixture of experts" + (f" ({count} experts)" if count else "")
    if named:
        return named
    if data.get("is_encoder_decoder") is True:
        return "is an encoder-decoder"
    if data.get("vision_config") or "image_size" in data:
        return "has a vision tower"
    named_class = str(data.get("architectures", ""))
    if "ForMaskedLM" in named_class or "type_vocab_size" in data:
        return "is an encoder without a causal decoder"
    return None


def _above_zero(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6


def refusal_of(model_type: str, data: Mapping[str, Any], accepted: Iterable[str]) -> str:
    """One sentence that says why ``model_type`` is refused and what is accepted."""
    reason = _reason(model_type, data)
    names = sorted(accepted)
    why = f"which {reason} and is not forecast yet" if reason else "which is not known here"
    hint = "" if reason else nearest(model_type, names)
    return f"config.model_type is {shown(model_type)}, {why}; allowed: {', '.join(names)}{hint}"
