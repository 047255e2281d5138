"""Published collectives against the shipped link constants: errors by machine, and what the model costs to ask.

    python benchmarks/bench_network.py MICROBENCH.csv [--rows]

The file has one measurement per row: ``kind`` (allreduce, allgather, reducescatter, alltoall), ``gpu``, ``machine``, ``n_gpus``,
``n_nodes``, ``bytes`` (empty: the plateau, taken at 16 GiB), ``value`` in GB/s of bus bandwidth, ``note``. ``--rows`` prints every row.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace

from estimator import catalog
from estimator.job.cluster import Cluster
from estimator.time.collectives import NetworkOp
from estimator.time.network import CollectiveTimer
from estimator.time.profile import profile_for

OPS: dict[str, NetworkOp] = {
    "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "alltoall": "all_to_all",
}  # fmt: skip
GPUS = {
    "a100_sxm_80gb": "a100-80", "a100_sxm_40gb": "a100-40", "a100_pcie_80gb": "a100-pcie", "h100_sxm_80gb": "h100-sxm",
    "h200_sxm_141gb": "h200", "b200": "b200", "gb200": "gb200", "mi300x": "mi300x", "rtx_5090": "rtx-5090",
    "8x H100 PCIe (no bridge)": "h100-pcie",
}  # fmt: skip
STATED_GBPS = {("a100_sxm_40gb", 24): 100.0}
"""Network per GPU of rows whose note, and no machine, states it (4 x HDR)."""
PLATEAU_BYTES = 16 << 30


def timer_of(row: dict[str, str]) -> CollectiveTimer:
    """The row's ranks on the row's machine, or on the one that is usual for its GPU."""
    gpu, n, nodes = GPUS[row["gpu"]], int(row["n_gpus"]), int(row["n_nodes"])
    machine = row["machine"].lower().replace("_", "-")
    usual = catalog.cluster(machine if machine in catalog.machine_names(gpu) else gpu, 1, internode_gbps=400)
    domain = usual.gpus_per_node
    per_node = min(n, domain) if nodes == 1 or domain > 8 else -(-n // nodes)
    gbps = STATED_GBPS.get((row["gpu"], n))
    if gbps is None and machine in catalog.machine_names(gpu):
        network = catalog.machine_type(machine).network_bytes_per_s_per_gpu
        gbps = network * 8e-9 if network else None
    cluster = replace(usual, n_gpus=domain * -(-n // per_node), internode_bytes_per_s=(gbps or 400) * 1e9 / 8)
    profile = profile_for(cluster.gpu)[0]
    if is_without_switch(row):
        assert profile.link is not None
        profile = replace(profile, link=replace(profile.link, in_switch_min_ranks=10_000))
    return CollectiveTimer(cluster, profile, n, per_node)


def is_without_switch(row: dict[str, str]) -> bool:
    return "NVLS off" in row["note"] or "NVLS_ENABLE=0" in row["note"]


def measured_s(row: dict[str, str], n_bytes: int) -> float:
    if "time " in row["note"]:
        return float(row["note"].split("time ")[1].split(" us")[0]) * 1e-6
    n = int(row["n_gpus"])
    return (2 if row["kind"] == "allreduce" else 1) * (n - 1) / n * n_bytes / (float(row["value"]) * 1e9)


def usable(row: dict[str, str]) -> bool:
    """Bus bandwidths of NCCL or RCCL, not those of expert-parallel kernels."""
    return (
        row["kind"] in OPS and row["gpu"] in GPUS and row["unit"] == "GB/s" and float(row["value"]) > 0
        and "MoE" not in row["metric"] and "DeepEP" not in row["library_version"]
    )  # fmt: skip


def main(path: str, each: bool) -> None:
    found: dict[tuple[str, ...], list[tuple[int, float, float, str]]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if usable(row):
                n_bytes = int(row["bytes"] or PLATEAU_BYTES)
                way = timer_of(row).ways(OPS[row["kind"]], n_bytes)[0]
                software = (
                    "EKS, older"
                    if "EKS" in row["note"]
                    else "ring"
                    if "NVLS" in row["note"] and "0" in row["note"]
                    else ""
                )
                group = (row["kind"], row["gpu"], row["machine"], row["n_gpus"], row["n_nodes"], software)
                found[group].append(
                    (n_bytes, measured_s(row, n_bytes), way.seconds, f"{way.algorithm}, {way.protocol}")
                )
    print("rows  median     rms  (forecast over measured seconds, less one)")
    everything: list[float] = []
    for key, points in found.items():
        errors = [math.log(forecast / measured) for _, measured, forecast, _ in points]
        everything += errors
        rms = math.sqrt(statistics.fmean(e * e for e in errors))
        where = "".join(f", {part}" for part in (key[2], key[5]) if part)
        name = f"{key[0]} {key[3]} x {key[1]} on {key[4]} node(s){where}"
        print(f"{len(points):4d} {100 * math.expm1(statistics.median(errors)):+6.1f}% {100 * rms:6.1f}%  {name}")
        for n_bytes, measured, forecast, taken in points if each else ():
            print(
                f"       {n_bytes:14d} B {measured * 1e6:11.1f} us {forecast * 1e6:11.1f} us {100 * (forecast / measured - 1):+6.1f}%  {taken}"
            )
    sizes = sorted(abs(e) for e in everything)
    print(
        f"{len(sizes):4d} rows: median {100 * math.expm1(sizes[len(sizes) // 2]):.1f}%, P90 {100 * math.expm1(sizes[int(0.9 * len(sizes))]):.0f}%"
    )
    cluster: Cluster = catalog.cluster("h100-sxm", 4096)
    begin = time.perf_counter()
    for i in range(1000):
        CollectiveTimer(cluster, profile_for(cluster.gpu)[0], 4096, 8).seconds("all_gather", (1 << 28) + i)
    print(f"one forecast of one collective: {(time.perf_counter() - begin) * 1e3:.1f} us")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/bench_network.py MICROBENCH.csv [--rows]")
    main(sys.argv[1], "--rows" in sys.argv)
