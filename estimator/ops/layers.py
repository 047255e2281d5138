"""The three kinds of units of a decoder as operator graphs: embedding, block, head with loss.

Each function mirrors one ``forward`` in ``runtime.models.decoder``, statement by statement.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from estimator.job.experts import Experts
from estimator.job.model import ModelSpec
from estimator.ops.context import Context, shared_attention
from estimator.ops.cost import UnitCost
from estimator.ops.exchange import ExpertRanks
from estimator.ops.experts import expert_mlp
from estimator.ops.graph import Graph
from estimator.ops.kernels.chip import H200, Chip
from estimator.ops.latent import latent_attention
from estimator.ops.liveness import unit_cost
from estimator.ops.lora import adapt, hold_batch
from estimator.ops.ring import Heads
from estimator.ops.shared import SharedGraph
from estimator.ops.split_backward import split_backward
from estimator.ops.style import COMPILED, PLAIN, Style, compiled_recompute
from estimator.ops.tape import Ref, part_of_block
from estimator.ops.traced import traced_costs
from estimator.ops.window import windowed
from estimator.ops.written_out import dropout
from estimator.sharding.units import Unit, recomputing


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
    n_tensor: int = 1
    """Tensor-parallel ranks."""
    splits_tokens: bool = False
    """Sequence parallelism between layers."""
    is_cpu: bool = False
    expert_ranks: ExpertRanks = ExpertRanks()
    """Those that share the experts of a layer, if any do."""
    context: Context = Context()
    """How context-parallel ranks, if any, share sequences; ``seq_len`` is this rank's part of one."""
    splits_backward: bool = False
    """Backward is two passes (``estimator.ops.split_backward``)."""
    param_grads: str = "added"
    """What becomes of parameters' gradients: ``estimator.job.framework.ParamGrads``."""
    style: Style = PLAIN
    """How the framework runs its operators."""
    frozen: bool = False
    """Weights have no gradients, but for adapters'."""
    holds_batch: bool = True
    """A micro-batch lives from its forward to its backward pass; False: as long as the step (pipelines)."""

    @property
    def repeats_heads(self) -> bool:
        """Whether key and value heads are copied to every query head before attention."""
        kernel = self.style.attention
        return kernel == "efficient" or (kernel == "flash" and self.repeats_kv_heads)

    @property
    def rows(self) -> int:
        return self.micro_batch_size * self.seq_len

    def compiled(self) -> Shape:
        """Of a unit that torch.compile works on."""
        return self._replace(kernels=self.kernels | COMPILED)

    def graph(self) -> Graph:
        kind = SharedGraph if self.n_tensor > 1 else Graph
        return kind(
            self.dtype, self.rows, self.kernels, self.chip, self.grad_dtype, self.stat_bytes, self.n_tensor,
            self.splits_tokens, param_grads=self.param_grads, style=self.style, frozen=self.frozen,
        )  # fmt: skip


def unit_costs(
    spec: ModelSpec, units: tuple[Unit, ...], shape: Shape, recompute: str, recompute_every: int = 1
) -> list[UnitCost]:
    """Cost of every unit; units of one kind share one object. Only blocks recompute, every ``recompute_every``-th."""
    if spec.traced is not None:
        return traced_costs(spec.traced)
    again = recomputing(units, recompute_every) if recompute != "none" else frozenset()
    by_kind: dict[tuple[str, bool], UnitCost] = {}
    for index, unit in enumerate(units):
        kind = (unit.kind, index in again)
        if kind in by_kind:
            continue
        chosen = recompute if index in again else "none"
        is_compiled = shape.style.compiled and unit.kind not in ("embed", "head")
        graph = unit_graph(spec, unit, index, shape.compiled() if is_compiled else shape)
        own = compiled_recompute(chosen) if is_compiled else chosen
        cost = unit_cost(graph, own)
        split = split_backward(graph, own) if shape.splits_backward else None
        if is_compiled and chosen == "none":  # one graph makes both
            split = None if split is None else split._replace(inputs=(*cost.recompute, *split.inputs))
            cost = cost._replace(backward=(*cost.recompute, *cost.backward), recompute=())
        by_kind[kind] = cost._replace(split=split)
    return [by_kind[unit.kind, index in again] for index, unit in enumerate(units)]


def unit_graph(spec: ModelSpec, unit: Unit, index: int, shape: Shape) -> Graph:
    """The forward pass of ``unit``, the ``index``-th of ``spec``."""
    if spec.encoder is not None:
        from estimator.ops import encoder, encoder_decoder  # which are made of this module's parts

        return (encoder_decoder if spec.encoder.n_layers else encoder).unit_graph(spec, spec.encoder, unit, shape)
    shape = shape._replace(frozen=spec.lora is not None)
    if unit.kind == "embed":
        return embedding_graph(spec, shape)
    if unit.kind == "head":
        return head_graph(spec, shape)
    layer = index - 1
    window, experts = spec.window_of(layer), spec.experts_of(layer)
    if spec.rotary_dim and not spec.rotates(layer):
        spec = replace(spec, positions="none", unrotated_every=0)
    return block_graph(spec, shape, window, experts, is_first=layer == 0)


def embedding_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """Token (and position) look-up. The batch itself (ids and labels, int64) is its input."""
    g = shape.graph()
    width = spec.embed_dim or spec.d_model
    x = g.tokens(width, spec.vocab_size, tied=spec.tied_embeddings)
    if not shape.holds_batch:
        g.tensors[g.nodes[-1].aux[0]].n_bytes = 0
    elif g.frozen:  # it waits for the backward pass, which ends in the first block
        g.further_outputs = g.nodes[-1].aux
    if width != spec.d_model:
        x = g.linear(x, width, spec.d_model, bias=False)
    if spec.position_rows:
        x = g.add_learned_positions(x, spec.d_model, spec.position_rows, shape.seq_len)
    if spec.embedding_norm:
        x = record_norm(g, spec, x)
    g.output = x
    return g


def block_graph(
    spec: ModelSpec, shape: Shape, window: int, experts: Experts | None = None, *, is_first: bool = False
) -> Graph:
    """Attention and MLP (or ``experts``) around the residual stream."""
    g = _block_graph(spec, shape, window, experts, frozen_input=is_first and shape.frozen)
    if is_first and shape.frozen and shape.holds_batch:
        hold_batch(g, shape.rows)
    return g


def _block_graph(spec: ModelSpec, shape: Shape, window: int, experts: Experts | None, *, frozen_input: bool) -> Graph:
    g, d = shape.graph(), spec.d_model

    def mlp_of(h: Ref) -> Ref:
        return (
            record_mlp(g, spec, h)
            if experts is None
            else expert_mlp(g, spec, experts, h, record_mlp, shape.expert_ranks)
        )

    def dropped(out: Ref) -> Ref:
        return dropout(g, out, g.stream_rows * d, in_addition=True) if g.style.drops_out else out

    x = g.input = g.stream(d)
    if frozen_input:
        g.tensors[x].n_grad_bytes = 0
    with g.call(x):
        if spec.sandwich_norms and not spec.pre_norm:
            x = g.add(x, dropped(record_norm(g, spec, _attention(g, spec, shape, x, window))), d)
            with g.call(x):
                g.output = g.add(x, dropped(record_norm(g, spec, mlp_of(x))), d)
            return g
        if not spec.pre_norm:
            x = record_norm(g, spec, g.add(x, dropped(_attention(g, spec, shape, x, window)), d))
            g.output = record_norm(g, spec, g.add(x, dropped(mlp_of(x)), d))
            return g
        if spec.parallel_residual:
            h = record_norm(g, spec, x)
            with g.call(*((h,) if spec.shared_norm else ())):
                attn = _attention(g, spec, shape, h, window)
                y = g.add(x, dropped(attn), d)
            h = h if spec.shared_norm else record_norm(g, spec, x)
            g.output = g.add(y, dropped(mlp_of(h)), d)
            return g
        attn = _attention(g, spec, shape, record_norm(g, spec, x), window)
        attn = dropped(record_norm(g, spec, attn) if spec.sandwich_norms else attn)
        h, y = g.add_norm(attn, x, d, rms=spec.norm == "rmsnorm", bias=spec.norm_bias, n_weights=_n_weights(spec))
    with g.call(h, y):
        mlp = mlp_of(h)
        g.output = g.add(y, dropped(record_norm(g, spec, mlp) if spec.sandwich_norms else mlp), d)
    return g


def head_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """Final norm, projection to the vocabulary, cross-entropy."""
    g, d = shape.graph(), spec.d_model
    x = g.input = g.stream(d)
    width = spec.embed_dim or d
    with g.call(x):
        h = record_norm(g, spec, x) if spec.final_norm else x
        if width != d:
            h = g.linear(h, d, width, bias=False)
        if (
            spec.caps_logits and shape.n_tensor == 1
        ):  # ranks that share the vocabulary make logits in chunks, and keep none
            g.output = g.capped_cross_entropy(
                h, width, spec.vocab_size, bias=spec.head_bias, pending=spec.tied_embeddings
            )
            return g
        g.output = g.linear_cross_entropy(
            h, width, spec.vocab_size, bias=spec.head_bias, pending=spec.tied_embeddings,
            factor_is_one=shape.factor_is_one,
        )  # fmt: skip
    return g


def record_norm(g: Graph, spec: ModelSpec, x: Ref) -> Ref:
    """A norm of the residual stream."""
    return g.norm(x, spec.d_model, rms=spec.norm == "rmsnorm", bias=spec.norm_bias, n_weights=_n_weights(spec))


def _n_weights(spec: ModelSpec) -> int | None:
    return None if spec.norm_weight else 0


def _qk_norm(g: Graph, spec: ModelSpec, x: Ref, n_heads: int) -> Ref:
    """A norm of queries or of keys: ``ModelSpec.qk_norms``."""
    width, rms = spec.head_dim, spec.norm == "rmsnorm"
    if spec.qk_norms == "head":
        return g.head_norm(x, width, n_heads)
    if spec.qk_norms == "all":
        return g.norm(x, n_heads * width, rms=rms, bias=False, rows=g.rows)
    n_weights = n_heads * width if spec.qk_norms == "each" else 0
    return g.norm(x, width, rms=rms, bias=False, rows=g.rows * n_heads, n_weights=n_weights)


def _attention(g: Graph, spec: ModelSpec, shape: Shape, h: Ref, window: int) -> Ref:
    if spec.latent is not None:
        return latent_attention(g, spec, spec.latent, shape.micro_batch_size, shape.context, h)
    return _head_attention(g, spec, shape, h, window)


@part_of_block("attention")
def _head_attention(g: Graph, spec: ModelSpec, shape: Shape, h: Ref, window: int) -> Ref:
    d, n_heads, n_kv_heads = spec.d_model, g.share(spec.n_heads), g.share(spec.n_kv_heads)
    q_width, kv_width = n_heads * spec.head_dim, n_kv_heads * spec.head_dim
    with g.call(h):
        q, k, v = g.columns(h, d, (q_width, kv_width, kv_width), bias=spec.qkv_bias)
        if spec.lora is not None:
            q, k = _adapted(g, spec, "attn.q", h, q, d, q_width), _adapted(g, spec, "attn.k", h, k, d, kv_width)
            v = _adapted(g, spec, "attn.v", h, v, d, kv_width)
        if spec.qk_norm:
            q, k = _qk_norm(g, spec, q, n_heads), _qk_norm(g, spec, k, n_kv_heads)
        if spec.clips_qkv:
            q, k, v = g.clamp(q, q_width), g.clamp(k, kv_width), g.clamp(v, kv_width)
        if spec.rotary_dim:
            place = (shape.micro_batch_size, shape.seq_len)
            q = g.rotary(q, (*place, n_heads, spec.head_dim), spec.rotary_dim)
            k = g.rotary(k, (*place, n_kv_heads, spec.head_dim), spec.rotary_dim)
        with g.call(q, k, v):
            heads = Heads(
                shape.micro_batch_size, n_heads, n_kv_heads, spec.head_dim, window,
                sinks=spec.attn_sinks and shape.style.own, masks=shape.is_cpu and shape.style.own,
            )  # fmt: skip
            out = _core_attention(g, shape, heads, q, k, v)
            y = g.row(out, q_width, d, bias=spec.attn_out_bias)
            return _adapted(g, spec, "attn.out", out, y, q_width, d)


def _adapted(g: Graph, spec: ModelSpec, name: str, x: Ref, y: Ref, n_in: int, n_out: int) -> Ref:
    """``y``, what the projection ``name`` makes of ``x``, with what its adapter, if it has one, adds."""
    if spec.lora is None or not spec.lora.adapts(f"{name}.weight"):
        return y
    return adapt(g, spec.lora, x, y, n_in, n_out)


@part_of_block("core_attention")
def _core_attention(g: Graph, shape: Shape, heads: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    if shape.context.size > 1:
        return shared_attention(g, shape.context, heads._replace(repeats_kv=shape.repeats_heads), q, k, v)
    n_kv_heads, repeats = heads.n_kv_heads, heads.n_heads // heads.n_kv_heads
    if shape.repeats_heads and repeats > 1:
        kv_width, n_kv_heads = n_kv_heads * heads.head_dim, heads.n_heads
        k, v = g.repeat_heads(k, kv_width, repeats), g.repeat_heads(v, kv_width, repeats)
    with g.call(k, v):
        out = g.attention(
            q, k, v, batch=heads.batch, n_heads=heads.n_heads, n_kv_heads=n_kv_heads, head_dim=heads.head_dim,
            window=heads.window,
        )  # fmt: skip
        windowed(g, heads._replace(n_kv_heads=n_kv_heads), g.rows)
        return out


@part_of_block("mlp")
def record_mlp(g: Graph, spec: ModelSpec, h: Ref) -> Ref:
    d_ff = g.share(spec.d_ff)
    with g.call(h):
        if spec.gated_mlp:
            gate, up = g.columns(h, spec.d_model, (d_ff, d_ff), bias=spec.mlp_bias)
            gate = _adapted(g, spec, "mlp.gate", h, gate, spec.d_model, d_ff)
            up = _adapted(g, spec, "mlp.up", h, up, spec.d_model, d_ff)
            inner = g.gated_activate(gate, up, d_ff, spec.activation)
        else:
            inner = g.linear_activate(
                h, spec.d_model, d_ff, spec.activation, bias=spec.mlp_bias,
                adapt=lambda product: _adapted(g, spec, "mlp.up", h, product, spec.d_model, d_ff),
            )  # fmt: skip
        with g.call(inner):
            y = g.row(inner, d_ff, spec.d_model, bias=spec.mlp_bias)
            return _adapted(g, spec, "mlp.down", inner, y, d_ff, spec.d_model)
