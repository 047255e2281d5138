"""From what every rank measured to one ``StepReport``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from estimator.job.files import job_to_dict
from estimator.predict import model_flops_of, where_of
from estimator.report import StepReport
from estimator.units import format_bytes
from validator.measure.case import Case


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank measured, as plain data."""

    rank: int
    session: dict[str, Any]
    """The fields of ``runtime.session.Measurement``."""
    allocator_peak_bytes: int | None = None
    """``cuda``: ``torch.cuda.max_memory_allocated`` since the last warm-up step; likewise ``reserved_bytes``."""
    reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    """``cuda``: largest of the readings after each timed step, in the meaning that ``facts["device_memory"]`` names."""
    capacity_bytes: int | None = None
    cuda_context_bytes: int | None = None
    """``cuda``: taken when the context was there and nothing was allocated; ``None``: not known apart from other processes'."""
    comm_buffers_bytes: int | None = None
    """``cuda``: growth outside of the allocator through making the process group and its first collective."""
    facts: dict[str, Any] = field(default_factory=dict)
    """``cuda``: for the provenance, ``validator.measure.instruments``."""
    peak_rss_bytes: int | None = None
    """Most host memory that the process held."""

    @property
    def peak_bytes(self) -> int | None:
        """The allocator's own peak where there is one (it also sees what libraries allocate), else the metered one."""
        return self.session["peak_allocated_bytes"] if self.allocator_peak_bytes is None else self.allocator_peak_bytes

    @property
    def attribution(self) -> dict[str, Any]:
        """What the allocator's history says; empty without one."""
        return self.session["attribution"]

    @property
    def outside_allocator(self) -> dict[str, int]:
        """Measured categories that no tensor belongs to."""
        found = {"cuda_context": self.cuda_context_bytes, "comm_buffers": self.comm_buffers_bytes}
        return {category: n_bytes for category, n_bytes in found.items() if n_bytes is not None}

    def categories_at_peak(self) -> dict[str, int]:
        """Of the allocator where its history was kept, else the metered ones."""
        return {**(self.attribution or self.session)["category_bytes_at_peak"], **self.outside_allocator}

    def category_peaks(self) -> dict[str, int]:
        """The metered ones, and from the allocator's history what no tensor shows."""
        seen = self.attribution.get("category_peak_bytes", {})
        unseen = {"workspace": seen["workspace"]} if "workspace" in seen else {}
        return {**self.session["category_peak_bytes"], **unseen, **self.outside_allocator}


def interquartile_range(values: Sequence[float]) -> float | None:
    """Distance between the quartiles (linear interpolation); ``None`` below two values."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def slowest_steps(results: Sequence[RankResult]) -> list[float]:
    """Seconds of each measured step: the slowest rank's; none on ``fake``."""
    return [max(step) for step in zip(*(r.session["step_seconds"] for r in results), strict=True)]


def build_report(case: Case, results: Sequence[RankResult], origin: dict[str, Any]) -> StepReport:
    """The report of one case. Memory is that of the rank with the largest peak, step seconds those of the slowest rank.

    ``results`` are all ranks' in order, or the fake rank's alone. ``origin`` is the machine's provenance; how the case
    was measured is added to it.
    """
    job, worst = case.job, max(results, key=lambda r: (r.peak_bytes or 0, -r.rank))
    memory, first = worst.session, results[0].session
    steps = slowest_steps(results)
    step_s = statistics.median(steps) if steps else None
    capacity = job.cluster.gpu.memory_bytes if case.backend == "fake" else worst.capacity_bytes
    model_flops, again_flops = model_flops_of(job)
    real_network = case.backend != "cuda-virtual" or job.cluster.n_gpus == 1
    job_step_s = step_s if real_network else None  # seconds of the whole job, network included
    peak_flops = job.cluster.n_gpus * job.cluster.gpu.peak_flops[job.strategy.dtype]
    fits, explanation = _verdict(case, worst.peak_bytes, capacity)
    return StepReport(
        origin=case.backend,
        job_key=job.key,
        job=job_to_dict(job),
        rank=worst.rank,
        peak_allocated_bytes=worst.peak_bytes,
        peak_reserved_bytes=worst.reserved_bytes,
        device_used_bytes=worst.device_used_bytes,
        peak_phase=memory["peak_phase"],
        peak_where=memory["peak_where"] and where_of(job, job.mesh.place("pp", worst.rank), memory["peak_where"]),
        category_bytes_at_peak=worst.categories_at_peak(),
        category_peak_bytes=worst.category_peaks(),
        phase_peak_bytes=dict(memory["phase_peak_bytes"]),
        phase_category_bytes=dict(memory["phase_category_bytes"]),
        host_bytes=memory["host_bytes"],
        pinned_bytes=memory["pinned_bytes"],
        step_s=step_s,
        step_low_s=min(steps, default=None),
        step_high_s=max(steps, default=None),
        step_spread_s=interquartile_range(steps),
        time_parts_s=dict(first["part_seconds"]),
        tokens_per_s=job.workload.global_batch_size * job.workload.seq_len / job_step_s if job_step_s else None,
        model_flops=model_flops,
        mfu=model_flops / job_step_s / peak_flops if job_step_s else None,
        hfu=(model_flops + again_flops) / job_step_s / peak_flops if job_step_s else None,
        collective_bytes=dict(memory["collective_bytes"]),
        collective_calls=dict(memory["collective_calls"]),
        copy_bytes=dict(memory["copy_bytes"]),
        copy_s=dict(first["copy_seconds"]),
        parity=dict(first["parity"]),
        capacity_bytes=capacity,
        fits=fits,
        explanation=explanation,
        notes=_notes(case, results),
        provenance={
            **origin,
            "steps": len(steps),
            "warmup": case.warmup if steps else 0,
            "processes": case.n_processes,
            "seed": case.seed,
            "step_seconds": steps,
            "losses": list(first["losses"]),
            "skipped_steps": first["skipped_steps"],
            "rank_peak_bytes": {str(r.rank): r.peak_bytes for r in results},
            "metered_peak_bytes": memory["peak_allocated_bytes"],
            "peak_rss_bytes": {str(r.rank): r.peak_rss_bytes for r in results},
            **({"device_step_seconds": list(first["device_step_seconds"])} if first["device_step_seconds"] else {}),
            **({"allocator_history": worst.attribution} if worst.attribution else {}),
            **worst.facts,
        },
    )


def _verdict(case: Case, peak_bytes: int | None, capacity_bytes: int | None) -> tuple[bool | None, str | None]:
    """A case that ran fits. Live bytes of a fake rank can prove that it does not fit, never that it does.

    A rank that ran without its network says only that all but the network's own buffers fit.
    """
    if case.backend == "cuda-virtual" and case.job.cluster.n_gpus > 1:
        return None, "it ran without the buffers that the network's library takes"
    if case.backend != "fake":
        return True, None
    if peak_bytes is not None and capacity_bytes is not None and peak_bytes > capacity_bytes:
        return False, f"live tensors need {format_bytes(peak_bytes)}, the GPU has {format_bytes(capacity_bytes)}"
    return None, None


def _notes(case: Case, results: Sequence[RankResult]) -> tuple[str, ...]:
    if case.backend == "fake":
        return (f"fake: rank {case.rank} of {case.job.cluster.n_gpus} on tensors without data; no time is measured",)
    notes = [
        f"time: median of {case.steps} steps after {case.warmup} for warm-up, slowest rank, memory not metered",
    ]
    if case.backend == "cuda-virtual" and case.job.cluster.n_gpus > 1:
        notes.append(
            f"cuda-virtual: one GPU plays rank {case.rank} of {case.job.cluster.n_gpus}; there is no network: collectives fill their "
            "results from the rank's own shard, so step_s holds no communication and no rate of the whole job is given"
        )
    if case.metered:
        notes.append("memory: live bytes metered in one further step, which is not timed")
    if case.on_cuda:
        notes.append(
            "peak_allocated_bytes is the CUDA allocator's over the timed steps; its categories are those of the metered step"
            + (", by the allocator's history" if results[0].attribution else "")
        )
        source = results[0].facts.get("device_memory", {}).get("meaning")
        if source:
            notes.append(f"device_used_bytes: {source}, most after any timed step")
    session = results[0].session
    moved = ((way, session["copy_bytes"][way], seconds) for way, seconds in session["copy_seconds"].items())
    rates = [f"{way} {n_bytes / seconds / 1e9:.2f} GB/s" for way, n_bytes, seconds in moved if seconds]
    if rates:
        files = f"; files: {session['file_access']}" if session.get("file_access") else ""
        notes.append(f"copies reached, of the time that they took: {', '.join(rates)}{files}")
    skipped = session["skipped_steps"]
    if skipped:
        notes.append(f"{skipped} step(s), warm-up included, were skipped because a gradient was not finite")
    if len(results) > 1:
        notes.append("memory of the rank with the largest peak; time parts of rank 0")
    return tuple(notes)
