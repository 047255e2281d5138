"""Job files (TOML or JSON) and the job as plain data.

A file has the sections ``[model]`` (``name``, or ``config`` = path of a ``config.json``, or every field of
``ModelSpec``), ``[workload]``, ``[strategy]`` and ``[cluster]`` (``gpu`` = a name or a full table). Keys are the names of
the dataclass fields; those of the command line (``zero``, ``micro_batch``, ``global_batch``, ``gpus``) work as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from estimator import catalog
from estimator.errors import InputError, require_choice
from estimator.job.cluster import LINK_KINDS, Cluster, Gpu, Host
from estimator.job.fields import (
    MAX_LAYERS,
    build,
    known_keys,
    number,
    read_file,
    refuse,
    shown,
    table,
    text,
    typed,
    whole,
)
from estimator.job.foreign import foreign
from estimator.job.hf import load_config
from estimator.job.job import Job
from estimator.job.lora import Lora
from estimator.job.model import ModelSpec
from estimator.job.network import Network
from estimator.job.options import assemble_job, resolve_cluster
from estimator.job.strategy import Strategy
from estimator.units import DTYPE_BYTES

SECTIONS = ("model", "workload", "strategy", "cluster")
WORKLOAD = {"seq_len": "seq_len", "micro_batch": "micro_batch", "micro_batch_size": "micro_batch",
            "global_batch": "global_batch", "global_batch_size": "global_batch"}  # fmt: skip
NAMED_CLUSTER = ("gpu", "gpus", "n_gpus", "gpus_per_node", "internode_gbps", "network")
FULL_CLUSTER = ("gpu", "gpus", "n_gpus", "gpus_per_node", "internode_bytes_per_s", "host", "unsourced",
                "network")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where names in a job file are looked up."""

    folder: Path = Path()
    """Folder to which ``config`` paths are relative."""
    local_gpu: Gpu | None = None
    local_host: Host | None = None
    """This machine as ``calibrate`` measured it: what ``gpu = "cpu"`` means."""


def job_to_dict(job: Job) -> dict[str, Any]:
    """``job`` as plain data for JSON, self-contained: ``job_from_dict`` gives the same ``Job`` again."""
    data = asdict(job)
    data["cluster"]["gpu"]["unsourced"] = list(job.cluster.gpu.unsourced)
    data["cluster"]["unsourced"] = list(job.cluster.unsourced)
    for name in ("kernels_off", "pp_layers"):
        data["strategy"][name] = list(data["strategy"][name])
    data["model"] = _with_lists(data["model"])
    return data


def _with_lists(value: Any) -> Any:
    """Plain data with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value


def job_from_dict(data: Mapping[str, Any], place: Place | None = None) -> Job:
    """The ``Job`` that plain ``data`` (a parsed job file, or what ``job_to_dict`` wrote) describes.

    Raises ``InputError`` on unknown keys (with the nearest valid one), missing sections and wrong types.
    """
    place = place or Place()
    data = table("job", data)
    known_keys("job", data, SECTIONS)
    for section in ("model", "cluster"):
        if section not in data:
            raise InputError(f"job has no section {section!r}, which it needs")
    parts = {section: table(section, data.get(section, {})) for section in SECTIONS}
    model = _model(parts["model"], place)
    strategy = build(Strategy, "strategy", _renamed("strategy", parts["strategy"], {"zero": "zero_stage"}))
    batch = _renamed("workload", parts["workload"], WORKLOAD)
    known_keys("workload", batch, WORKLOAD)
    sizes = {key: typed(f"workload.{key}", value, int | None) for key, value in batch.items()}
    return assemble_job(model, _cluster(parts["cluster"], place), strategy, sizes)


def load_job(path: str | Path, *, local_gpu: Gpu | None = None, local_host: Host | None = None) -> Job:
    """The ``Job`` in the TOML or JSON file at ``path``. Raises ``InputError``."""
    try:
        suffix, folder = Path(path).suffix.lower(), Path(path).parent
    except TypeError:
        raise InputError(f"job file {shown(path)} is not a path") from None
    if suffix not in (".toml", ".json"):
        raise InputError(f"job file {shown(str(path))} has the suffix {suffix!r}; allowed: .toml, .json")
    place = Place(folder=folder, local_gpu=local_gpu, local_host=local_host)
    data = table("job", read_file(path, "job file"))
    other = foreign(data) if data.keys() - set(SECTIONS) else None
    if other is not None:
        raise InputError(
            f"job file {shown(str(path))} is {other[0]}; allowed: sections {', '.join(SECTIONS)}, or {other[1]}"
        )
    return job_from_dict(data, place)


def _renamed(section: str, data: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """``data`` with aliases replaced; two spellings of one key are refused."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = aliases.get(key, key)
        if name in result:
            raise InputError(f"{section} gives {name!r} twice, under two names; allowed: one of them")
        result[name] = value
    return result


def _model(data: dict[str, Any], place: Place) -> ModelSpec:
    if "n_layers" in data:
        whole("model.n_layers", data["n_layers"], maximum=MAX_LAYERS)
        _finite("model", data, ("rope_theta", "norm_eps", "rotary_fraction"))
        return build(ModelSpec, "model", data)
    known_keys(
        "model",
        data,
        {"name", "config", "lora"}
        if "config" in data or "name" in data
        else {f.name for f in fields(ModelSpec)} | {"config"},
    )
    if ("name" in data) == ("config" in data):
        raise InputError(
            "model needs exactly one of 'name' (a catalogue name), 'config' (a path), or all fields of a model"
        )
    if "name" in data:
        model = catalog.model(text("model.name", data["name"]))
    else:
        model = load_config(place.folder / text("model.config", data["config"]))
    return replace(model, lora=build(Lora, "model.lora", data["lora"])) if "lora" in data else model


def _cluster(data: dict[str, Any], place: Place) -> Cluster:
    chip = data.get("gpu")
    known_keys("cluster", data, FULL_CLUSTER if isinstance(chip, Mapping) else NAMED_CLUSTER)
    data = _renamed("cluster", data, {"gpus": "n_gpus"})
    if "gpu" not in data:
        raise InputError("cluster has no 'gpu', which it needs")
    network = build(Network, "cluster.network", table("cluster.network", data.get("network", {})))
    if not isinstance(chip, Mapping):
        sizes = {
            "n_gpus": typed("gpus", data.get("n_gpus", 8), int),
            "gpus_per_node": typed("gpus_per_node", data.get("gpus_per_node"), int | None),
            "internode_gbps": typed("internode_gbps", data.get("internode_gbps"), float | None),
        }
        cluster = resolve_cluster(text("gpu", chip), sizes, local_gpu=place.local_gpu, local_host=place.local_host)
        return cluster if network.is_plain else replace(cluster, network=network)
    host = table("cluster.host", data.get("host", {}))
    data = {
        **data,
        "network": network,
        "gpu": _gpu(table("cluster.gpu", chip)),
        "host": _positive(Host, "cluster.host", host, ()),
    }
    for key in ("n_gpus", "gpus_per_node", "internode_bytes_per_s"):
        if key not in data:
            raise InputError(f"cluster has no {key!r}, which it needs")
    whole("gpus", data["n_gpus"])
    whole("gpus_per_node", data["gpus_per_node"])
    data["internode_bytes_per_s"] = number("cluster.internode_bytes_per_s", data["internode_bytes_per_s"])
    data["unsourced"] = typed("cluster.unsourced", data.get("unsourced", ()), tuple[str, ...])
    return Cluster(**data)


def _gpu(data: dict[str, Any]) -> Gpu:
    gpu = _positive(
        Gpu,
        "cluster.gpu",
        data,
        ("context_bytes", "n_sms", "l2_bytes", "link_bytes_per_s", "host_link_bytes_per_s", "tdp_watts"),
    )
    require_choice("cluster.gpu.link_kind", gpu.link_kind, LINK_KINDS)
    known_keys("cluster.gpu.peak_flops", gpu.peak_flops, DTYPE_BYTES)
    if "fp32" not in gpu.peak_flops:
        raise InputError("cluster.gpu.peak_flops has no 'fp32', which it needs")
    for dtype, peak in gpu.peak_flops.items():
        if peak <= 0:
            raise refuse(f"cluster.gpu.peak_flops.{dtype}", peak, "a number > 0")
    return gpu


def _positive(cls: Any, section: str, data: dict[str, Any], may_be_zero: tuple[str, ...]) -> Any:
    """A ``cls`` from ``data`` whose figures are all finite and above zero (or at least zero)."""
    result = build(cls, section, data)
    for f in fields(result):
        value = getattr(result, f.name)
        if isinstance(value, int | float) and (value < 0 or (value == 0 and f.name not in may_be_zero)):
            raise refuse(f"{section}.{f.name}", value, "a number >= 0" if f.name in may_be_zero else "a number > 0")
    return result


def _finite(section: str, data: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Raises ``InputError`` for a negative or non-finite number under one of ``keys``."""
    for key in keys:
        if key in data:
            number(f"{section}.{key}", data[key])
