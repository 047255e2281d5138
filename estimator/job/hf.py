"""The Hugging Face door: a model's ``config.json`` becomes a ``ModelSpec``, exactly or not at all.

The shape is read as transformers' own modelling code would build it (checked against transformers 5.23), so that the
parameter count is exact. What cannot be described exactly is refused with the reason. Keys that change neither shape
nor cost (dropout, token ids, cache, storage dtype, quantisation of the stored weights) are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.job.fields import read_file, shown, table
from estimator.job.foreign import foreign
from estimator.job.hf_config import Config
from estimator.job.hf_encoders import ENCODER_FAMILIES
from estimator.job.hf_experts import EXPERT_FAMILIES
from estimator.job.hf_families import FAMILIES as DENSE_FAMILIES
from estimator.job.hf_families import Family
from estimator.job.hf_norms import NORM_FAMILIES
from estimator.job.hf_parallel import PARALLEL_FAMILIES
from estimator.job.hf_refusals import refusal_of
from estimator.job.hf_remote import REMOTE_FAMILIES
from estimator.job.hf_routed import ROUTED_FAMILIES
from estimator.job.hf_vision import VISION_FAMILIES
from estimator.job.model import ModelSpec

FAMILIES: dict[str, Family] = {
    **DENSE_FAMILIES, **PARALLEL_FAMILIES, **NORM_FAMILIES, **EXPERT_FAMILIES, **ROUTED_FAMILIES,
    **REMOTE_FAMILIES, **VISION_FAMILIES, **ENCODER_FAMILIES,
}  # fmt: skip
"""Accepted values of ``model_type``."""
_WHOLE = {
    "ForMaskedLM": "encoder with its language-model head",
    "ForConditionalGeneration": "encoder-decoder with its language-model head",
    "ForImageClassification": "encoder with its classifier",
}
"""What a class is, where it is no decoder."""


def load_config(path: str | Path) -> ModelSpec:
    """``ModelSpec`` of the ``config.json`` at ``path``, or in the folder ``path``.

    Raises ``InputError`` when the file cannot be read or its model cannot be forecast exactly.
    """
    try:
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        name = file.resolve().parent.name if file.name == "config.json" else file.stem
    except (OSError, ValueError, TypeError):
        raise InputError(f"config file {shown(path)} cannot be read") from None
    return spec_from_config(read_file(file, "config file"), name=name or None)


def spec_from_config(config: Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """``ModelSpec`` of a parsed ``config.json``; ``name`` is what reports call it (default: its ``model_type``).

    Raises ``InputError`` with one sentence: which family is not accepted and why, or which key is missing or wrong.
    """
    data = table("config", config)
    model_type = _model_type(data)
    family = FAMILIES.get(model_type)
    if family is None:
        raise InputError(refusal_of(model_type, data, FAMILIES))
    reader = Config(data, model_type, ignored=family.ignored)
    reader.refuse_extras()
    shape = family.read(reader)
    _check_architecture(model_type, family, data, tied=shape["tied_embeddings"])
    try:
        return ModelSpec(name=" ".join((name or model_type).split())[:100], family=model_type, **shape)
    except InputError as error:
        raise InputError(f"config of model_type {model_type!r}: {error}") from None


def _model_type(data: Mapping[str, Any]) -> str:
    """``model_type``, or what ``architectures`` says when that key is missing."""
    value = data.get("model_type")
    if isinstance(value, str) and value:
        return value
    if value is None:
        named = _architecture(data)
        for model_type, family in FAMILIES.items():
            if named is not None and _stem(named, family).casefold() == family.prefix.casefold():
                return model_type
        if named is not None:
            raise InputError(refusal_of(named, data, FAMILIES))
        other = foreign(data)
        if other is not None:
            raise InputError(f"config is {other[0]} and has no 'model_type'; allowed: a model's config.json")
        raise InputError(f"config has no 'model_type'; allowed: {', '.join(sorted(FAMILIES))}")
    raise InputError(f"config.model_type is {shown(value)}; allowed: {', '.join(sorted(FAMILIES))}")


def _architecture(data: Mapping[str, Any]) -> str | None:
    """First entry of ``architectures``; ``None`` when there is none."""
    named = data.get("architectures")
    if named is None or named == []:
        return None
    if not isinstance(named, list) or not all(isinstance(item, str) for item in named):
        raise InputError(f"config.architectures is {shown(named)}; allowed: a list of class names")
    return str(named[0])


def _stem(named: str, family: Family) -> str:
    """The class name ``named`` without the head that ``family`` has."""
    return next((named.removesuffix(head) for head in family.heads if named.endswith(head)), named)


def _check_architecture(model_type: str, family: Family, data: Mapping[str, Any], tied: bool) -> None:
    """Refuses a class whose head is not the one that is trained, or one of another family."""
    named = _architecture(data)
    if named is None:
        return
    stem, prefix = _stem(named, family), family.prefix
    if stem.casefold() == prefix.casefold() and stem != named:
        return
    if family.head_is_bare and tied and named.casefold() == f"{prefix}Model".casefold():
        return
    head = "LMHeadModel" if model_type == "gpt2" else family.heads[0]
    raise InputError(
        f"config.architectures names {shown(named)} with model_type {model_type!r}; "
        f"allowed: {prefix}{head}, the {_WHOLE.get(head, 'decoder with its language-model head')}"
    )
