"""Units of an encoder (BERT, RoBERTa) as operator graphs; encoder-decoders share the blocks.

Each function mirrors one ``forward`` in ``runtime.models.encoder``, statement by statement.
"""

from __future__ import annotations

from estimator.job.encoder import Encoder
from estimator.job.model import ModelSpec
from estimator.ops import vision
from estimator.ops.biased_attention import biased_attention
from estimator.ops.graph import Graph
from estimator.ops.layers import Shape, record_mlp, record_norm
from estimator.ops.tape import Ref
from estimator.sharding.units import Unit


def unit_graph(spec: ModelSpec, encoder: Encoder, unit: Unit, shape: Shape) -> Graph:
    """The forward pass of ``unit``."""
    if spec.patches is not None and unit.kind != "block":
        is_first = unit.kind == "embed"
        return vision.embedding_graph(spec, spec.patches, shape) if is_first else vision.head_graph(spec, shape)
    if unit.kind == "embed":
        return embedding_graph(spec, encoder, shape)
    return head_graph(spec, shape) if unit.kind == "head" else block_graph(spec, shape)


def embedding_graph(spec: ModelSpec, encoder: Encoder, shape: Shape) -> Graph:
    """Tokens, places and segments. The batch itself (ids and labels, int64) is its input."""
    g = shape.graph()
    x = g.tokens(spec.d_model, spec.vocab_size, tied=spec.tied_embeddings)
    if spec.position_rows:
        x = g.add_learned_positions(x, spec.d_model, spec.position_rows, shape.seq_len)
    if encoder.token_types:
        types = g.tensor(8 * shape.rows, grad=False)
        segments = g.embedding(shape.rows, spec.d_model, encoder.token_types)
        g.nodes[-1].aux = (types,)
        x = g.add(x, segments, spec.d_model)
    g.output = record_norm(g, spec, x) if spec.embedding_norm else x
    return g


def block_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """A block of an encoder without a decoder."""
    g = shape.graph()
    g.input = g.activation(spec.d_model)
    g.output = encoder_block(g, spec, shape, g.input)
    return g


def encoder_block(
    g: Graph, spec: ModelSpec, shape: Shape, x: Ref, bias: Ref | None = None, *, ends: bool = False
) -> Ref:
    """Attention in both directions and MLP around the residual stream, norms before or after; ``ends``: the encoder's last norm."""
    d, norm = spec.d_model, {"rms": spec.norm == "rmsnorm", "bias": spec.norm_bias}
    with g.call(x):
        if spec.pre_norm:
            h, y = g.add_norm(attention(g, spec, shape, record_norm(g, spec, x), bias=bias), x, d, **norm)
        else:
            h = y = g.add_norm(attention(g, spec, shape, x, bias=bias), x, d, **norm)[0]
    with g.call(h, y):
        mlp = record_mlp(g, spec, h)
        out = g.add(y, mlp, d) if spec.pre_norm else g.add_norm(mlp, y, d, **norm)[0]
        with g.call(out):
            return record_norm(g, spec, out) if ends else out


def attention(
    g: Graph, spec: ModelSpec, shape: Shape, h: Ref, source: Ref | None = None, *, bias: Ref | None = None,
    causal: bool = False,
) -> Ref:  # fmt: skip
    """Attention of ``h`` to ``source`` (itself where ``None``)."""
    d, width, read = spec.d_model, spec.d_attn, h if source is None else source
    with g.call(h):
        q, k, v = (g.linear(x, d, width, bias=spec.qkv_bias) for x in (h, read, read))
        with g.call(q, k, v):
            if bias is not None:
                out = biased_attention(g, spec, shape, (q, k, v), bias)
            else:
                out = g.attention(
                    q, k, v, batch=shape.micro_batch_size, n_heads=spec.n_heads, n_kv_heads=spec.n_heads,
                    head_dim=spec.head_dim, causal=causal,
                )  # fmt: skip
            return g.linear(out, width, d, bias=spec.attn_out_bias)


def head_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """A layer of its own with norm, projection to the vocabulary, cross-entropy."""
    g, d = shape.graph(), spec.d_model
    x = g.input = g.activation(d)
    with g.call(x):
        h = record_norm(g, spec, x) if spec.final_norm else x
        with g.call(h):
            h = g.linear_activate(h, d, d, spec.activation, bias=True)
        with g.call(h):
            g.output = g.linear_cross_entropy(
                record_norm(g, spec, h), d, spec.vocab_size, bias=spec.head_bias, pending=spec.tied_embeddings,
                factor_is_one=shape.factor_is_one,
            )  # fmt: skip
    return g
