"""What a model is made of: units (embedding, blocks, head) and their parameters, in execution order.

A *unit* is the grain of ZeRO here: its parameters are fetched, used, reduced and stepped together. The runtime
lists the units of a live module, the estimator those of a ``ModelSpec``; for the reference decoder both are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from estimator.job.lora import Lora
from estimator.job.model import ModelSpec
from estimator.job.tower import Tower
from estimator.job.traced import Traced
from estimator.sharding.blocks import expert_mlp, latent_attention


class Split(NamedTuple):
    """How ranks along ``axis`` share a parameter: equal parts along ``dim``, of whose ``size`` the last ones may lack some."""

    dim: int
    size: int
    axis: Literal["tp", "ep"] = "tp"
    """Tensor-parallel ranks; or expert-parallel ones, each with experts of its own."""
    inner: Split | None = None
    """How each of these parts is shared in turn."""


class Param(NamedTuple):
    """One parameter tensor. ``shape`` is that of a rank's part where ``split``, and not sharded by ZeRO."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    """False: frozen. It has no gradient and no optimizer state."""
    split: Split | None = None
    """``None``: tensor-parallel and expert-parallel ranks, if any, each hold all of it."""
    shared: bool = False
    """Another pipeline stage holds it too (tied embeddings): their gradients are summed."""

    rows: int = 0
    """A table of which a micro-batch looks up so many rows at most, whose gradients alone are exchanged. 0: all of it."""
    idle: bool = False
    """Held, but read by nothing that is computed."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


def splits_of(split: Split | None) -> Iterator[Split]:
    """``split``, and how its parts are shared in turn."""
    while split is not None:
        yield split
        split = split.inner


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
    whole: str = ""
    """Of which unit this is a layer, where layers are units of their own."""
    replays: bool = False
    """All of that unit runs forward again before its backward pass."""

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)

    @property
    def is_trained(self) -> bool:
        """Whether any of its own parameters is."""
        return any(p.trained for p in self.params)


def norm_params(spec: ModelSpec, name: str, width: int) -> list[Param]:
    """Weight and, where the model's norms have it, bias."""
    params = [Param(f"{name}.weight", (width,))] if spec.norm_weight else []
    return [*params, Param(f"{name}.bias", (width,))] if spec.norm_bias else params


def linear_params(name: str, n_in: int, n_out: int, bias: bool) -> list[Param]:
    """Weight and perhaps bias of ``torch.nn.Linear``."""
    params = [Param(f"{name}.weight", (n_out, n_in))]
    return [*params, Param(f"{name}.bias", (n_out,))] if bias else params


def _embedding(spec: ModelSpec) -> tuple[Param, ...]:
    width = spec.embed_dim or spec.d_model
    params = [Param("tokens.weight", (spec.vocab_size, width))]
    if spec.position_rows:
        params.append(Param("positions.weight", (spec.position_rows, spec.d_model)))
    if width != spec.d_model:
        params += linear_params("project_in", width, spec.d_model, bias=False)
    if spec.embedding_norm:
        params += norm_params(spec, "norm", spec.d_model)
    return (*params, *(_tower(spec.tower) if spec.tower is not None else ()))


def _tower(tower: Tower) -> Iterator[Param]:
    """Behind the embedding's own: what reads images ends in what the decoder reads in place of tokens."""
    parts = [(f"layers.{layer}.", tower.layer) for layer in range(tower.n_layers)]
    for prefix, params in (("", tower.others), *parts):
        for param in params:
            yield Param(f"tower.{prefix}{param.name}", param.shape, tower.trained, idle=True)


def _block(spec: ModelSpec, layer: int) -> tuple[Param, ...]:
    d = spec.d_model
    bare = spec.sandwich_norms and not spec.pre_norm  # norms stand behind attention and MLP alone
    params = [*([] if bare else norm_params(spec, "attn_norm", d)), *_attention(spec)]
    if spec.sandwich_norms:
        params += norm_params(spec, "attn_post_norm", d)
    params += [] if bare or spec.shared_norm else norm_params(spec, "mlp_norm", d)
    experts = spec.experts_of(layer)
    params += mlp_params(spec) if experts is None else [Param(*shape) for shape in expert_mlp(spec, experts)]
    if spec.sandwich_norms:
        params += norm_params(spec, "mlp_post_norm", d)
    return tuple(params)


def _attention(spec: ModelSpec) -> list[Param]:
    d = spec.d_model
    if spec.latent is not None:
        params = [Param(*shape) for shape in latent_attention(spec, spec.latent)]
        return params + linear_params("attn.out", spec.n_heads * spec.latent.value_head_dim, d, spec.attn_out_bias)
    params = [Param("attn.sinks", (spec.n_heads,))] if spec.attn_sinks else []
    params += linear_params("attn.q", d, spec.d_attn, spec.qkv_bias)
    params += linear_params("attn.k", d, spec.d_kv, spec.qkv_bias)
    params += linear_params("attn.v", d, spec.d_kv, spec.qkv_bias)
    if spec.qk_norm:
        params += _qk_norm(spec)
    return params + linear_params("attn.out", spec.d_attn, d, spec.attn_out_bias)


def _qk_norm(spec: ModelSpec) -> list[Param]:
    shapes = {
        "head": ((spec.head_dim,), (spec.head_dim,)),
        "each": ((spec.n_heads, spec.head_dim), (spec.n_kv_heads, spec.head_dim)),
        "all": ((spec.d_attn,), (spec.d_kv,)),
        "plain": (),
    }[spec.qk_norms]
    return [Param(f"attn.{x}_norm.weight", shape) for x, shape in zip("qk", shapes, strict=False)]


def mlp_params(spec: ModelSpec) -> list[Param]:
    """The dense MLP's, with its gate where it has one."""
    d = spec.d_model
    params = linear_params("mlp.gate", d, spec.d_ff, spec.mlp_bias) if spec.gated_mlp else []
    params += linear_params("mlp.up", d, spec.d_ff, spec.mlp_bias)
    return params + linear_params("mlp.down", spec.d_ff, d, spec.mlp_bias)


def _head(spec: ModelSpec) -> tuple[Param, ...]:
    width = spec.embed_dim or spec.d_model
    params = norm_params(spec, "norm", spec.d_model) if spec.final_norm else []
    if width != spec.d_model:
        params += linear_params("project_out", spec.d_model, width, bias=False)
    if not spec.tied_embeddings:
        params += linear_params("out", width, spec.vocab_size, spec.head_bias)
    elif spec.head_bias:
        params.append(Param("out.bias", (spec.vocab_size,)))
    return tuple(params)


def block_kind(spec: ModelSpec, layer: int) -> str:
    """``Unit.kind`` of a block: ``block``, with its window and ``moe`` where it has experts."""
    window = spec.window_of(layer)
    still = "_still" if spec.unrotated_every and not spec.rotates(layer) else ""
    first = "_first" if spec.lora is not None and layer == 0 else ""  # gradients end inside of it
    return "block" + (f"_w{window}" if window else "") + ("_moe" if spec.experts_of(layer) else "") + still + first


def adapted(params: tuple[Param, ...], lora: Lora) -> tuple[Param, ...]:
    """``params`` of a unit, frozen, and behind every targeted projection its adapter's A and B."""
    held: list[Param] = []
    waiting: tuple[Param, ...] = ()
    for param in params:
        if waiting and not param.name.endswith(".bias"):
            held += waiting
            waiting = ()
        held.append(param._replace(trained=False))
        if not param.idle and lora.adapts(param.name):
            (n_out, n_in), name = param.shape, param.name.removesuffix(".weight")
            waiting = Param(f"{name}.lora_a", (lora.rank, n_in)), Param(f"{name}.lora_b", (n_out, lora.rank))
    return (*held, *waiting)


def _traced_units(traced: Traced) -> tuple[Unit, ...]:
    return tuple(
        Unit(
            unit.name, f"traced_{unit.cost}", tuple(Param(*param) for param in unit.params), unit.borrows,
            backward_reads=unit.backward_reads,
        )
        for unit in traced.units
    )  # fmt: skip


@lru_cache(maxsize=256)
def model_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """Units of ``spec`` in forward order: ``embed``, ``blocks.0`` ..., ``head`` (which includes the loss)."""
    if spec.traced is not None:
        return _traced_units(spec.traced)
    if spec.encoder is not None:
        from estimator.sharding.encoder import encoder_units  # which is made of this module's parts

        return encoder_units(spec, spec.encoder)
    units = [Unit("embed", "embed", _embedding(spec), backward_reads=bool(spec.embedding_norm or spec.embed_dim))]
    blocks: dict[str, tuple[Param, ...]] = {}
    for layer in range(spec.n_layers):
        kind = block_kind(spec, layer)
        if kind not in blocks:
            blocks[kind] = _block(spec, layer)
        units.append(Unit(f"blocks.{layer}", kind, blocks[kind]))
    units.append(Unit("head", "head", _head(spec), borrows=(0,) if spec.tied_embeddings else ()))
    if spec.lora is not None:
        of = {unit.params: adapted(unit.params, spec.lora) for unit in units}  # equal parameters stay one object
        units = [unit._replace(params=of[unit.params]) for unit in units]
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


def trained_units(units: Sequence[Unit]) -> list[Unit]:
    """``units`` with their trained parameters alone."""
    return [unit._replace(params=tuple(p for p in unit.params if p.trained)) for unit in units]


def recomputing(units: Sequence[Unit], every: int) -> frozenset[int]:
    """Indices of the blocks 0, ``every``, 2 ``every``, ...; blocks are all units but the first and the last."""
    return frozenset(range(1, len(units) - 1, every))
