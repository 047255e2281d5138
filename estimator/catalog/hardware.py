"""GPUs, the servers they usually stand in, and clusters of them, from the shipped data files."""

from __future__ import annotations

import json
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.job.cluster import Cluster, Gpu, Host
from estimator.job.fields import nearest, number, refuse, shown, whole

DATA = Path(__file__).parent / "data"

GPU_FIELDS = ("arch", "memory_bytes", "memory_bytes_per_s", "peak_flops", "n_sms", "l2_bytes", "link_bytes_per_s",
              "host_link_bytes_per_s", "context_bytes", "link_kind", "tdp_watts")  # fmt: skip


@lru_cache(maxsize=32)
def load_data(file: str) -> dict[str, Any]:
    """The parsed data file ``file`` (a path relative to the data folder)."""
    data: dict[str, Any] = json.loads((DATA / file).read_text(encoding="utf-8"))
    return data


def normal(name: str) -> str:
    """The spelling under which names are compared: lower case, ``-`` for spaces and underscores."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


@lru_cache(maxsize=1)
def _gpu_keys() -> dict[str, str]:
    """Catalogue key by every accepted spelling."""
    return {alias: key for key, entry in load_data("gpus.json").items() for alias in (key, *entry["aliases"])}


def gpu_names() -> tuple[str, ...]:
    """Catalogue keys of all GPUs, oldest first."""
    return tuple(load_data("gpus.json"))


def _gpu_key(name: object) -> str:
    key = _gpu_keys().get(normal(name)) if isinstance(name, str) else None
    if key is None:
        raise InputError(f"gpu is {shown(name)}; allowed: {', '.join(gpu_names())}{nearest(name, _gpu_keys())}")
    return key


def gpu(name: str) -> Gpu:
    """The GPU called ``name`` (any case, or an alias such as ``"h100"``).

    Raises ``InputError`` with the nearest name when there is none; no GPU is ever assumed.
    """
    return _build_gpu(_gpu_key(name))


@lru_cache(maxsize=64)
def _build_gpu(key: str) -> Gpu:
    entry = load_data("gpus.json")[key]
    figures = {field: entry[field] for field in GPU_FIELDS if field in entry}
    return Gpu(name=key, **figures, source=" ; ".join(entry["source"]), unsourced=tuple(entry["unsourced"]))


def _machine(key: str) -> dict[str, Any]:
    """Machine entry of the GPU with catalogue key ``key``."""
    machines: list[dict[str, Any]] = list(load_data("machines.json").values())
    return next(machine for machine in machines if key in machine["gpus"])


def host_of(gpu_name: str, n_gpus: int | None = None) -> Host:
    """Host memory and cores that stand beside ``n_gpus`` GPUs of one node (default: a full node).

    A node with several servers in one NVLink domain (GB200) counts as many servers as the GPUs need.
    """
    return _host(_machine(_gpu_key(gpu_name)), n_gpus)


def _host(machine: dict[str, Any], n_gpus: int | None) -> Host:
    servers = ceil((n_gpus or machine["gpus_per_node"]) / machine["gpus_per_host"])
    return Host(
        memory_bytes=servers * machine["host_memory_bytes"],
        n_cores=servers * machine["host_cores"],
        memory_bytes_per_s=servers * machine["host_memory_bytes_per_s"],
        source=" ; ".join(machine["source"]),
    )


def cluster(
    gpu_name: str, n_gpus: int, gpus_per_node: int | None = None, internode_gbps: float | None = None
) -> Cluster:
    """``n_gpus`` GPUs in the nodes that are usual for them, or in machines of the type ``gpu_name``.

    ``gpus_per_node`` and ``internode_gbps`` (gigabits per second and GPU, one direction) replace the usual figures.
    ``Cluster.unsourced`` lists every figure used here that came without a source. Raises ``InputError`` on unknown
    names, on sizes that do not fit together, and when several nodes are asked for but no network figure is known.
    """
    rented = load_data("machine_types.json").get(normal(gpu_name)) if isinstance(gpu_name, str) else None
    chip = gpu(gpu_name if rented is None else rented["gpu"])
    machine = _machine(chip.name) if rented is None else _as_rented(_machine(chip.name), rented)
    n_gpus = whole("gpus", n_gpus)
    unsourced = {f"gpu.{field}" for field in chip.unsourced}
    unsourced |= {field.replace("host_", "host.") for field in machine["unsourced"] if field != "gpus_per_node"}
    if gpus_per_node is None:
        gpus_per_node = machine["gpus_per_node"]
        unsourced |= {"gpus_per_node"} & set(machine["unsourced"])
    gpus_per_node = whole("gpus_per_node", gpus_per_node)
    internode_bytes_per_s = machine["internode_bytes_per_s_per_gpu"]
    if internode_gbps is not None:
        internode_bytes_per_s = gbps_to_bytes_per_s(internode_gbps)
    elif internode_bytes_per_s is None:
        if n_gpus > gpus_per_node:
            raise InputError(
                f"internode_gbps is not given, and no network between nodes of {chip.name} is known; "
                f"allowed: a number > 0, or at most {gpus_per_node} gpus (one node)"
            )
        internode_bytes_per_s = chip.link_bytes_per_s  # one node: no byte ever crosses it
        unsourced |= {"internode_bytes_per_s"}
    return Cluster(
        gpu=chip,
        n_gpus=n_gpus,
        gpus_per_node=gpus_per_node,
        internode_bytes_per_s=internode_bytes_per_s,
        host=_host(machine, min(n_gpus, gpus_per_node)),
        unsourced=tuple(sorted(unsourced)),
    )


_RENTED = {
    "host_memory_bytes": "host_memory_bytes", "host_cores": "host_cores", "network_bytes_per_s": "internode_bytes_per_s_per_gpu",
}  # fmt: skip
"""Field of a machine type -> that of the usual machine of a GPU."""


def _as_rented(machine: dict[str, Any], rented: dict[str, Any]) -> dict[str, Any]:
    """The usual ``machine`` of a GPU with what the machine type ``rented`` says otherwise; an NVLink domain stays whole."""
    own = {_RENTED[field]: rented[field] for field in _RENTED if rented[field] is not None}
    if "internode_bytes_per_s_per_gpu" in own:
        own["internode_bytes_per_s_per_gpu"] /= rented["n_gpus"]
    if rented["n_gpus"] > machine["gpus_per_host"] or machine["gpus_per_node"] == machine["gpus_per_host"]:
        own["gpus_per_node"] = own["gpus_per_host"] = rented["n_gpus"]
    guessed = {_RENTED[field] for field in rented["unsourced"] if field in _RENTED}
    unsourced = sorted(guessed.union(set(machine["unsourced"]) - own.keys()))
    return {**machine, **own, "unsourced": unsourced, "source": [*rented["source"], *machine["source"]]}


def gbps_to_bytes_per_s(internode_gbps: object) -> float:
    """Gigabits per second (a number > 0, at most a million) as bytes per second."""
    value = number("internode_gbps", internode_gbps)
    if not 0 < value <= 1e6:
        raise refuse("internode_gbps", value, "a number > 0, at most 1000000")
    return value * 1e9 / 8
