"""From timed tasks to a ``HardwareProfile``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from estimator.errors import InputError
from estimator.job.cluster import Gpu, Host
from estimator.time.profile import (
    COMMIT,
    AttentionPoint,
    BandwidthPoint,
    CollectivePoint,
    CopyPoint,
    FilePoint,
    HardwareProfile,
    HostPoint,
    MatmulPoint,
    OptimizerPoint,
    OverheadPoint,
)
from validator import provenance
from validator.calibrate.tasks import Task, task_of

KERNEL_KINDS = {
    "add": "elementwise", "gelu_tanh": "activation", "swiglu": "gated_activation", "layer_norm": "norm",
    "cross_entropy": "loss", "adamw": "fused_step",
}  # fmt: skip
"""Kernels whose points serve an ``Op`` name or kind of the estimator; the others keep their own name. Activations take a CPU as long
as their arithmetic: that of GPT-2 stands for all."""
GPU_KERNEL_KINDS = KERNEL_KINDS | {
    "gelu": "activation",
    "gelu_tanh": "gelu_tanh",
    "optimizer_step": "adam_step",
    "sgd": "sgd_step",
    "dropout_add": "dropout_residual",
}
"""On a GPU, where the runtime's own kernels do the work."""

_INDISPENSABLE = ("matmul", "attention", "bandwidth", "copies", "host_points")


def build_profile(
    done: Mapping[str, Mapping[str, Any]], cores: int, gpu: Gpu | None, notes: tuple[str, ...] = (),
    skipped: Mapping[str, str] | None = None,
) -> HardwareProfile:  # fmt: skip
    """The profile of results by task key. Raises ``InputError`` when an indispensable kind of point is missing."""
    points: dict[str, list[Any]] = defaultdict(list)
    host: dict[int, dict[str, tuple[float, float]]] = defaultdict(dict)
    seen = set()
    shrunk = 0
    for key, result in done.items():
        if "skipped" in result:
            continue
        workers, task = task_of(key)
        if task.kind == "step":  # ``validator.calibrate.steps`` reads these
            continue
        task = task._replace(sizes=tuple(result.get("sizes", task.sizes)))
        shrunk += "sizes" in result
        if (workers, task) in seen:  # a smaller size than planned that was measured for itself
            continue
        seen.add((workers, task))
        seconds = statistics.median(result["seconds"])
        spread = round(_spread(result["seconds"]), 4)
        if task.kind == "host":
            host[workers][task.name] = (seconds / result["work"], spread)
        else:
            if task.kind == "bandwidth":
                kinds = KERNEL_KINDS if gpu is None else GPU_KERNEL_KINDS
                task = task._replace(name=kinds.get(task.name, task.name))
            kind, point = _point(task, workers, max(1, cores // workers), result["work"], seconds, spread)
            points[kind].append(point)
    points["host_points"] = _host_points(host, cores)
    missing = [kind for kind in _INDISPENSABLE if not points[kind]]
    if missing:
        why = "; ".join(f"{what}: {reason}" for what, reason in (skipped or {}).items())
        raise InputError(
            f"the calibration has no usable {', '.join(missing)}; give it more seconds{f' ({why})' if why else ''}"
        )
    if shrunk:
        notes = (*notes, f"{shrunk} points were taken at smaller sizes than usual: there was too little free memory")
    facts = provenance.collect(with_torch=True)
    lists: dict[str, Any] = {kind: tuple(found) for kind, found in points.items()}
    this_host = _host(facts, cores, gpu, points["bandwidth"], host)
    return HardwareProfile(
        name=gpu.name if gpu is not None else "cpu",
        arch=gpu.arch if gpu is not None else "cpu",
        origin="measured",
        notes=notes,
        date=str(facts["date_utc"])[:10],
        host_name=str(facts["host"] or ""),
        versions=_versions(facts),
        gpu=gpu or _cpu_as_gpu(points["matmul"], points["copies"], points["collectives"], this_host),
        host=this_host,
        skipped=dict(skipped or {}),
        spread=_spreads(points),
        **lists,
    )


def _point(task: Task, workers: int, threads: int, work: float, seconds: float, spread: float) -> tuple[str, Any]:
    """The list of ``HardwareProfile`` that a result belongs to, and its point."""
    rate = work / seconds
    at: dict[str, Any] = {"workers": workers, "threads": threads, "spread": spread}
    sizes = task.sizes
    if task.kind == "matmul":
        m, n, k = sizes
        return "matmul", MatmulPoint(task.dtype, m, n, k, rate, layout=task.name, **at)
    if task.kind == "attention":
        seq_len, heads, kv_heads, head_dim = sizes
        return "attention", AttentionPoint(
            task.dtype, task.name, seq_len, head_dim, rate, n_heads=heads, n_kv_heads=kv_heads, **at
        )
    if task.kind == "bandwidth":
        return "bandwidth", BandwidthPoint(task.name, task.dtype, int(work), rate, task.backward, **at)
    if task.kind == "copy":
        return "copies", CopyPoint(task.name, int(work), rate, task.pinned, workers, spread)
    if task.kind == "collective":
        return "collectives", CollectivePoint(task.name, workers, 1, int(work), seconds, task.dtype, spread)
    if task.kind == "optimizer":
        return "optimizer_steps", OptimizerPoint(sizes[0], task.dtype, rate, spread)
    if task.kind == "file" and task.name == COMMIT:
        return "overheads", OverheadPoint(COMMIT, seconds / work, 0, spread)
    if task.kind == "file":
        return "files", FilePoint(task.name, sizes[0], sizes[1], rate, spread)
    assert task.kind == "overhead", task
    return "overheads", OverheadPoint(task.name, seconds / work, sizes[0], spread)


def _host_points(host: Mapping[int, Mapping[str, tuple[float, float]]], cores: int) -> list[HostPoint]:
    return [
        HostPoint(
            n, max(1, cores // n), 1.0 / h["adam"][0], h["op"][0], h["autograd_op"][0], h["adam"][1],
            overlap=_overlap(h),
        )
        for n, h in sorted(host.items())
        if h.keys() >= {"adam", "op", "autograd_op"}
    ]  # fmt: skip


def _host(
    facts: Mapping[str, Any], cores: int, gpu: Gpu | None, bandwidth: list[BandwidthPoint],
    host: Mapping[int, Mapping[str, tuple[float, float]]],
) -> Host:  # fmt: skip
    """This machine; its memory's pace is the host's own, never the GPU's."""
    if gpu is not None:
        if "memory" not in host.get(1, {}):
            raise InputError("the calibration has no usable figure of the host's memory; give it more seconds")
        memory_bytes_per_s = 1.0 / host[1]["memory"][0]
    else:
        largest = max(p.bytes for p in bandwidth)  # beyond the caches, if anything is
        memory_bytes_per_s = max(p.bytes_per_s for p in bandwidth if p.bytes > largest / 2)
    return Host(
        memory_bytes=int(facts["memory_bytes"] or 0), n_cores=cores, memory_bytes_per_s=memory_bytes_per_s,
        source="measured",
    )  # fmt: skip


def _versions(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a reader needs to take the same measurement again; only what is known."""
    gpu = facts.get("gpu") or {}
    found = {k: facts.get(k) for k in ("torch", "cuda", "nccl", "cupy", "python", "os", "cpu")}
    found |= {"gpu": gpu.get("name"), "driver": gpu.get("driver_version"), "capability": gpu.get("capability")}
    return {k: str(v) for k, v in found.items() if v}


def left_out(
    planned: list[str], done: Mapping[str, Mapping[str, Any]], budget_s: float, device: str, n_gpus: int, files: bool
) -> dict[str, str]:
    """What is not in the profile -> why: points that failed, those that the budget left no time for, whole kinds."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    late: dict[str, int] = defaultdict(int)
    for key in planned:
        workers, task = task_of(key)
        if key not in done:
            late[task.kind] += 1
        elif "skipped" in done[key]:
            reasons[f"{task.kind} {task.dtype}", done[key]["skipped"]].append(task.label(workers))
    found: dict[str, str] = {}
    for (kind, reason), labels in reasons.items():
        more = f" and {len(labels) - 1} more of {kind}" if len(labels) > 1 else ""
        found[labels[0] + more] = reason
    totals = _counted(task_of(key)[1].kind for key in planned)
    for kind, n in late.items():
        found[f"{kind}: {n} of {totals[kind]} points"] = f"the budget of {budget_s:g} s was spent"
    if not files:
        found["files"] = "no folder was given to read and write in"
    if device == "cpu":
        found["tf32 and fp8 products, kernel launches, segments, copies both ways"] = "only a GPU has these"
    elif n_gpus < 2:
        found["collectives"] = "this machine has one GPU"
    return found


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for kind in kinds:
        found[kind] += 1
    return found


def _spreads(points: Mapping[str, list[Any]]) -> dict[str, float]:
    names = {
        "matmul": "matmul", "attention": "attention", "bandwidth": "bandwidth", "collective": "collectives",
        "copy": "copies", "host": "host_points", "optimizer": "optimizer_steps", "file": "files",
        "overhead": "overheads",
    }  # fmt: skip
    return {
        kind: round(statistics.median(p.spread for p in points[name]), 4)
        for kind, name in names.items()
        if points.get(name)
    }


def _overlap(host: Mapping[str, tuple[float, float]]) -> float:
    """Share of an all-reduce that the arithmetic beside it hid: (apart - together) / all-reduce."""
    if not host.keys() >= {"arithmetic", "all_reduce", "both"}:
        return 0.0
    arithmetic_s, all_reduce_s, both_s = (host[name][0] for name in ("arithmetic", "all_reduce", "both"))
    return round(min(1.0, max(0.0, (arithmetic_s + all_reduce_s - both_s) / all_reduce_s)), 3)


def _cpu_as_gpu(
    matmul: list[MatmulPoint], copies: list[CopyPoint], collectives: list[CollectivePoint], host: Host
) -> Gpu:
    """This machine's CPU as an accelerator: its peaks are the best that was measured, with all cores at once."""
    peaks: dict[str, float] = {}
    for p in matmul:
        peaks[p.dtype] = max(peaks.get(p.dtype, 0.0), p.flops_per_s * (1 if p.workers == 1 else 0))
    copy = max(p.bytes_per_s for p in copies)
    link = max((p.bytes / p.seconds for p in collectives), default=copy)
    return Gpu(
        name="cpu",
        arch="cpu",
        memory_bytes=host.memory_bytes,
        memory_bytes_per_s=host.memory_bytes_per_s,
        peak_flops={d: f for d, f in peaks.items() if f > 0},
        n_sms=host.n_cores,
        l2_bytes=0,
        link_bytes_per_s=link,
        host_link_bytes_per_s=copy,
        source="measured by calibrate",
        unsourced=("l2_bytes",),
    )


def _spread(seconds: list[float]) -> float:
    """Interquartile range over the median."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle
