"""``Config``: typed look-ups in a parsed ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from estimator.errors import InputError
from estimator.job.fields import MAX_LAYERS, flag, number, refuse, shown, table, whole

MAX_SIZE = 2**31
"""Largest width, vocabulary or number of positions that is taken for a model."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Names of transformers' ``ACT2FN``. The "new", "fast" and "pytorch_tanh" GELUs are one tanh approximation."""

EXTRAS = {
    "is_encoder_decoder": "it is an encoder-decoder",
    "add_cross_attention": "it attends to an encoder",
    "vision_config": "it has a vision tower",
    "audio_config": "it has an audio tower",
    "text_config": "its text model is nested in a larger one",
    "q_lora_rank": "its attention is low-rank (multi-head latent attention)",
    "kv_lora_rank": "its attention is low-rank (multi-head latent attention)",
    "block_configs": "its blocks differ from each other",
    "num_kv_shared_layers": "layers share their keys and values",
    "use_cla": "layers share their keys and values",
    "hidden_size_per_layer_input": "each layer has embeddings of its own",
    "qk_norm": "it normalises queries and keys in a way that its family does not",
    "use_qk_norm": "it normalises queries and keys in a way that its family does not",
    "qk_layernorm": "it normalises queries and keys in a way that its family does not",
}
"""Keys that change the parameter count of a dense decoder when they are set, and what they mean."""


class Config:
    """One config being read. ``None`` (JSON ``null``) counts as absent. Every error names the key.

    A look-up may list several spellings of a key (transformers' ``attribute_map``); they must not contradict.
    """

    def __init__(self, data: Mapping[str, Any], model_type: str, ignored: Sequence[str] = ()) -> None:
        self.data = data
        self.model_type = model_type
        self._ignored = ignored

    def _get(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        given = [key for key in keys if self.data.get(key) is not None]
        for key in given[1:]:
            if self.data[key] != self.data[given[0]]:
                raise InputError(
                    f"config.{given[0]} is {shown(self.data[given[0]])} but config.{key} is {shown(self.data[key])}; "
                    "they are two names of one thing"
                )
        return (f"config.{given[0]}", self.data[given[0]]) if given else (f"config.{keys[0]}", None)

    def _missing(self, field: str) -> InputError:
        key = field.removeprefix("config.")
        state = "is null" if key in self.data else "is missing"
        return InputError(f"{field} {state}; a config of model_type {self.model_type!r} needs it")

    def size(self, *keys: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """A whole number; without ``default`` the key must be there."""
        field, value = self._get(keys)
        if value is None:
            if default is None:
                raise self._missing(field)
            return default
        return whole(field, value, minimum=minimum, maximum=maximum)

    def layers(self, *keys: str) -> int:
        """Number of blocks."""
        return self.size(*keys, maximum=MAX_LAYERS)

    def number(self, *keys: str, default: float) -> float:
        """A finite number >= 0."""
        field, value = self._get(keys)
        return default if value is None else number(field, value)

    def flag(self, *keys: str, default: bool) -> bool:
        """True or false."""
        field, value = self._get(keys)
        return default if value is None else flag(field, value)

    def section(self, key: str) -> dict[str, Any]:
        """A nested table, empty when absent."""
        value = self.data.get(key)
        return {} if value is None else table(f"config.{key}", value)

    def activation(self, *keys: str, default: str) -> str:
        """``ModelSpec.activation``."""
        field, value = self._get(keys)
        if value is None:
            return default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise refuse(field, value, ", ".join(sorted(ACTIVATIONS)))
        return ACTIVATIONS[value]

    def heads(self, d_model: int, *keys: str) -> tuple[int, int]:
        """Number of heads, and the width of one when they share ``d_model`` evenly."""
        n_heads = self.size(*keys)
        if d_model % n_heads:
            raise refuse(f"config.{keys[0]}", n_heads, f"a divisor of the hidden size {d_model}")
        return n_heads, d_model // n_heads

    def rope_theta(self, default: float) -> float:
        """Base of the rotary angles, in the old (flat) or the new spelling (``rope_parameters``, maybe per layer type)."""
        rope = self.section("rope_parameters")
        rope = table("config.rope_parameters.full_attention", rope.get("full_attention") or rope)
        value = self.data.get("rope_theta", self.data.get("rotary_emb_base"))
        value = rope.get("rope_theta") if value is None else value
        return default if value is None else number("config.rope_theta", value)

    def rotary_fraction(self, default: float) -> float:
        """Share of a head's channels that is rotated."""
        rope = self.section("rope_parameters")
        for source, key in (
            (self.data, "partial_rotary_factor"),
            (self.data, "rotary_pct"),
            (rope, "partial_rotary_factor"),
        ):
            if source.get(key) is not None:
                return number(f"config.{key}", source[key])
        return default

    def window(self, n_layers: int, default: int = 0, every: int = 0) -> tuple[int, int]:
        """``(sliding_window, global_every)`` of ``ModelSpec`` from ``sliding_window`` and ``layer_types``.

        ``default`` is the class's window when the key is absent (JSON ``null`` means no window), ``every`` its
        pattern when ``layer_types`` is absent.
        """
        value = self.data.get("sliding_window", default)
        window = whole("config.sliding_window", value, minimum=0, maximum=MAX_SIZE) if value is not None else 0
        kinds = self.data.get("layer_types")
        if not window:
            return 0, 0
        if kinds is None:
            return window, every
        names = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in names for kind in kinds):
            raise refuse("config.layer_types", kinds, f"a list of {n_layers} of {' and '.join(names)}")
        if "full_attention" not in kinds:
            return window, 0
        if "sliding_attention" not in kinds:
            return 0, 0
        every = kinds.index("full_attention") + 1
        if any((kind == "full_attention") != ((layer + 1) % every == 0) for layer, kind in enumerate(kinds)):
            raise InputError(
                "config.layer_types mixes windowed and full attention irregularly; allowed: every n-th layer is full"
            )
        return window, every

    def refuse_extras(self) -> None:
        """Raises ``InputError`` for a key that makes the model something else than its dense family."""
        for key, value in self.data.items():
            if value is None or value is False or value in (0, [], {}) or key in self._ignored:
                continue
            reason = EXTRAS.get(key)
            if "expert" in key or "moe" in key.split("_"):
                reason = "it is a mixture of experts"
            elif "nextn" in key or "mtp" in key.split("_"):
                reason = "it has multi-token-prediction layers"
            if reason:
                raise InputError(
                    f"config.{key[:80]} is {shown(value)} with model_type {self.model_type!r}; "
                    f"{reason}, which is not forecast yet"
                )
