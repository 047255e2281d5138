"""What would make a job smaller or faster: every change that can be expressed is forecast as a job of its own, with the same global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from estimator.errors import InputError
from estimator.job.framework import FRAMEWORKS
from estimator.job.job import Job
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.predict import predict
from estimator.report import StepReport
from estimator.time.profile import HardwareProfile
from estimator.time.stack import Stack

LEAST_SAVING = 0.01
"""Of the bytes that a GPU needs, or of the seconds of a step: what saves less is no remedy."""


class Change(NamedTuple):
    """One change of a job."""

    words: str
    strategy: dict[str, Any]
    """Fields of ``Strategy`` with their new values."""
    micro_batch_size: int | None = None
    """``None``: as it is."""
    inexact: bool = False
    """Training is not the same to the last bits: messages are rounded, or parameters are older."""

    def apply(self, job: Job) -> Job:
        """Raises ``InputError`` where that is no job."""
        micro = self.micro_batch_size or job.workload.micro_batch_size
        return replace(
            job,
            strategy=replace(job.strategy, **self.strategy),
            workload=replace(job.workload, micro_batch_size=micro),
        )


class Remedy(NamedTuple):
    """A change that was forecast. Differences are against the job as it is."""

    change: Change
    report: StepReport
    saved_bytes: int
    """Of what one GPU must hold; negative: it needs more."""
    gained_s: float
    """Of a step; negative: it takes longer."""
    most_saved: str
    """The category of which there is least at the new peak against the old one."""
    most_grown: str
    """That of which there is most."""

    @property
    def bytes_per_s_lost(self) -> float:
        """What it saves for every second that a step takes longer; infinite where it takes none."""
        if self.gained_s >= 0:
            return float("inf") if self.saved_bytes > 0 else 0.0
        return self.saved_bytes / -self.gained_s


class Remedies(NamedTuple):
    """Everything that was tried."""

    base: StepReport
    for_memory: tuple[Remedy, ...]
    """That save device memory: where the job does not fit, first what makes it fit; then by bytes saved for every second lost."""
    for_time: tuple[Remedy, ...]
    """That fit and make the step shorter, by seconds gained."""
    tried: tuple[Remedy, ...]
    refused: tuple[tuple[str, str], ...]
    """Changes that cannot be, with the reason."""
    hardware: tuple[Remedy, ...] = ()
    """What a part of the machine that is twice as fast would bring; empty with a profile that was measured."""


def find_remedies(
    job: Job, profile: HardwareProfile | None = None, *, stack: Stack | None = None, allocator: AllocatorSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Remedies:  # fmt: skip
    """Forecast every change of ``changes``; see ``Remedies``. ``stack`` and ``allocator`` as in ``predict``; ``on_progress(done, total)``
    is called after each. Raises ``InputError`` when ``job`` itself cannot be timed."""
    base = predict(job, profile, stack=stack, allocator=allocator)
    tried: list[Remedy] = []
    refused: list[tuple[str, str]] = []
    asked = list(changes(job))
    for done, change in enumerate(asked, start=1):
        if on_progress:
            on_progress(done, len(asked))
        try:
            changed = change.apply(job)
            if changed == job:
                continue
            report = predict(changed, profile, stack=stack, allocator=allocator)
        except InputError as error:
            refused.append((change.words, str(error)))
            continue
        tried.append(_remedy(change, base, report))
    needed = _needed(base)
    smaller = [r for r in tried if r.saved_bytes >= LEAST_SAVING * needed]
    faster = [r for r in tried if r.report.fits and r.gained_s >= LEAST_SAVING * (base.step_s or 0.0)]
    return Remedies(
        base,
        tuple(sorted(smaller, key=lambda r: (not r.report.fits, -r.bytes_per_s_lost, -r.saved_bytes))),
        tuple(sorted(faster, key=lambda r: -r.gained_s)),
        tuple(tried),
        tuple(refused),
        () if profile is not None and profile.is_measured else _faster_parts(job, base, stack),
    )


def _faster_parts(job: Job, base: StepReport, stack: Stack | None) -> tuple[Remedy, ...]:
    cluster, gpu = job.cluster, job.cluster.gpu
    parts = {
        "GPU memory": replace(cluster, gpu=replace(gpu, memory_bytes_per_s=2 * gpu.memory_bytes_per_s)),
        "links between the GPUs of a node": replace(
            cluster, gpu=replace(gpu, link_bytes_per_s=2 * gpu.link_bytes_per_s)
        ),
        "network between nodes": replace(cluster, internode_bytes_per_s=2 * cluster.internode_bytes_per_s),
        "link to the host": replace(cluster, gpu=replace(gpu, host_link_bytes_per_s=2 * gpu.host_link_bytes_per_s)),
    }
    found = []
    for words, faster in parts.items():
        report = predict(replace(job, cluster=faster), stack=stack)
        remedy = _remedy(Change(f"{words} twice as fast", {}), base, report)._replace(saved_bytes=0)
        if remedy.gained_s >= LEAST_SAVING * (base.step_s or 0.0):
            found.append(remedy)
    return tuple(sorted(found, key=lambda r: -r.gained_s))


def changes(job: Job) -> Iterator[Change]:
    """Single changes of ``job`` that are worth asking about."""
    s, micro = job.strategy, job.workload.micro_batch_size
    if not s.has_servers:
        for stage in FRAMEWORKS[s.framework].stages:
            if stage != s.zero_stage:
                yield Change(f"ZeRO stage {stage}", {"zero_stage": stage})
    core = ("core_attention",) if s.attention in ("math", "eager") else ()  # a flash kernel recomputes it in any case
    for kind in ("none", "norms,activation", *core, "attention", "mlp", "selective", "full"):
        if kind != s.recompute:
            off = {"activation_offload": False} if s.activation_offload and kind not in ("selective", "full") else {}
            yield Change("no recomputation" if kind == "none" else f"recompute {kind}", {"recompute": kind, **off})
    if s.recompute != "none":
        yield Change("recompute every second block only", {"recompute_every": 2 * s.recompute_every})
    if micro % 2 == 0:
        yield Change(f"micro-batch {micro // 2}, twice the accumulation", {}, micro // 2)
    if micro > 2:
        yield Change("micro-batch 1, more accumulation", {}, 1)
    if job.n_micro_batches % 2 == 0:
        yield Change(f"micro-batch {2 * micro}, half the accumulation", {}, 2 * micro)
    yield from _offloads(job)
    yield from _parallel(job)
    yield from _fetching(job)
    yield from _kernels(job)


def _offloads(job: Job) -> Iterator[Change]:
    s = job.strategy
    for offload in ("none", "optimizer", "optimizer,param"):
        if offload != s.offload:
            plain = {} if offload == "optimizer" else {"offload_fraction": 1.0, "delayed_update": False}
            yield Change("no offload" if offload == "none" else f"offload {offload}", {"offload": offload, **plain})
    if s.offload == "optimizer":
        yield Change("host steps half of the optimizer", {"offload_fraction": s.offload_fraction / 2})
        if not s.delayed_update:
            yield Change("the host's update one step late", {"delayed_update": True}, inexact=True)
    if s.recompute in ("selective", "full") and not s.activation_offload:
        yield Change("offload of blocks' inputs", {"activation_offload": True})
    elif s.recompute == "none":
        words = "recompute full with offload of blocks' inputs"
        yield Change(words, {"recompute": "full", "activation_offload": True})


def _parallel(job: Job) -> Iterator[Change]:
    s = job.strategy
    if s.tp > 1 and not s.sequence_parallel:
        yield Change("sequence parallelism", {"sequence_parallel": True})
    for tp in (2 * s.tp, s.tp // 2):
        if 1 <= tp <= job.cluster.gpus_per_domain:
            yield Change(f"tensor parallelism {tp}", {"tp": tp})
    for pp in (2 * s.pp, s.pp // 2):
        if pp >= 1 and not s.pp_layers:
            plain = {"pp_schedule": "1f1b", "virtual_pp": 1} if pp == 1 else {}
            yield Change(f"pipeline parallelism {pp}", {"pp": pp, **plain})
    if s.pp > 1 and not s.pp_layers and s.virtual_pp == 1:
        yield Change("two chunks of the model per pipeline rank", {"pp_schedule": "interleaved_1f1b", "virtual_pp": 2})
    if s.pp > 1 and s.pp_schedule != "1f1b":
        yield Change("pipeline schedule 1f1b", {"pp_schedule": "1f1b", "virtual_pp": 1})
    for cp in (2 * s.cp, s.cp // 2):
        if cp >= 1:
            yield Change(f"context parallelism {cp}", {"cp": cp})
    per_node = job.cluster.gpus_per_domain
    if s.zero_stage and not s.shard_size and job.mesh.n_data > per_node and s.model_parallel == 1:
        yield Change(f"shards over the {per_node} GPUs of a node, replicas across", {"shard_size": per_node})
    if s.shard_size:
        yield Change("shards over all GPUs", {"shard_size": 0})


def _fetching(job: Job) -> Iterator[Change]:
    s = job.strategy
    if s.zero_stage == 3 or s.offload_param:
        for depth in (0, s.prefetch_depth + 1):
            if depth != s.prefetch_depth:
                yield Change(f"prefetch depth {depth}", {"prefetch_depth": depth})
    if s.framework == "deepspeed" and not s.overlap_comm:
        yield Change("overlap_comm", {"overlap_comm": True})
    for size in (s.bucket_bytes // 4, s.bucket_bytes * 4):
        yield Change(f"buckets of {size >> 20} MiB", {"bucket_bytes": size})
    if s.zero_stage == 3 and not s.quantized_weights:
        yield Change("int8 messages of parameters (ZeRO++ qwZ)", {"quantized_weights": True}, inexact=True)
    per_node = job.cluster.gpus_per_domain
    if job.mesh.n_data > per_node > 1 and s.model_parallel == 1:
        if s.zero_stage == 3 and not s.secondary_shard:
            yield Change("a second copy of the parameters in each node (ZeRO++ hpZ)", {"secondary_shard": per_node})
        if s.zero_stage >= 2 and not s.quantized_grads:
            yield Change("int4 messages of gradients (ZeRO++ qgZ)", {"quantized_grads": per_node}, inexact=True)


def _kernels(job: Job) -> Iterator[Change]:
    s = job.strategy
    if s.attention != "flash":
        yield Change("flash attention", {"attention": "flash"})
    if s.framework != "zerocast" and not s.compile:
        yield Change("torch.compile of blocks", {"compile": True})
    if s.framework != "zerocast" and not s.compile_loss:
        yield Change("torch.compile of the loss", {"compile_loss": True})
    if s.framework == "zerocast" and s.kernels_off:
        yield Change("all kernels of the runtime", {"kernels_off": ()})
    if s.grads == "fp32" and s.dtype != "fp32":
        yield Change(f"gradients in {s.dtype}", {"grad_dtype": "model"}, inexact=True)
    if s.matmul_dtype == "model" and "fp8" in job.cluster.gpu.peak_flops:
        yield Change("products of blocks in fp8", {"matmul_dtype": "fp8"}, inexact=True)


def _remedy(change: Change, base: StepReport, report: StepReport) -> Remedy:
    saved, gained_s = _needed(base) - _needed(report), (base.step_s or 0.0) - (report.step_s or 0.0)
    before, after = base.category_bytes_at_peak, report.category_bytes_at_peak
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in {**before, **after}}
    return Remedy(change, report, saved, gained_s, min(grown, key=grown.__getitem__), max(grown, key=grown.__getitem__))


def _needed(report: StepReport) -> int:
    return report.device_used_bytes or report.peak_allocated_bytes or 0
