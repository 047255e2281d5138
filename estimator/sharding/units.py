"""What a model is made of: units (embedding, blocks, head) and their parameters, in execution order.

A *unit* is the grain of ZeRO here: its parameters are fetched, used, reduced and stepped together. The runtime
lists the units of a live module, the estimator those of a ``ModelSpec``; for the reference decoder both are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from estimator.job.model import ModelSpec


class Param(NamedTuple):
    """One parameter tensor. ``shape`` is the unsharded shape."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    """False: frozen. It has no gradient and no optimizer state."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Unit(NamedTuple):
    """Parameters that are used together.

    ``kind`` names the cost of the unit's compute (all equal blocks share one). ``borrows`` lists other units whose
    parameters its compute reads (a tied head reads the embedding's). ``backward_reads`` is False when its
    backward needs no parameter values (an embedding look-up).
    """

    name: str
    kind: str
    params: tuple[Param, ...]
    borrows: tuple[int, ...] = ()
    backward_reads: bool = True

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)

    @property
    def is_trained(self) -> bool:
        """Whether any of its own parameters is."""
        return any(p.trained for p in self.params)


def _norm(spec: ModelSpec, name: str, width: int) -> list[Param]:
    params = [Param(f"{name}.weight", (width,))]
    return [*params, Param(f"{name}.bias", (width,))] if spec.norm_bias else params


def _linear(name: str, n_in: int, n_out: int, bias: bool) -> list[Param]:
    params = [Param(f"{name}.weight", (n_out, n_in))]
    return [*params, Param(f"{name}.bias", (n_out,))] if bias else params


def _embedding(spec: ModelSpec) -> tuple[Param, ...]:
    width = spec.embed_dim or spec.d_model
    params = [Param("tokens.weight", (spec.vocab_size, width))]
    if spec.position_rows:
        params.append(Param("positions.weight", (spec.position_rows, spec.d_model)))
    if width != spec.d_model:
        params += _linear("project_in", width, spec.d_model, bias=False)
    if spec.embedding_norm:
        params += _norm(spec, "norm", spec.d_model)
    return tuple(params)


def _block(spec: ModelSpec) -> tuple[Param, ...]:
    d = spec.d_model
    params = _norm(spec, "attn_norm", d)
    params += _linear("attn.q", d, spec.d_attn, spec.qkv_bias)
    params += _linear("attn.k", d, spec.d_kv, spec.qkv_bias)
    params += _linear("attn.v", d, spec.d_kv, spec.qkv_bias)
    if spec.qk_norm:
        params += [Param("attn.q_norm.weight", (spec.head_dim,)), Param("attn.k_norm.weight", (spec.head_dim,))]
    params += _linear("attn.out", spec.d_attn, d, spec.attn_out_bias)
    if spec.sandwich_norms:
        params += _norm(spec, "attn_post_norm", d)
    params += _norm(spec, "mlp_norm", d)
    if spec.gated_mlp:
        params += _linear("mlp.gate", d, spec.d_ff, spec.mlp_bias)
    params += _linear("mlp.up", d, spec.d_ff, spec.mlp_bias)
    params += _linear("mlp.down", spec.d_ff, d, spec.mlp_bias)
    if spec.sandwich_norms:
        params += _norm(spec, "mlp_post_norm", d)
    return tuple(params)


def _head(spec: ModelSpec) -> tuple[Param, ...]:
    width = spec.embed_dim or spec.d_model
    params = _norm(spec, "norm", spec.d_model) if spec.final_norm else []
    if width != spec.d_model:
        params += _linear("project_out", spec.d_model, width, bias=False)
    if not spec.tied_embeddings:
        params += _linear("out", width, spec.vocab_size, spec.head_bias)
    elif spec.head_bias:
        params.append(Param("out.bias", (spec.vocab_size,)))
    return tuple(params)


@lru_cache(maxsize=256)
def model_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """Units of ``spec`` in forward order: ``embed``, ``blocks.0`` ..., ``head`` (which includes the loss)."""
    block = _block(spec)
    units = [Unit("embed", "embed", _embedding(spec), backward_reads=bool(spec.embedding_norm or spec.embed_dim))]
    for layer in range(spec.n_layers):
        window = spec.window_of(layer)
        units.append(Unit(f"blocks.{layer}", f"block_w{window}" if window else "block", block))
    units.append(Unit("head", "head", _head(spec), borrows=(0,) if spec.tied_embeddings else ()))
    return tuple(units)


def count_params(units: Sequence[Unit]) -> int:
    """Parameters of all units together; a shared parameter is listed, and counted, once."""
    by_kind: dict[tuple[Param, ...], int] = {}
    total = 0
    for unit in units:
        if unit.params not in by_kind:
            by_kind[unit.params] = unit.numel
        total += by_kind[unit.params]
    return total
