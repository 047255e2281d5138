"""Why a family is refused: one honest reason per kind of model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from estimator.job.fields import nearest, shown

KINDS = {
    "is a mixture of experts": """qwen3_next olmoe dbrx phimoe granitemoe llama4 llama4_text grok-1 arctic ernie4_5_moe glm4_moe
        minimax""",
    "is an encoder-decoder": """mt5 umt5 longt5 t5gemma mbart pegasus marian m2m_100 blenderbot fsmt led
        prophetnet whisper switch_transformers""",
    "is an encoder without a causal decoder": """albert electra deberta deberta-v2 xlm-roberta
        modernbert mpnet esm camembert ernie""",
    "has a vision tower": """deit swin swinv2 beit convnext resnet clip siglip dinov2 dinov3_vit detr sam segformer
        mllama llava llava_next paligemma gemma3 qwen2_vl qwen2_5_vl qwen3_vl idefics idefics2 idefics3 smolvlm blip
        blip-2 mistral3 pixtral internvl""",
    "has state-space or recurrent layers": """mamba mamba2 falcon_mamba rwkv recurrent_gemma xlstm jamba bamba zamba
        zamba2 nemotron_h falcon_h1 lfm2""",
    "feeds attention and MLP from one shared norm": "gptj codegen phi cohere cohere2",
    "feeds attention and MLP from one shared norm or from two parallel ones": "falcon",
    "alternates full and windowed attention starting with a full layer": "gpt_neo",
    "has norms without weights": "olmo",
    "has norms after attention and MLP only": "olmo2 olmo3 exaone4",
    "uses a squared ReLU": "nemotron arcee bitnet",
    "leaves out rotary positions in every fourth layer": "smollm3",
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
