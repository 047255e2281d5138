"""``Op``: one operator call as the time reader sees it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from estimator.job.mesh import Span

OpKind = Literal["matmul", "attention", "elementwise", "norm", "embedding", "loss", "optimizer", "collective"]


class Op(NamedTuple):
    """One kernel-sized piece of work.

    ``shape`` is ``(batch, m, n, k)`` for a matmul (``batch`` independent products of m x k by k x n) and
    ``(batch, n_heads, n_kv_heads, seq_len, head_dim, window)`` for causal attention (window 0: none); for a collective
    how many of the operators after it run meanwhile; empty otherwise.
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
    useful: float = 1.0
    """Share of ``flops`` that the model asks for; the rest is filling up (empty slots of experts, wider heads)."""
    span: Span | None = None
    """Ranks that a collective joins; its ``name`` is what it does and ``n_bytes`` all ranks' tensor."""
