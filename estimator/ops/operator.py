"""``Op``: one operator call as the time reader sees it."""

from __future__ import annotations

from typing import Literal, NamedTuple

OpKind = Literal["matmul", "attention", "elementwise", "norm", "embedding", "loss", "optimizer"]


class Op(NamedTuple):
    """One kernel-sized piece of work.

    ``shape`` is ``(batch, m, n, k)`` for a matmul (``batch`` independent products of m x k by k x n) and
    ``(batch, n_heads, n_kv_heads, seq_len, head_dim, window)`` for causal attention (window 0: none); empty otherwise.
    """

    name: str
    kind: OpKind
    backward: bool
    dtype: str
    flops: float
    """Floating-point operations really executed (causal attention: the lower triangle only)."""
    n_bytes: int
    """Bytes read plus bytes written."""
    shape: tuple[int, ...] = ()
    launches: int = 1
    """Kernels launched for it."""
