"""PEFT's ``adapter_config.json`` as a ``Lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.job.fields import flag, number, read_file, refuse, shown, table, text, whole
from estimator.job.lora import ALIASES, PARTS, Lora

_JOINED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "gate_up_proj")
_UNSET: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "modules_to_save": ((),), "layers_to_transform": ((),), "rank_pattern": ({},),
    "alpha_pattern": ({},), "trainable_token_indices": ((),), "target_parameters": ((),),
}  # fmt: skip
"""What these say where nothing but adapters of all layers is trained; ``null`` says so too."""


def load_adapter(path: str | Path) -> Lora:
    """The adapters that ``path``, an ``adapter_config.json`` or its folder, describes.

    Raises ``InputError`` for other kinds of adapters than LoRA's, and for what is trained beside them.
    """
    path = Path(path)
    path = path / "adapter_config.json" if path.is_dir() else path
    return adapter_of(table("adapter config", read_file(path, "adapter config")))


def adapter_of(data: dict[str, Any]) -> Lora:
    """The same of the file's data."""
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"adapter config has peft_type {shown(kind)}; allowed: 'LORA'")
    for key, allowed in _UNSET.items():
        value = data.get(key)
        if value is not None and (tuple(value) if isinstance(value, list) else value) not in allowed:
            raise InputError(
                f"adapter config has {key} {shown(value)}, which is not forecast; allowed: {allowed[0]!r} or null"
            )
    if "r" not in data:
        raise InputError("adapter config has no 'r', which it needs")
    init = data.get("init_lora_weights", True)
    if init not in (True, "gaussian"):
        raise refuse("adapter config's init_lora_weights", init, "true or 'gaussian'")
    return Lora(
        rank=whole("adapter config's r", data["r"]),
        alpha=number("adapter config's lora_alpha", data.get("lora_alpha", 8)),
        dropout=number("adapter config's lora_dropout", data.get("lora_dropout", 0.0)),
        targets=_targets(data.get("target_modules")),
        rank_stabilized=flag("adapter config's use_rslora", data.get("use_rslora", False)),
        init="gaussian" if init == "gaussian" else "kaiming",
    )


def _targets(modules: Any) -> tuple[str, ...]:
    """``all-linear``, or names, of which the last part counts."""
    if modules == "all-linear":
        return ("all",)
    if not isinstance(modules, list) or not modules:
        raise refuse("adapter config's target_modules", modules, "'all-linear' or a list of names of projections")
    names = [text("adapter config's target_modules", name).rpartition(".")[2] for name in modules]
    for name in names:
        if name in _JOINED:
            raise InputError(
                f"adapter config's target_modules has {name!r}, one adapter for projections that are apart here; allowed: "
                f"all-linear, {', '.join(ALIASES)}"
            )
    own = {name for part in PARTS.values() for name in part}
    for name in names:
        if name not in ALIASES and name not in own:
            raise InputError(
                f"adapter config's target_modules has {shown(name)}; allowed: all-linear, {', '.join(ALIASES)}"
            )
    return tuple(names)
