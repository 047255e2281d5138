"""Multi-head latent attention as operators: mirrors ``runtime.models.latent`` statement by statement."""

from __future__ import annotations

from estimator.job.latent import LatentAttention
from estimator.job.model import ModelSpec
from estimator.ops.graph import Graph
from estimator.ops.tape import Node, Ref, part_of_block


@part_of_block("attention")
def latent_attention(g: Graph, spec: ModelSpec, latent: LatentAttention, micro_batch_size: int, h: Ref) -> Ref:
    """``LatentSelfAttention``. Kernels take one width of heads, so values are filled up to the keys'."""
    d, heads, value_width = spec.d_model, spec.n_heads, spec.n_heads * latent.value_head_dim
    place = (micro_batch_size, g.rows // micro_batch_size)
    with g.call(h):
        if latent.q_rank:
            q = g.linear(h, d, latent.q_rank, bias=latent.bias)
            q = g.norm(q, latent.q_rank, rms=True, bias=False)
            q = g.linear(q, latent.q_rank, heads * latent.head_dim, bias=False)
        else:
            q = g.linear(h, d, heads * latent.head_dim, bias=False)
        q = g.rotary(q, (*place, heads, latent.head_dim), latent.rope_head_dim)
        k, v = _keys_and_values(g, spec, latent, place, h)
        out = g.attention(
            q, k, v, batch=micro_batch_size, n_heads=heads, n_kv_heads=heads, head_dim=latent.head_dim,
            useful=(latent.head_dim + latent.value_head_dim) / (2 * latent.head_dim),
        )  # fmt: skip
        with g.call(out):
            if latent.value_head_dim < latent.head_dim:
                out = _trim(g, out, value_width, heads * latent.head_dim)
            return g.linear(out, value_width, d, bias=spec.attn_out_bias)


def _keys_and_values(
    g: Graph, spec: ModelSpec, latent: LatentAttention, place: tuple[int, int], h: Ref
) -> tuple[Ref, Ref]:
    rank, rope, heads = latent.kv_rank, latent.rope_head_dim, spec.n_heads
    kv_width = heads * (latent.nope_head_dim + latent.value_head_dim)
    narrow, positions = _split(g, g.linear(h, spec.d_model, rank + rope, bias=latent.bias), rank, rope)
    with g.call(narrow):
        positions = g.rotary(positions, (*place, 1, rope), rope)
        kv = g.linear(g.norm(narrow, rank, rms=True, bias=False), rank, kv_width, bias=False)
        return _join(g, positions, kv, heads * latent.head_dim, rope + kv_width)


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


def _join(g: Graph, positions: Ref, kv: Ref, width: int, width_in: int) -> tuple[Ref, Ref]:
    """``join_keys``: keys and values of ``width``, from ``width_in`` channels."""
    n_bytes = g.rows * (2 * width + width_in) * g.width
    outputs = (g.activation(width), g.activation(width))
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
