"""``Encoder``: what a model whose encoder attends in both directions has beside the fields of ``ModelSpec``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.errors import InputError, require_int
from estimator.job.recompute import parts_of

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder of its own (BERT), trained on masked tokens, or in front of a decoder (T5, BART).

    Raises ``InputError`` when a field is out of range.
    """

    n_layers: int = 0
    """Encoder blocks in front of the decoder's ``ModelSpec.n_layers``, each of which also attends to what they make; 0: there is
    no decoder, ``ModelSpec.n_layers`` are the encoder's, and the head has a layer of its own before the vocabulary (BERT)."""
    token_types: int = 0
    """Rows of the table of segment embeddings; 0: there is none."""
    relative_buckets: int = 0
    """Rows of T5's table of relative positions, one number for each head, with ``positions = "relative"`` (Raffel et al. 2020,
    section 2.1): encoder and decoder each have one for all their layers. Their attention is not scaled, and a tied head is
    by ``d_model ** -0.5``."""
    relative_distance: int = 128
    """Distance from which on the last bucket is meant."""

    def __post_init__(self) -> None:
        for field in ("n_layers", "token_types", "relative_buckets"):
            require_int(f"model.encoder.{field}", getattr(self, field), minimum=0)
        require_int("model.encoder.relative_distance", self.relative_distance)
        if self.relative_buckets and (self.relative_buckets < 4 or self.relative_buckets % 2):
            raise InputError(
                f"model.encoder.relative_buckets is {self.relative_buckets}; allowed: an even number of at least 4, or 0"
            )


def check_encoder(spec: ModelSpec) -> None:
    """Raises ``InputError`` where ``spec.encoder`` and the other fields contradict each other, or do not go together yet."""
    encoder = spec.encoder
    relative = spec.positions == "relative"
    if relative != (encoder is not None and encoder.relative_buckets > 0):
        raise InputError(
            f"model.positions is {spec.positions!r}; allowed: 'relative' with model.encoder.relative_buckets, any other kind without"
        )
    if encoder is None:
        return
    if encoder.token_types and encoder.n_layers:
        raise InputError("model.encoder.token_types is set with a decoder; allowed: 0")
    if relative and not encoder.n_layers:
        raise InputError("model.positions is 'relative' with an encoder alone; allowed: 'learned' or 'none'")
    for present, what in (
        (spec.positions in ("rotary", "alibi"), f"positions = {spec.positions!r}"),
        (spec.n_kv_heads != spec.n_heads, f"n_kv_heads = {spec.n_kv_heads}"),
        (spec.qk_norm, "qk_norm"),
        (spec.sandwich_norms, "sandwich_norms"),
        (spec.parallel_residual, "parallel_residual"),
        (spec.embed_dim not in (0, spec.d_model), f"embed_dim = {spec.embed_dim}"),
        (spec.sliding_window > 0, f"sliding_window = {spec.sliding_window}"),
        (spec.attn_sinks, "attn_sinks"),
        (not spec.norm_weight, "norms without weights"),
        (spec.caps_logits, "capped logits"),
        (spec.experts is not None, "a mixture of experts"),
        (spec.latent is not None, "latent attention"),
    ):
        if present:
            raise InputError(f"model {spec.name} has an encoder with {what}, which is not forecast yet")


def check_encoder_strategy(spec: ModelSpec, strategy: Strategy) -> None:
    """Raises ``InputError`` for what ``strategy`` has and models with an encoder do not have yet."""
    if spec.encoder is not None and parts_of(strategy.recompute):
        raise InputError(
            f"recompute is {strategy.recompute!r}, but {spec.name} has an encoder, whose blocks are recomputed as a whole; "
            "allowed: none, selective, full"
        )
    if spec.encoder is not None and strategy.activation_offload:
        raise InputError(f"activation_offload is on, but {spec.name} has an encoder; allowed: decoders")
    for axis in ("tp", "pp", "cp", "ep") if spec.encoder is not None else ():
        if getattr(strategy, axis) > 1:
            raise InputError(
                f"{axis} is {getattr(strategy, axis)}, but {spec.name} has an encoder, which only data parallelism spreads yet; "
                "allowed: 1"
            )
