"""What a model, a workload and a GPU allow of context parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from estimator.errors import InputError

if TYPE_CHECKING:
    from estimator.job.cluster import Cluster
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy
    from estimator.job.workload import Workload

ContextKind = Literal["ulysses", "ring"]


def check_context(model: ModelSpec, w: Workload, s: Strategy, cluster: Cluster) -> None:
    """Raises ``InputError`` where ``s.cp`` ranks cannot share ``model``'s sequences."""
    if s.cp == 1:
        return
    if model.latent is not None and s.framework != "zerocast":
        raise InputError(
            f"cp is {s.cp} with framework {s.framework!r}, but {model.name} has latent attention; allowed: 1, or framework 'zerocast'"
        )
    parts = s.cp if s.cp_kind == "ulysses" else 2 * s.cp
    if w.seq_len % parts:
        whole = "cp" if s.cp_kind == "ulysses" else "2 * cp"
        near = max(1, round(w.seq_len / parts)) * parts
        raise InputError(
            f"seq_len is {w.seq_len} with cp_kind {s.cp_kind!r}; allowed: a multiple of {whole} = {parts}, the nearest is {near}"
        )
    if s.cp_kind == "ulysses":
        _check_heads(model, s)
    else:
        _check_ring(model, w, s, cluster)


def _check_heads(model: ModelSpec, s: Strategy) -> None:
    held = model.n_kv_heads // s.tp
    if held % s.cp:
        of = f"n_kv_heads / tp = {held}" if s.tp > 1 else f"n_kv_heads = {held}"
        raise InputError(
            f"cp is {s.cp} with cp_kind 'ulysses'; allowed: a divisor of {of} of {model.name}, which it spreads, or cp_kind 'ring'"
        )


def _check_ring(model: ModelSpec, w: Workload, s: Strategy, cluster: Cluster) -> None:
    if 0 < model.sliding_window < w.seq_len:
        raise InputError(
            f"cp_kind is 'ring', but {model.name} has a sliding window of {model.sliding_window} tokens, which the ring does not "
            "take yet; allowed: 'ulysses'"
        )
    if s.dtype == "fp32" and cluster.gpu.arch != "cpu":
        raise InputError(
            "cp_kind is 'ring' with dtype 'fp32', for which GPUs have no flash attention; allowed: bf16 or fp16, or cp_kind 'ulysses'"
        )
