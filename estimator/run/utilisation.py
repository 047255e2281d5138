"""MFU and HFU under both conventions for causal attention: counted as executed, or as a full square."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.job.job import Job
from estimator.report import StepReport


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Shares of the dense peak of the job's dtype. ``None``: not known."""

    mfu_causal: float | None
    """Model FLOPs; of causal attention only the pairs that are attended to (Megatron-Bridge, this project's reports)."""
    mfu_full: float | None
    """Model FLOPs with attention's full square (PaLM appendix B, llm-foundry, torchtitan, Narayanan et al. 2021)."""
    hfu_causal: float | None
    """With what is recomputed."""
    hfu_full: float | None


def unattended_flops(job: Job) -> float | None:
    """Forward FLOPs per step of the pairs of tokens that a causal decoder leaves out of its attention's square.

    Two products per pair, layer and head, as long as a key and a value. 0 for models whose attention is not causal; ``None`` for traced ones.
    """
    model, seq_len = job.model, job.workload.seq_len
    if model.traced is not None:
        return None
    if model.encoder is not None:
        return 0.0
    widths = (model.head_dim, model.head_dim)
    if model.latent is not None:
        widths = (model.latent.head_dim, model.latent.value_head_dim)
    left_out = 0.0
    for layer in range(model.n_layers):
        span = min(model.window_of(layer) or seq_len, seq_len)
        pairs = seq_len * (seq_len + 1) / 2 - (seq_len - span) * (seq_len - span + 1) / 2
        left_out += seq_len * seq_len - pairs
    return 2.0 * sum(widths) * job.workload.global_batch_size * model.n_heads * left_out


def recomputed_share(job: Job) -> float:
    """Share of the blocks whose attention runs forward a second time."""
    s = job.strategy
    again = s.recompute == "full" or "attention" in s.recompute.split(",")
    return 1.0 / s.recompute_every if again else 0.0


def utilisation(job: Job, report: StepReport) -> Utilisation:
    """Of a report of ``job``."""
    if report.mfu is None or report.model_flops is None:
        return Utilisation(mfu_causal=None, mfu_full=None, hfu_causal=report.hfu, hfu_full=None)
    left_out = unattended_flops(job)
    if left_out is None:
        return Utilisation(mfu_causal=report.mfu, mfu_full=None, hfu_causal=report.hfu, hfu_full=None)
    mfu_full = report.mfu * (1.0 + 3.0 * left_out / report.model_flops)
    hfu_full = None
    if report.hfu is not None:
        again = report.mfu * recomputed_share(job) * left_out / report.model_flops
        hfu_full = report.hfu + (mfu_full - report.mfu) + again
    return Utilisation(mfu_causal=report.mfu, mfu_full=mfu_full, hfu_causal=report.hfu, hfu_full=hfu_full)
