"""Ring attention as ``runtime.parallel.ring`` computes it, event by event: operators, messages and live bytes.

All ranks compute as much; the forecast's live bytes are those of the last rank, which beside its own tokens never computes with
half of its queries, but with half of the keys: others' temporaries are at most as large.
"""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.mesh import Span
from estimator.ops.graph import Graph
from estimator.ops.operator import Op
from estimator.ops.tape import Node, Ref


class Heads(NamedTuple):
    """Attention of one (tensor-parallel) rank's heads."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int
    repeats_kv: bool = False
    """The kernel has no grouped form."""
    sinks: bool = False
    """Each head has a learned score of a key that gives nothing."""
    masks: bool = False
    """The kernel (a CPU's) takes windows as masks."""


class _Bytes:
    """Live bytes beside what goes in."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, *sizes: int) -> None:
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def drop(self, *sizes: int) -> None:
        self.live -= sum(sizes)


class _Sizes(NamedTuple):
    """Bytes of one rank's tensors."""

    q: int
    """Queries, and results."""
    kv: int
    """Keys and values."""
    lse: int
    copies: int
    """Keys and values for every head, where the kernel needs them."""
    q_sum: int
    """Sums in fp32 where ``q`` is not."""
    kv_sum: int


def ring_attention(g: Graph, span: Span, heads: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """Causal attention of this rank's tokens to all those before, on the ``span.size`` ranks of a ring."""
    h, d, w = heads.n_heads, heads.head_dim, g.width
    q_bytes, kv_bytes = g.rows * h * d * w, 2 * g.rows * heads.n_kv_heads * d * w
    repeats = heads.repeats_kv and heads.n_kv_heads < h
    sizes = _Sizes(
        q=q_bytes, kv=kv_bytes, lse=4 * g.rows * h, copies=2 * q_bytes if repeats else 0, q_sum=q_bytes // w * 4,
        kv_sum=kv_bytes // w * 4,
    )  # fmt: skip
    out, lse = g.activation(h * d), g.tensor(sizes.lse, grad=False)
    low = w < 4
    return g.record(
        Node(
            (q, k, v),
            (out,),
            forward=_forward_ops(g, span, heads, sizes),
            backward=_backward_ops(g, span, heads, sizes),
            saves=(q, k, v, out),
            aux=(lse,),
            forward_temp_bytes=_forward_bytes(span.size, sizes, low=low) - sizes.q - sizes.lse,
            backward_temp_bytes=_backward_bytes(span.size, sizes, low=low) - sizes.q - sizes.kv,
            cached=True,
            saves_after=True,
        )
    )


# ---- operators ----------------------------------------------------------------------------------------------------


def _blocks(g: Graph, span: Span, heads: Heads, sizes: _Sizes, *, backward: bool) -> list[Op]:
    """Attention of each step: within the rank's own tokens, then to half as many keys of each other rank (or of half the queries
    to all of them)."""
    h, kv, d, s = heads.n_heads, heads.n_kv_heads, heads.head_dim, g.rows // heads.batch
    name, shape = "attention_backward" if backward else "attention", (heads.batch, h, kv, s, d, 0)
    ops = []
    for step in range(span.size):
        pairs = s * (s + 1) / 2 if step == 0 else s * s / 2
        flops = 4.0 * heads.batch * h * d * pairs * (2.5 if backward else 1)
        n_bytes = (2 * sizes.q + (sizes.kv if step == 0 else sizes.kv // 2)) * (2 if backward else 1)
        ops.append(Op(name, "attention", backward, g.dtype, flops, n_bytes, shape))
    return ops


def _send(g: Graph, span: Span, n_bytes: int, number: int, *, backward: bool, beside: int = 1) -> Op:
    """``number`` messages to the next rank while the next operator runs."""
    return Op("send", "collective", backward, g.dtype, 0, n_bytes, (beside,), number, span=span)


def _forward_ops(g: Graph, span: Span, heads: Heads, sizes: _Sizes) -> tuple[Op, ...]:
    ops: list[Op] = []
    for step, block in enumerate(_blocks(g, span, heads, sizes, backward=False)):
        if step + 1 < span.size:
            ops.append(_send(g, span, sizes.kv, 2, backward=False))
        ops.append(block)
        if step:
            ops.append(g.elementwise("merge_attention", 4 * sizes.q_sum + sizes.q)._replace(launches=8))
    return tuple(ops)


def _backward_ops(g: Graph, span: Span, heads: Heads, sizes: _Sizes) -> tuple[Op, ...]:
    ops: list[Op] = []
    for step, block in enumerate(_blocks(g, span, heads, sizes, backward=True)):
        on = sizes.kv if step + 1 < span.size else 0
        grads = sizes.kv_sum if step else 0
        ops += [_send(g, span, on + grads, 2 * bool(on) + 2 * bool(grads), backward=True), block]
        n_bytes = 2 * sizes.q_sum + sizes.q + 2 * sizes.kv_sum + sizes.kv
        ops.append(g.elementwise("sum_attention_grads", n_bytes, 0, True)._replace(launches=3))
    ops.append(_send(g, span, sizes.kv_sum, 2, backward=True, beside=0))
    return tuple(ops)


# ---- live bytes ---------------------------------------------------------------------------------------------------


def _forward_bytes(n: int, sizes: _Sizes, *, low: bool) -> int:
    b = _Bytes()
    for step in range(n):
        more = step + 1 < n
        b.add(sizes.kv if more else 0)
        copies = sizes.copies if step == 0 else sizes.copies // 2
        b.add(copies)
        b.add(sizes.q, sizes.lse)
        b.drop(copies)
        if step == 0 and low:
            b.add(sizes.q_sum)
            b.drop(sizes.q)
        if step:
            b.add(2 * sizes.lse)
            b.drop(2 * sizes.lse, sizes.lse, sizes.q)
        b.drop(sizes.kv if more and step else 0)
    if low:
        b.add(sizes.q)
    return b.peak


def _backward_bytes(n: int, sizes: _Sizes, *, low: bool) -> int:
    b = _Bytes()
    for step in range(n):
        more = step + 1 < n
        part = 1 if step == 0 else 2
        kv, copies = sizes.kv // part, sizes.copies // part
        b.add(sizes.kv if more else 0)
        b.add(copies)
        b.add(sizes.q, copies or kv)
        if copies:
            b.drop(copies)
            b.add(kv)
            b.drop(copies)
        if step == 0:
            if low:
                b.add(sizes.q_sum, sizes.kv_sum)
                b.drop(sizes.q, kv)
        else:
            b.drop(sizes.kv_sum)  # what has been sent
            b.drop(sizes.q, kv)
        b.add(sizes.kv_sum)
        b.drop(sizes.kv if more and step else 0)
    b.drop(sizes.kv_sum)
    if low:
        b.add(sizes.q, sizes.kv)
    return b.peak
