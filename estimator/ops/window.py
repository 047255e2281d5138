"""Attention with a window or sinks: mirrors what ``runtime.window_attention`` needs beside what flash attention does."""

from __future__ import annotations

from estimator.ops.ring import Heads
from estimator.ops.tape import Tape


def windowed(t: Tape, heads: Heads, n_tokens: int) -> None:
    """The attention by ``heads`` of ``n_tokens`` that was recorded last: a CPU's window is a mask, put together of two; sinks scale
    every row's result, and are trained. Frameworks other than this project's have kernels of their own."""
    node = t.nodes[-1]
    if t.style.attention != "flash" or not (heads.sinks or heads.masks):
        return
    seq_len, rows = n_tokens // heads.batch, n_tokens * heads.n_heads
    mask_bytes = seq_len * seq_len * t.width if heads.masks and 0 < heads.window < seq_len else 0
    made = sum(t.tensors[ref].n_bytes for ref in (*node.outputs, *node.aux))
    share_bytes = rows * (4 + (t.width if t.dtype != "fp32" else 0)) if heads.sinks else 0
    node.forward_temp_bytes = max(mask_bytes, 2 * mask_bytes - made, share_bytes)
    kv_bytes = 2 * n_tokens * heads.n_kv_heads * heads.head_dim * t.width
    node.backward_temp_bytes = max(mask_bytes, 4 * rows - kv_bytes if heads.sinks else 0)
    if not heads.sinks:
        return
    n_bytes = rows * heads.head_dim * t.width
    node.param_grad_bytes = heads.n_heads * t.width
    node.forward = (
        *node.forward,
        t.elementwise("scale_by_sinks", 2 * n_bytes + 12 * rows, 8 * rows)._replace(launches=5),
    )
    scores = t.elementwise("sinks_backward", 4 * n_bytes + 12 * rows, 4 * rows, True)._replace(launches=6)
    node.backward = (scores, *node.backward, *t.accumulated(heads.n_heads))
