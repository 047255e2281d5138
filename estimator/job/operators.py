"""Whether a model, a strategy and a cluster go together as to how operators are run: attention kernels, fp8."""

from __future__ import annotations

from estimator.errors import InputError
from estimator.job.cluster import Cluster
from estimator.job.framework import FRAMEWORKS
from estimator.job.model import ModelSpec
from estimator.job.recompute import parts_of
from estimator.job.strategy import Strategy


def check_operators(model: ModelSpec, s: Strategy, cluster: Cluster) -> None:
    """Raises ``InputError``."""
    profile = FRAMEWORKS[s.framework]
    for part, is_one in (("norms", profile.fused_norm), ("activation", profile.fused_activation)):
        if part in parts_of(s.recompute) and not is_one and not s.compile:
            raise InputError(
                f"recompute is {s.recompute!r} with framework {s.framework}, where {part} are several operators that keep what is "
                "between them; allowed: none, selective, full, attention, core_attention, mlp"
            )
    if s.attention != "flash":
        _check_attention(model, s, cluster)
    if s.matmul_dtype == "fp8":
        _check_fp8(model, s, cluster)


def _check_attention(model: ModelSpec, s: Strategy, cluster: Cluster) -> None:
    if s.attention == "efficient" and cluster.gpu.arch == "cpu":
        raise InputError("attention is 'efficient', a kernel that a CPU has not; allowed: flash, math, eager")
    if model.positions == "relative":
        raise InputError(
            f"attention is {s.attention!r}, but {model.name} adds a number to every score, which has a way of its own here; "
            "allowed: flash"
        )
    if s.cp > 1 and s.cp_kind == "ring":
        raise InputError(
            f"attention is {s.attention!r} with cp_kind 'ring', which puts parts of flash attention together; allowed: flash, or "
            "cp_kind 'ulysses'"
        )


def _check_fp8(model: ModelSpec, s: Strategy, cluster: Cluster) -> None:
    if "fp8" not in cluster.gpu.peak_flops:
        raise InputError(
            f"matmul_dtype is 'fp8', for which {cluster.gpu.name} has no fast path; allowed: model, or a GPU that has "
            "(Hopper, Ada, Blackwell)"
        )
    if s.dtype != "bf16":
        raise InputError(f"matmul_dtype is 'fp8' with dtype {s.dtype!r}; allowed: dtype bf16, from which it casts")
    if model.encoder is not None:
        raise InputError(f"matmul_dtype is 'fp8', but {model.name} has an encoder; allowed: model, or a decoder")
