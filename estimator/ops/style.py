"""``Style``: how a framework runs a model's operators, where that is not how this project's runtime does."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.framework import FRAMEWORKS, AttentionKernel, Fp8Linear, FrameworkProfile, LossKernel
from estimator.job.recompute import canonical
from estimator.job.strategy import Strategy


class Style(NamedTuple):
    """What the operators of a unit depend on beside their shapes."""

    attention: AttentionKernel = "flash"
    drops_out: bool = False
    early_stop: bool = True
    fused_softmax: bool = False
    """These and the next are those of ``estimator.job.framework.FrameworkProfile``."""
    fused_norm: bool = True
    fused_activation: bool = True
    fused_rotary: bool = True
    pads_values: bool = True
    weights_in_experts: bool = False
    lean_kernels: bool = False
    joined_columns: bool = False
    fused_wgrad: bool = False
    fp8: Fp8Linear | None = None
    """How linear layers of blocks multiply in fp8; ``None``: in the activations' dtype."""
    weight_casts: float = 1.0
    """How often in a pass weights are cast to fp8 where copies of them stay for the step: once in all micro-batches."""
    compiled: bool = False
    """Blocks are compiled."""
    logit_metrics: int = 0
    loss: LossKernel = "plain"
    """``FrameworkProfile.loss``; Megatron-LM as of its papers, whose attention is ``eager``, has the kernel in fp32."""
    own: bool = True
    """This project's runtime's, which applies sinks and clamps gates in plain torch; others' are taken to be part of their kernels."""


PLAIN = Style()

COMPILED = frozenset(("rms_norm", "layer_norm", "gated_activation", "activation", "rotary"))
"""Chains of pointwise operators and row sums that torch.compile makes one kernel of, forward and backward: those for which this
project has kernels, whose bytes and launches are therefore theirs."""


def compiled_recompute(recompute: str) -> str:
    """What a compiled block recomputes. torch.compile's partitioner (``min_cut_rematerialization_partition``) keeps what products and
    attention make and what goes into the block, and makes again what pointwise operators made of it; a block that recomputes
    as a whole does so compiled."""
    if recompute in ("full", "selective"):
        return recompute
    parts = () if recompute == "none" else tuple(recompute.split(","))
    return canonical(",".join((*parts, "norms", "activation")))


def style_of(strategy: Strategy, n_micro_batches: int = 1) -> Style:
    """Of a job with ``strategy``."""
    profile = FRAMEWORKS[strategy.framework]
    return Style(
        attention=strategy.attention,
        drops_out=profile.drops_out and strategy.attention == "eager",
        early_stop=profile.early_stop and not strategy.whole_recompute,
        fused_softmax=profile.fused_softmax,
        fused_norm=profile.fused_norm,
        fused_activation=profile.fused_activation,
        fused_rotary=profile.fused_rotary,
        pads_values=profile.pads_values,
        weights_in_experts=profile.weights_in_experts,
        lean_kernels=profile.lean_kernels,
        joined_columns=profile.joins_projections,
        fused_wgrad=param_grads_of(strategy) == "fused",
        loss=_loss(strategy, profile),
        logit_metrics=profile.logit_metrics,
        fp8=profile.fp8 if strategy.matmul_dtype == "fp8" else None,
        weight_casts=1 / n_micro_batches,
        compiled=strategy.compile,
        own=strategy.framework == "zerocast",
    )


def _loss(strategy: Strategy, profile: FrameworkProfile) -> LossKernel:
    if strategy.compile_loss and profile.loss == "plain":
        return "kernel"
    return "fp32_in_place" if profile.loss == "in_place" and strategy.attention == "eager" else profile.loss


def param_grads_of(strategy: Strategy) -> str:
    """``FrameworkProfile.param_grads`` of a job with ``strategy``."""
    return FRAMEWORKS[strategy.framework].param_grads if strategy.grad_fusion else "added"
