"""Units of an encoder-decoder (T5, BART) as operator graphs.

Each function mirrors one ``forward`` in ``runtime.models.encoder_decoder``, statement by statement. The encoder's result and T5's
position biases are read by many blocks: ``Tape.shared_tensor`` says what that means for memory.
"""

from __future__ import annotations

from estimator.job.encoder import Encoder
from estimator.job.model import ModelSpec
from estimator.ops.biased_attention import padded_places
from estimator.ops.encoder import attention, encoder_block
from estimator.ops.graph import Graph
from estimator.ops.layers import Shape, record_mlp, record_norm
from estimator.ops.tape import TEMPORARIES, Node, Ref
from estimator.sharding.units import Unit


def unit_graph(spec: ModelSpec, encoder: Encoder, unit: Unit, shape: Shape) -> Graph:
    """The forward pass of ``unit``."""
    if unit.kind == "embed":
        return _embedding(spec, encoder, shape)
    if unit.kind == "head":
        return _head(spec, shape)
    first, last = "_first" in unit.kind, "_last" in unit.kind
    g = shape.graph()
    g.input = g.activation(spec.d_model)
    bias = _shared_bias(g, spec, encoder, shape, first=first, last=last)
    if unit.kind.startswith("encoder"):
        g.output = encoder_block(g, spec, shape, g.input, bias, ends=last and spec.final_norm)
    else:
        memory = g.shared_tensor(shape.rows * spec.d_model * g.width, first=first, last=last)
        g.output = _decoder_block(g, spec, shape, (g.input, memory), bias)
    return g


def _shared_bias(g: Graph, spec: ModelSpec, encoder: Encoder, shape: Shape, *, first: bool, last: bool) -> Ref | None:
    """What all blocks of a stack add to their scores."""
    if not encoder.relative_buckets:
        return None
    rows_bytes = spec.n_heads * shape.seq_len * g.width
    return g.shared_tensor(
        rows_bytes * padded_places(shape.seq_len), first=first, last=last, n_grad_bytes=rows_bytes * shape.seq_len
    )


def _embedding(spec: ModelSpec, encoder: Encoder, shape: Shape) -> Graph:
    """Sources and targets, with one table of tokens: their gradients of it, and a tied head's, wait for each other."""
    g, d, tied = shape.graph(), spec.d_model, spec.tied_embeddings
    targets = g.tensor(8 * shape.rows, grad=False)
    tokens = g.tokens(d, spec.vocab_size, tied=True)
    category = g.nodes[-1].pending_category if tied else TEMPORARIES
    g.nodes[-1].pending_category = category
    x, source_bias = _side(g, spec, encoder, shape, tokens, causal=False)
    tokens = g.embedding(shape.rows, d, spec.vocab_size, tied=tied)
    node = g.nodes[-1]
    node.aux, node.pending_category, node.stays_pending = (targets,), category, True
    if not tied:
        node.pending_grad_bytes, node.param_grad_bytes = node.param_grad_bytes, 0
    y, target_bias = _side(g, spec, encoder, shape, tokens, causal=True)
    g.output, g.further_outputs = x, (y, *source_bias, *target_bias)
    return g


def _side(
    g: Graph, spec: ModelSpec, encoder: Encoder, shape: Shape, x: Ref, *, causal: bool
) -> tuple[Ref, tuple[Ref, ...]]:
    """Looked-up tokens with what is the sources' or the targets' own, and the storage and view of their attention's bias."""
    with g.call(x):
        if spec.position_rows:
            x = g.add_learned_positions(x, spec.d_model, spec.position_rows, shape.seq_len)
        if spec.embedding_norm:
            x = record_norm(g, spec, x)
        return x, _relative_bias(g, spec, encoder, shape.seq_len, causal=causal) if encoder.relative_buckets else ()


def _relative_bias(g: Graph, spec: ModelSpec, encoder: Encoder, seq_len: int, *, causal: bool) -> tuple[Ref, ...]:
    """A number for each head and distance, spread over all pairs of places in fp32."""
    padded, w, low = padded_places(seq_len), g.width, g.dtype != "fp32"
    line, pairs = spec.n_heads * (seq_len + padded - 1), spec.n_heads * seq_len * padded

    def step(x: Ref, n_bytes: int, name: str, moved_bytes: int, grad_bytes: int = 0) -> Ref:
        """An operator that keeps nothing."""
        out = g.tensor(n_bytes)
        g.tensors[out].n_grad_bytes = grad_bytes or n_bytes
        ops = (g.elementwise(name, moved_bytes),), (g.elementwise(f"{name}_backward", moved_bytes, 0, True),)
        return g.record(Node((x,), (out,), *(ops if moved_bytes else ((), ops[1][:0]))))

    x = g.embedding(seq_len + padded - 1, spec.n_heads, encoder.relative_buckets)
    if causal:
        with g.call(x):
            x = step(x, w * line, "masked_fill", 2 * w * line)
    with g.call(x):
        x = step(x, 4 * line, "line_to_fp32", (w + 4) * line) if low else x
        with g.call(x):
            x = step(x, 0, "windows", 0, grad_bytes=4 * pairs)
            x = step(x, 4 * pairs, "flip", 8 * pairs)
        x = step(x, w * pairs, "bias_from_fp32", (w + 4) * pairs) if low else x
    if padded == seq_len:
        return (x,)
    view = step(x, 0, "cut", 0, grad_bytes=w * spec.n_heads * seq_len * seq_len)
    return x, view


def _decoder_block(g: Graph, spec: ModelSpec, shape: Shape, streams: tuple[Ref, Ref], bias: Ref | None) -> Ref:
    """Attention to the targets so far, to the encoder's result, and MLP, norms before or after."""
    (y, memory), d, norm = streams, spec.d_model, {"rms": spec.norm == "rmsnorm", "bias": spec.norm_bias}
    with g.call(y):
        if not spec.pre_norm:
            y, _ = g.add_norm(attention(g, spec, shape, y, bias=bias, causal=True), y, d, **norm)
            with g.call(y):
                y, _ = g.add_norm(attention(g, spec, shape, y, memory), y, d, **norm)
            with g.call(y):
                return g.add_norm(record_mlp(g, spec, y), y, d, **norm)[0]
        own = attention(g, spec, shape, record_norm(g, spec, y), bias=bias, causal=True)
        h, y = g.add_norm(own, y, d, **norm)
    with g.call(h, y):
        h, y = g.add_norm(attention(g, spec, shape, h, memory), y, d, **norm)
    with g.call(h, y):
        return g.add(y, record_mlp(g, spec, h), d)


def _head(spec: ModelSpec, shape: Shape) -> Graph:
    """Final norm, projection to the vocabulary, cross-entropy."""
    g, d = shape.graph(), spec.d_model
    y = g.input = g.activation(d)
    with g.call(y):
        h = record_norm(g, spec, y) if spec.final_norm else y
        if spec.positions == "relative" and spec.tied_embeddings:
            n_bytes = 2 * shape.rows * d * g.width
            scale = (
                g.elementwise("scale", n_bytes, shape.rows * d),
                g.elementwise("scale", n_bytes, shape.rows * d, True),
            )
            h = g.record(Node((h,), (g.activation(d),), scale[:1], scale[1:]))
        g.output = g.linear_cross_entropy(
            h, d, spec.vocab_size, bias=spec.head_bias, pending=spec.tied_embeddings, factor_is_one=shape.factor_is_one
        )
        if h == y and g.nodes[-1].kept_grads:  # nobody keeps it, but the model's forward still has it in hand
            g.nodes[-1].saves = (y,)
    return g
