"""Multi-head latent attention as operators: mirrors ``runtime.models.latent`` statement by statement."""

from __future__ import annotations

from estimator.job.latent import LatentAttention
from estimator.job.model import ModelSpec
from estimator.ops.context import Context, shared_attention
from estimator.ops.graph import Graph
from estimator.ops.ring import Heads
from estimator.ops.tape import Node, Ref, part_of_block


@part_of_block("attention")
def latent_attention(
    g: Graph, spec: ModelSpec, latent: LatentAttention, micro_batch_size: int, context: Context, h: Ref
) -> Ref:  # fmt: skip
    """``LatentSelfAttention``, whose sequences ranks share as ``context`` says. Where kernels take one width of heads, values are
    filled up to the keys'."""
    d, heads = spec.d_model, g.share(spec.n_heads)
    value_width = heads * latent.value_head_dim
    place = (micro_batch_size, g.rows // micro_batch_size)
    with g.call(h):
        if latent.q_rank:
            q = g.stream_linear(h, d, latent.q_rank, bias=latent.bias)
            q = g.norm(q, latent.q_rank, rms=True, bias=False)
            (q,) = g.columns(q, latent.q_rank, (heads * latent.head_dim,), bias=False)
        else:
            (q,) = g.columns(h, d, (heads * latent.head_dim,), bias=False)
        q = g.rotary(q, (*place, heads, latent.head_dim), latent.rope_head_dim)
        k, v = _keys_and_values(g, spec, latent, place, h)
        with g.part("core_attention"), g.call(q, k, v):
            out = _attention(g, latent, micro_batch_size, heads, context, q, k, v)
        if not g.style.pads_values:
            _take_two_widths(g, out, value_width)
            with g.call(out):
                return g.row(out, value_width, d, bias=spec.attn_out_bias)
        with g.call(out):
            if latent.value_head_dim < latent.head_dim:
                out = _trim(g, out, value_width, heads * latent.head_dim)
            return g.row(out, value_width, d, bias=spec.attn_out_bias)


def _attention(
    g: Graph, latent: LatentAttention, batch: int, heads: int, context: Context, q: Ref, k: Ref, v: Ref
) -> Ref:  # fmt: skip
    useful = (latent.head_dim + latent.value_head_dim) / (2 * latent.head_dim)
    if context.size == 1:
        return g.attention(
            q, k, v, batch=batch, n_heads=heads, n_kv_heads=heads, head_dim=latent.head_dim, useful=useful
        )  # fmt: skip
    first = len(g.nodes)
    out = shared_attention(g, context, Heads(batch, heads, heads, latent.head_dim, 0), q, k, v)
    for node in g.nodes[first:]:
        node.forward = tuple(op._replace(useful=useful) if op.kind == "attention" else op for op in node.forward)
    return out


def _keys_and_values(
    g: Graph, spec: ModelSpec, latent: LatentAttention, place: tuple[int, int], h: Ref
) -> tuple[Ref, Ref]:
    rank, rope, heads = latent.kv_rank, latent.rope_head_dim, g.share(spec.n_heads)
    kv_width = heads * (latent.nope_head_dim + latent.value_head_dim)
    both = g.stream_linear(h, spec.d_model, rank + rope, bias=latent.bias)
    with g.of_rows(g.stream_rows):
        narrow, positions = _split(g, both, rank, rope)
    with g.call(narrow):
        positions = g.rotary(g.enter(positions, rope), (*place, 1, rope), rope)
        g.sum_input_gradient(rope)
        (kv,) = g.columns(g.norm(narrow, rank, rms=True, bias=False), rank, (kv_width,), bias=False)
        key_width = heads * latent.head_dim
        value_width = key_width if g.style.pads_values else heads * latent.value_head_dim
        return _join(g, positions, kv, (key_width, value_width), rope + kv_width)


def _split(g: Graph, x: Ref, rank: int, rope: int) -> tuple[Ref, Ref]:
    """``split_latent``: two copies."""
    n_bytes = 2 * g.rows * (rank + rope) * g.width
    outputs = (g.activation(rank), g.activation(rope))
    node = Node(
        (x,),
        outputs,
        forward=(g.elementwise("split_latent", n_bytes),),
        backward=(g.elementwise("split_latent_backward", n_bytes, 0, True),),
    )
    g.record(node)
    return outputs


def _take_two_widths(g: Graph, out: Ref, value_width: int) -> None:
    """The attention that was recorded last did the work of its values' own width, which its result ``out`` has."""
    node = g.nodes[-1]
    g.tensors[out].n_bytes = g.tensors[out].n_grad_bytes = g.rows * value_width * g.width
    useful = node.forward[0].useful
    node.forward = tuple(op._replace(flops=op.flops * useful, useful=1.0) for op in node.forward)
    node.backward = tuple(op._replace(flops=op.flops * useful) for op in node.backward)


def _join(g: Graph, positions: Ref, kv: Ref, widths: tuple[int, int], width_in: int) -> tuple[Ref, Ref]:
    """``join_keys``: keys and values of ``widths``, from ``width_in`` channels."""
    n_bytes = g.rows * (sum(widths) + width_in) * g.width
    outputs = (g.activation(widths[0]), g.activation(widths[1]))
    node = Node(
        (positions, kv),
        outputs,
        forward=(g.elementwise("join_keys", n_bytes),),
        backward=(g.elementwise("join_keys_backward", n_bytes, 0, True),),
    )
    g.record(node)
    return outputs


def _trim(g: Graph, x: Ref, width: int, width_in: int) -> Ref:
    """The channels that are values; backward fills up with zeros."""
    n_bytes = g.rows * g.width
    return g.record(
        Node(
            (x,),
            (g.activation(width),),
            forward=(g.elementwise("trim_heads", 2 * width * n_bytes),),
            backward=(g.elementwise("trim_heads_backward", (2 * width + width_in) * n_bytes, 0, True),),
        )
    )
