"""Attention with a trained number for every pair of places (T5), as an operator: what ``runtime.biased_attention`` does."""

from __future__ import annotations

from estimator.job.encoder import Encoder
from estimator.job.model import ModelSpec
from estimator.ops.graph import Graph
from estimator.ops.layers import Shape
from estimator.ops.operator import Op
from estimator.ops.tape import Node, Ref
from estimator.sharding.layout import align
from estimator.units import DTYPE_BYTES

BIAS_ROW_NUMEL = 8
"""Rows of a bias start at multiples of so many elements: 16 bytes in bf16, which the memory-efficient kernel asks for."""
BIAS_GRAD_ROW_NUMEL = 16
"""That kernel pads rows of the bias's gradient to so many elements (PyTorch's ``attention_backward.cu``)."""
_SEEDS_BYTES = 16
"""Seed and offset of a dropout that there is not, which it returns too."""


def padded_places(seq_len: int) -> int:
    """Elements from one row of a ``[H, S, S]`` bias to the next."""
    return align(seq_len, BIAS_ROW_NUMEL)


def distance_table_bytes(encoder: Encoder, seq_len: int) -> int:
    """Tables that live beside the parameters: for every distance its bucket, int64, of encoder and decoder, and for the decoder
    whether it lies ahead."""
    return (8 + 8 + 1) * (seq_len + padded_places(seq_len) - 1) if encoder.relative_buckets else 0


def biased_attention(g: Graph, spec: ModelSpec, shape: Shape, qkv: tuple[Ref, Ref, Ref], bias: Ref) -> Ref:
    """``runtime.biased_attention``: keeps queries, keys, values, bias, its result and one fp32 per row and head.

    All pairs of places are computed, also where the bias hides what lies ahead. Backward has the bias's gradient for every
    sequence, and sums it.
    """
    batch, seq_len, heads, head_dim = shape.micro_batch_size, shape.seq_len, spec.n_heads, spec.head_dim
    flops = 4.0 * batch * heads * head_dim * seq_len * seq_len
    own, row = g.rows * spec.d_attn * g.width, heads * seq_len * g.width
    grads_bytes = batch * row * align(seq_len, BIAS_GRAD_ROW_NUMEL)
    n_bytes, call = 4 * own + row * seq_len, (batch, heads, heads, seq_len, head_dim, 0)
    backward = (
        Op("attention_backward", "attention", True, g.dtype, 2.5 * flops, 2 * n_bytes + grads_bytes, call),
        g.elementwise("sum_over_batch", grads_bytes + row * seq_len, batch * heads * seq_len * seq_len, True),
    )
    plain = shape.is_cpu
    lse_bytes = batch * heads * (seq_len if plain else align(seq_len, 32)) * 4 + (0 if plain else _SEEDS_BYTES)
    temps = _plain_temps(batch, seq_len, spec, g.dtype) if plain else (0, grads_bytes)
    out = g.activation(spec.d_attn)
    return g.record(
        Node(
            (*qkv, bias),
            (out,),
            forward=(Op("attention", "attention", False, g.dtype, flops, n_bytes, call),),
            backward=backward,
            saves=(*qkv, bias, out),
            aux=(g.tensor(lse_bytes, grad=False),),
            forward_temp_bytes=temps[0],
            backward_temp_bytes=temps[1],
            cached=not plain,
            saves_after=True,
        )
    )


def _plain_temps(batch: int, seq_len: int, spec: ModelSpec, dtype: str) -> tuple[int, int]:
    """Bytes beside results, forward and backward, of the plain form: where it has the scores of all pairs, and where it puts heads
    back in their place. Operands whose heads are put first are copies, but for a single sequence."""
    w, extra = DTYPE_BYTES[dtype], DTYPE_BYTES[dtype] if dtype != "fp32" else 0
    own, pairs = batch * seq_len * spec.d_attn * w, batch * spec.n_heads * seq_len * seq_len
    copy, row_bytes = own if batch > 1 else 0, 4 * batch * spec.n_heads * seq_len
    later = 3 * own + spec.n_heads * seq_len * seq_len * w - own  # results that do not exist yet at the first place
    forward = max((4 + extra) * pairs + 2 * copy - own - row_bytes, w * pairs + own)
    backward = (
        (8 + extra) * pairs + (3 if extra else 4) * copy + row_bytes - later,
        w * pairs + 3 * copy + own + row_bytes,
    )
    return forward, max(backward)
