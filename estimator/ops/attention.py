"""Attention by other kernels than flash: torch's memory-efficient one, and those for which all scores exist.

Mirrors ``runtime.functional`` and ``runtime.score_attention`` statement by statement. A product of scores is that of the whole
square, also where half of it is masked: ``Op.useful`` says which share the model asks for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from estimator.ops.operator import Op
from estimator.ops.tape import Node, Ref
from estimator.ops.written_out import dropout
from estimator.sharding.layout import align
from estimator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from estimator.ops.graph import Graph

EFFICIENT_LSE_ROWS = 32
"""The memory-efficient kernel pads log-sum-exps to so many rows (PyTorch's ``attention.cu``), ..."""
SEEDS_BYTES = 16
"""... and returns seed and offset of a dropout that there is not."""


class Heads(NamedTuple):
    """Shapes of one attention: ``rows`` tokens in ``batch`` sequences."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rows: int
    causal: bool = True
    useful: float = 1.0

    @property
    def seq_len(self) -> int:
        return self.rows // self.batch

    @property
    def square(self) -> int:
        """Pairs of places of all heads."""
        return self.batch * self.n_heads * self.seq_len * self.seq_len

    @property
    def numel(self) -> int:
        """Elements of the queries, and of the result."""
        return self.rows * self.n_heads * self.head_dim


def efficient_attention(g: Graph, h: Heads, flash: Node) -> Ref:
    """``flash`` (the node of the same attention by that kernel) by the memory-efficient one, whose statistics are padded."""
    lse_bytes = h.batch * h.n_heads * align(h.seq_len, EFFICIENT_LSE_ROWS) * 4 + SEEDS_BYTES
    forward, backward = (
        tuple(op._replace(name=f"efficient_{op.name}") for op in ops) for ops in (flash.forward, flash.backward)
    )
    return g.record(replace(flash, forward=forward, backward=backward, aux=(g.tensor(lse_bytes, grad=False),)))


def score_attention(g: Graph, h: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """Attention with all scores: ``eager`` or ``math``, by the tape's style."""
    if g.style.attention == "eager" and g.style.fused_softmax:
        return _in_place(g, h, q, k, v)
    first = tuple(_heads_first(g, h, x, n) for x, n in ((q, h.n_heads), (k, h.n_kv_heads), (v, h.n_kv_heads)))
    with g.call(*first):
        out = (_written_out if g.style.attention == "eager" else _composite)(g, h, *first)
        with g.call(out):
            return _moved(g, "heads_last", out, h.numel, h.numel)


# ---- layouts --------------------------------------------------------------------------------------------------------


def _heads_first(g: Graph, h: Heads, x: Ref, n_heads: int) -> Ref:
    """A copy in which ``n_heads`` have become as many as there are query heads."""
    source = h.rows * n_heads * h.head_dim
    return _moved(g, "heads_first", x, source, h.numel, source * g.width if n_heads < h.n_heads else 0)


def _moved(g: Graph, name: str, x: Ref, numel_in: int, numel_out: int, sum_bytes: int = 0) -> Ref:
    n_bytes = (numel_in + numel_out) * g.width
    return g.record(
        Node(
            (x,),
            (g.tensor(numel_out * g.width),),
            forward=(g.elementwise(name, n_bytes),),
            backward=(g.elementwise(f"{name}_backward", n_bytes + 2 * sum_bytes, 0, True),),
            backward_temp_bytes=sum_bytes,
            saves_after=True,
        )
    )


# ---- products -------------------------------------------------------------------------------------------------------


def _bmm(g: Graph, name: str, h: Heads, a: Ref, b: Ref, *, to_scores: bool, dtype: str, temp_bytes: int = 0) -> Ref:
    """``batch * n_heads`` products: of queries and keys ``to_scores``, else of weights and values."""
    width, s, d = DTYPE_BYTES[dtype], h.seq_len, h.head_dim
    flops, n_bytes = 2.0 * h.square * d, (h.square + 2 * h.numel) * width
    n, k = (s, d) if to_scores else (d, s)
    products = h.batch * h.n_heads

    def op(of: str, m: int, n: int, k: int, backward: bool) -> Op:
        return Op(name + of, "matmul", backward, dtype, flops, n_bytes, (products, m, n, k), useful=h.useful)

    return g.record(
        Node(
            (a, b),
            (g.tensor((h.square if to_scores else h.numel) * width),),
            forward=(op("", s, n, k, False),),
            backward=(op("_grad", s, k, n, True), op("_grad", k, n, s, True)),
            saves=(a, b),
            forward_temp_bytes=temp_bytes,
        )
    )


def _pointwise(
    g: Graph, name: str, x: Ref, numel: int, widths: tuple[int, int], *, passes_grad: bool = False, temp_bytes: int = 0
) -> Ref:
    """One operator that keeps nothing; ``widths``: bytes of an element of what goes in and comes out."""
    n_bytes = numel * sum(widths)
    return g.record(
        Node(
            (x,),
            (g.tensor(numel * widths[1]),),
            forward=(g.elementwise(name, n_bytes, numel),),
            backward=() if passes_grad else (g.elementwise(f"{name}_backward", n_bytes, numel, True),),
            passes_grad=passes_grad,
            forward_temp_bytes=temp_bytes,
        )
    )


def _softmax(g: Graph, name: str, x: Ref, numel: int, width: int, *, in_place: bool = False) -> Ref:
    """Keeps its result; ``in_place``: backward writes over the gradient that comes in."""
    y = g.record(
        Node(
            (x,),
            (g.tensor(numel * width),),
            forward=(g.elementwise(name, 2 * numel * width, 5 * numel),),
            backward=(g.elementwise(f"{name}_backward", 3 * numel * width, 5 * numel, True),),
            passes_grad=in_place,
        )
    )
    g.nodes[-1].saves = (y,) if g.tensors[y].n_grad_bytes else ()
    return y


def _mask(g: Graph, h: Heads, width: int, temp_bytes: int = 0) -> Ref:
    """``[S, S]``, of which nothing asks a gradient."""
    numel = h.seq_len * h.seq_len
    mask = g.tensor(numel * width, grad=False)
    forward = (g.elementwise("causal_mask", 3 * numel * width),)
    return g.record(Node((), (mask,), forward=forward, forward_temp_bytes=temp_bytes))


def _written_out(g: Graph, h: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """``_written_out``: every line's result lives until the next has its own."""
    w, low = g.width, g.dtype != "fp32"
    scores = _bmm(g, "scores", h, q, k, to_scores=True, dtype=g.dtype)
    weights = _pointwise(g, "scale", scores, h.square, (w, w))
    if h.causal:
        mask = _mask(g, h, w)
        with g.call(mask):
            weights = _pointwise(g, "add_mask", weights, h.square, (w, w), passes_grad=True)
    with g.call(weights):
        wide = _pointwise(g, "to_fp32", weights, h.square, (w, 4)) if low else weights
        weights = _softmax(g, "softmax", wide, h.square, 4)
        if low:
            weights = _pointwise(g, "from_fp32", weights, h.square, (4, w))
    with g.call(weights):
        return _bmm(g, "context", h, weights, v, to_scores=False, dtype=g.dtype)


def _composite(g: Graph, h: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """``_scaled_dot_product_attention_math``: operands in fp32, all of whose copies live until it returns, each multiplied by the
    root of the scale; the weights are copied back to the model's dtype for a caller who does not ask for them."""
    w, low = g.width, g.dtype != "fp32"
    copy_bytes = h.square * w if low else 0
    wide = tuple(_pointwise(g, "to_fp32", x, h.numel, (w, 4)) if low else x for x in (q, k, v))
    with g.call(*wide):
        scaled_q = _pointwise(g, "scale", wide[0], h.numel, (4, 4))
        mask = _mask(g, h, 4, h.seq_len * h.seq_len) if h.causal else None
        with g.call(scaled_q, *(() if mask is None else (mask,))):
            scaled_k = _pointwise(g, "scale", wide[1], h.numel, (4, 4))
            scores = _bmm(g, "scores", h, scaled_q, scaled_k, to_scores=True, dtype="fp32")
            with g.call(scores):
                if h.causal:
                    masked = _pointwise(g, "add_mask", scores, h.square, (4, 4), passes_grad=True)
                else:
                    masked = scores
            weights = _softmax(g, "softmax", masked, h.square, 4)
            with g.call(weights):
                out = _bmm(g, "context", h, weights, wide[2], to_scores=False, dtype="fp32", temp_bytes=copy_bytes)
                return _pointwise(g, "from_fp32", out, h.numel, (4, w), temp_bytes=copy_bytes) if low else out


def _in_place(g: Graph, h: Heads, q: Ref, k: Ref, v: Ref) -> Ref:
    """Megatron-LM's ``CoreAttention`` (Korthikanti et al. 2022): products read and write heads where they lie, the
    first one beside a buffer that it does not read; scale, mask and softmax are one kernel, whose backward pass is in place."""
    if h.n_kv_heads < h.n_heads:
        repeats, width = h.n_heads // h.n_kv_heads, h.n_kv_heads * h.head_dim
        k, v = g.repeat_heads(k, width, repeats), g.repeat_heads(v, width, repeats)
    square_bytes = h.square * g.width
    scores = _bmm(g, "scores", h, q, k, to_scores=True, dtype=g.dtype, temp_bytes=square_bytes)
    weights = _softmax(g, "scale_mask_softmax", scores, h.square, g.width, in_place=True)
    if g.style.drops_out:
        weights = dropout(g, weights, h.square)
    with g.call(weights):
        out = _bmm(g, "context", h, weights, v, to_scores=False, dtype=g.dtype)
        return _moved(g, "heads_last", out, h.numel, h.numel)
