"""Attention of ranks that share a sequence, as ``runtime.parallel.ulysses`` and ``runtime.parallel.ring`` compute it."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.context import ContextKind
from estimator.job.mesh import Span
from estimator.ops.graph import Graph
from estimator.ops.operator import Op
from estimator.ops.ring import Heads, ring_attention
from estimator.ops.tape import Node, Ref
from estimator.ops.window import windowed


class Context(NamedTuple):
    """How ranks share sequences, and which: each has an equal part of every sequence's tokens."""

    kind: ContextKind = "ulysses"
    span: Span = Span(1)

    @property
    def size(self) -> int:
        return self.span.size


def shared_attention(g: Graph, context: Context, heads: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """From queries, keys and values of this rank's tokens to what they attend to."""
    if context.kind == "ulysses":
        return _ulysses(g, context, heads, q, k, v)
    return ring_attention(g, context.span, heads, q, k, v)


def _ulysses(g: Graph, context: Context, heads: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """Tokens of all ranks, this rank's share of the heads: as many bytes as before."""
    n = context.size
    n_heads, n_kv_heads = heads.n_heads // n, heads.n_kv_heads // n
    width, kv_width = heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim
    q, k, v = _exchanged(g, context, (q, k, v), (width, kv_width, kv_width))
    with g.call(q, k, v):
        if heads.repeats_kv and n_kv_heads < n_heads:
            repeats = n_heads // n_kv_heads
            k, v = g.repeat_heads(k, kv_width, repeats), g.repeat_heads(v, kv_width, repeats)
            n_kv_heads = n_heads
        out = g.attention(
            q, k, v, batch=heads.batch, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=heads.head_dim,
            window=heads.window, rows=g.rows * n,
        )  # fmt: skip
        windowed(g, heads._replace(n_heads=n_heads, n_kv_heads=n_kv_heads), g.rows * n)
        # a flash kernel's result lies as its queries do, which is as a message does
        return _given_back(g, context, out, width, is_packed=g.style.attention != "flash" and heads.batch > 1)


def _all_to_all(g: Graph, context: Context, n_bytes: int, *, backward: bool) -> Op:
    return Op("all_to_all", "collective", backward, g.dtype, 0, n_bytes, (0,), span=context.span)


def _exchanged(g: Graph, context: Context, heads: tuple[Ref, ...], widths: tuple[int, ...]) -> tuple[Ref, ...]:
    """Heads of this rank's tokens for tokens of this rank's heads: one message, in which they then stay."""
    sizes = [g.rows * width * g.width for width in widths]
    n_bytes = sum(sizes)
    outputs = tuple(g.activation(width) for width in widths)
    for number, ref in enumerate(outputs):
        g.tensors[ref].n_bytes = 0 if number else n_bytes
    g.record(
        Node(
            heads,
            outputs,
            forward=(g.elementwise("pack_heads", 2 * n_bytes), _all_to_all(g, context, n_bytes, backward=False)),
            backward=(
                g.elementwise("pack_heads", 2 * n_bytes, 0, True),
                _all_to_all(g, context, n_bytes, backward=True),
                g.elementwise("unpack_heads", 2 * n_bytes, 0, True),
            ),
            forward_temp_bytes=n_bytes,
            backward_temp_bytes=n_bytes,
        )
    )
    return outputs


def _given_back(g: Graph, context: Context, out: Ref, width: int, *, is_packed: bool) -> Ref:
    """Tokens of this rank's heads for heads of this rank's tokens; ``is_packed``: they are copied to a message first."""
    n_bytes = g.rows * width * g.width
    return g.record(
        Node(
            (out,),
            (g.activation(width),),
            forward=(
                *((g.elementwise("pack_heads", 2 * n_bytes),) if is_packed else ()),
                _all_to_all(g, context, n_bytes, backward=False),
                g.elementwise("unpack_heads", 2 * n_bytes),
            ),
            backward=(
                g.elementwise("pack_heads", 2 * n_bytes, 0, True),
                _all_to_all(g, context, n_bytes, backward=True),
            ),
            forward_temp_bytes=2 * n_bytes if is_packed else n_bytes,
            backward_temp_bytes=n_bytes,
        )
    )
