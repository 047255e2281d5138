"""The three kinds of units of a decoder as operator graphs: embedding, block, head with loss.

Each function mirrors one ``forward`` in ``runtime.models.decoder``, statement by statement.
"""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.model import ModelSpec
from estimator.job.strategy import Recompute
from estimator.ops.cost import UnitCost
from estimator.ops.graph import Graph
from estimator.ops.kernels.chip import H200, Chip
from estimator.ops.liveness import unit_cost
from estimator.ops.tape import Ref
from estimator.sharding.units import Unit


class Shape(NamedTuple):
    """What a unit's cost depends on besides the model."""

    micro_batch_size: int
    seq_len: int
    dtype: str
    repeats_kv_heads: bool
    """True where the attention kernel has no grouped-query form (on a CPU, and in fp32)."""
    kernels: frozenset[str] = frozenset()
    """Kernels of the runtime that work on the device; plain torch does the rest."""
    chip: Chip = H200
    """Sizes of their launches."""
    factor_is_one: bool = True
    """Nothing multiplies the loss before its backward pass: one micro-batch and no loss scaling."""
    grad_dtype: str = ""
    """Of the buffers that gradients are added to; empty: ``dtype``."""
    stat_bytes: int = 4
    """Bytes of each of a row's two statistics that torch's LayerNorm keeps: fp32, but ``dtype`` on a CPU."""

    @property
    def rows(self) -> int:
        return self.micro_batch_size * self.seq_len

    def graph(self) -> Graph:
        return Graph(self.dtype, self.rows, self.kernels, self.chip, self.grad_dtype, self.stat_bytes)


def unit_costs(spec: ModelSpec, units: tuple[Unit, ...], shape: Shape, recompute: Recompute) -> list[UnitCost]:
    """Cost of every unit; units of one kind share one object. Only blocks recompute."""
    by_kind: dict[str, UnitCost] = {}
    for index, unit in enumerate(units):
        if unit.kind in by_kind:
            continue
        if unit.kind == "embed":
            by_kind[unit.kind] = unit_cost(embedding_graph(spec, shape), "none")
        elif unit.kind == "head":
            by_kind[unit.kind] = unit_cost(head_graph(spec, shape), "none")
        else:
            by_kind[unit.kind] = unit_cost(block_graph(spec, shape, spec.window_of(index - 1)), recompute)
    return [by_kind[unit.kind] for unit in units]


def embedding_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """Token (and position) look-up. The batch itself (ids and labels, int64) is its input."""
    g = shape.graph()
    width = spec.embed_dim or spec.d_model
    ids = g.tensor(2 * 8 * shape.rows, grad=False)
    x = g.embedding(shape.rows, width, spec.vocab_size, tied=spec.tied_embeddings)
    g.nodes[-1].aux = (ids,)
    if width != spec.d_model:
        x = g.linear(x, width, spec.d_model, bias=False)
    if spec.position_rows:
        places = g.tensor(8 * shape.seq_len, grad=False)
        positions = g.embedding(shape.seq_len, spec.d_model, spec.position_rows)
        g.nodes[-1].aux = (places,)
        x = g.add_positions(x, positions, spec.d_model)
    if spec.embedding_norm:
        x = _norm(g, spec, x)
    g.output = x
    return g


def block_graph(spec: ModelSpec, shape: Shape, window: int) -> Graph:
    """Attention and MLP around the residual stream."""
    g, d = shape.graph(), spec.d_model
    x = g.input = g.activation(d)
    with g.call(x):
        if not spec.pre_norm:
            x = _norm(g, spec, g.add(x, _attention(g, spec, shape, x, window), d))
            g.output = _norm(g, spec, g.add(x, _mlp(g, spec, x), d))
            return g
        if spec.parallel_residual:
            attn = _attention(g, spec, shape, _norm(g, spec, x), window)
            y = g.add(x, attn, d)
            g.output = g.add(y, _mlp(g, spec, _norm(g, spec, x)), d)
            return g
        attn = _attention(g, spec, shape, _norm(g, spec, x), window)
        attn = _norm(g, spec, attn) if spec.sandwich_norms else attn
        h, y = g.add_norm(attn, x, d, rms=spec.norm == "rmsnorm", bias=spec.norm_bias)
    with g.call(h, y):
        mlp = _mlp(g, spec, h)
        g.output = g.add(y, _norm(g, spec, mlp) if spec.sandwich_norms else mlp, d)
    return g


def head_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """Final norm, projection to the vocabulary, cross-entropy."""
    g, d = shape.graph(), spec.d_model
    x = g.input = g.activation(d)
    width = spec.embed_dim or d
    with g.call(x):
        h = _norm(g, spec, x) if spec.final_norm else x
        if width != d:
            h = g.linear(h, d, width, bias=False)
        g.output = g.linear_cross_entropy(
            h, width, spec.vocab_size, bias=spec.head_bias, pending=spec.tied_embeddings,
            factor_is_one=shape.factor_is_one,
        )  # fmt: skip
    return g


def _norm(g: Graph, spec: ModelSpec, x: Ref) -> Ref:
    return g.norm(x, spec.d_model, rms=spec.norm == "rmsnorm", bias=spec.norm_bias)


def _attention(g: Graph, spec: ModelSpec, shape: Shape, h: Ref, window: int) -> Ref:
    d, q_width, kv_width = spec.d_model, spec.d_attn, spec.d_kv
    with g.call(h):
        q = g.linear(h, d, q_width, bias=spec.qkv_bias)
        k = g.linear(h, d, kv_width, bias=spec.qkv_bias)
        v = g.linear(h, d, kv_width, bias=spec.qkv_bias)
        if spec.qk_norm:
            q = g.norm(q, spec.head_dim, rms=True, bias=False, rows=g.rows * spec.n_heads)
            k = g.norm(k, spec.head_dim, rms=True, bias=False, rows=g.rows * spec.n_kv_heads)
        if spec.rotary_dim:
            place = (shape.micro_batch_size, shape.seq_len)
            q = g.rotary(q, (*place, spec.n_heads, spec.head_dim), spec.rotary_dim)
            k = g.rotary(k, (*place, spec.n_kv_heads, spec.head_dim), spec.rotary_dim)
        n_kv_heads = spec.n_kv_heads
        if shape.repeats_kv_heads and n_kv_heads < spec.n_heads:
            repeats = spec.n_heads // n_kv_heads
            k, v = g.repeat_heads(k, kv_width, repeats), g.repeat_heads(v, kv_width, repeats)
            n_kv_heads = spec.n_heads
        with g.call(q, k, v):
            out = g.attention(
                q, k, v, batch=shape.micro_batch_size, n_heads=spec.n_heads, n_kv_heads=n_kv_heads,
                head_dim=spec.head_dim, window=window,
            )  # fmt: skip
            return g.linear(out, q_width, d, bias=spec.attn_out_bias)


def _mlp(g: Graph, spec: ModelSpec, h: Ref) -> Ref:
    with g.call(h):
        if spec.gated_mlp:
            gate = g.linear(h, spec.d_model, spec.d_ff, bias=spec.mlp_bias)
            up = g.linear(h, spec.d_model, spec.d_ff, bias=spec.mlp_bias)
            inner = g.gated_activate(gate, up, spec.d_ff, spec.activation)
        else:
            inner = g.linear_activate(h, spec.d_model, spec.d_ff, spec.activation, bias=spec.mlp_bias)
        return g.linear(inner, spec.d_ff, spec.d_model, bias=spec.mlp_bias)
