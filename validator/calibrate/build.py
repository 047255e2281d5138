"""From timed tasks to a ``HardwareProfile``."""

from __future__ import annotations

import json
import statistics
from typing import Any

from estimator.errors import InputError
from estimator.job.cluster import Gpu, Host
from estimator.time.profile import (
    AttentionPoint,
    BandwidthPoint,
    CollectivePoint,
    CopyPoint,
    HardwareProfile,
    HostPoint,
    MatmulPoint,
)
from validator import provenance


def build_profile(
    done: dict[str, dict[str, Any]], cores: int, gpu: Gpu | None, notes: tuple[str, ...] = ()
) -> HardwareProfile:
    """The profile of results by task key. Raises ``InputError`` when the budget was too small for the indispensable ones."""
    matmul: list[MatmulPoint] = []
    attention: list[AttentionPoint] = []
    bandwidth: list[BandwidthPoint] = []
    collectives: list[CollectivePoint] = []
    copies: list[CopyPoint] = []
    host: dict[int, dict[str, tuple[float, float]]] = {}
    for key, result in done.items():
        if "skipped" in result:
            continue
        workers, kind, name, dtype, sizes, backward, pinned = json.loads(key)
        seconds = statistics.median(result["seconds"])
        spread = round(_spread(result["seconds"]), 4)
        rate = result["work"] / seconds
        at = {"workers": workers, "threads": max(1, cores // workers), "spread": spread}
        if kind == "matmul":
            m, n, k = sizes
            matmul.append(MatmulPoint(dtype, m, n, k, rate, **at))
        elif kind == "attention":
            attention.append(AttentionPoint(dtype, name, sizes[0], sizes[1], rate, **at))
        elif kind == "bandwidth":
            bandwidth.append(BandwidthPoint(name, dtype, int(result["work"]), rate, backward, **at))
        elif kind == "copy":
            copies.append(CopyPoint(name, int(result["work"]), rate, pinned, workers, spread))
        elif kind == "collective":
            collectives.append(CollectivePoint(name, workers, 1, int(result["work"]), seconds, dtype, spread))
        else:
            host.setdefault(workers, {})[name] = (seconds / result["work"], spread)
    host_points = tuple(
        HostPoint(
            n,
            max(1, cores // n),
            1.0 / h["adam"][0],
            h["op"][0],
            h["autograd_op"][0],
            h["adam"][1],
            overlap=_overlap(h),
        )
        for n, h in sorted(host.items())
        if h.keys() >= {"adam", "op", "autograd_op"}
    )
    if not (matmul and attention and bandwidth and copies and host_points):
        raise InputError("the calibration's budget is too small for a usable profile; give it more seconds")
    facts = provenance.collect(with_torch=True)
    memory_bytes = int(facts["memory_bytes"] or 0)
    largest = max(p.bytes for p in bandwidth)  # beyond the caches, if anything is
    best_bandwidth = max(p.bytes_per_s for p in bandwidth if p.bytes > largest / 2)
    this_host = Host(memory_bytes=memory_bytes, n_cores=cores, memory_bytes_per_s=best_bandwidth, source="measured")
    return HardwareProfile(
        name=gpu.name if gpu is not None else "cpu",
        arch=gpu.arch if gpu is not None else "cpu",
        origin="measured",
        notes=notes,
        date=str(facts["date_utc"])[:10],
        host_name=str(facts["host"] or ""),
        versions={k: str(facts[k]) for k in ("torch", "cuda", "python", "os", "cpu") if facts.get(k)},
        gpu=gpu or _cpu_as_gpu(matmul, copies, collectives, this_host),
        host=this_host,
        matmul=tuple(matmul),
        attention=tuple(attention),
        bandwidth=tuple(bandwidth),
        collectives=tuple(collectives),
        copies=tuple(copies),
        host_points=host_points,
        spread={
            kind: round(statistics.median(p.spread for p in points), 4)
            for kind, points in (
                ("matmul", matmul), ("attention", attention), ("bandwidth", bandwidth), ("collective", collectives),
                ("copy", copies), ("host", host_points),
            )
            if points
        },
    )  # fmt: skip


def _overlap(host: dict[str, tuple[float, float]]) -> float:
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
